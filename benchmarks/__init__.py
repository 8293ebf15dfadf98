"""One script per question; each writes its numbers and a page about them under ``docs/results``."""
