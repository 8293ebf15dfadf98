"""The network, its loss, its files and its decoding."""
