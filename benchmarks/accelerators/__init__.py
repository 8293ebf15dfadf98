"""The measurements of `benchmarks.accelerator` on a GPU or TPU, and its page."""
