"""Pictures of the explained pages, each from a run of the demo model; `python -m benchmarks.figures`."""
