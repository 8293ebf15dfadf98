"""Compares optimizers in quality, time and bytes."""
