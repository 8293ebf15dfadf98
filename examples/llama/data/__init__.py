"""From text or records to batches."""
