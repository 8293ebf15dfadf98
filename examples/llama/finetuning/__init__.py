"""Fine-tuning of a stored model, and its evaluation."""
