"""The environment of a run: meshes, processes, host memory, signals."""
