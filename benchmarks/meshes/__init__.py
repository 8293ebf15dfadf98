"""What an update moves between devices, and what a step needs on each."""
