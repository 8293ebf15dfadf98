"""The output of a run: metrics, progress, times, summaries."""
