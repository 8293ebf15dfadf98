"""Quality of every optimizer at its own rate on the same tokens; `python -m benchmarks.quality`."""
