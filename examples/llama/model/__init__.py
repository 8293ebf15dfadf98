"""The Llama model, its loss, its files and its decoding."""
