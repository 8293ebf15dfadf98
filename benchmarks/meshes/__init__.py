"""Traffic of an update between devices, and memory of a step on each."""
