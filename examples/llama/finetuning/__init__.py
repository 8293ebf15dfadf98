"""A run on part of a stored model, and what that model can do."""
