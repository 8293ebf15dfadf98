"""Training on a carried file of tokens: rates searched by several workers; `python -m benchmarks.tokens`."""
