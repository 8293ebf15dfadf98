"""Optimizers side by side, in quality, time and bytes."""
