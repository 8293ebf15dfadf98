"""What a run leaves behind: metrics, progress, times, summaries."""
