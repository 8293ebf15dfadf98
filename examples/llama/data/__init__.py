"""Turns text or records into batches."""
