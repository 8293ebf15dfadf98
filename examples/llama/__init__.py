"""Llama pre-training example: model, data, trainer and comparison."""
