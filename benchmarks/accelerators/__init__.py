"""What `benchmarks.accelerator` measures on a GPU or TPU, and its page."""
