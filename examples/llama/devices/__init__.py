"""What a run runs on: meshes, processes, host memory, signals."""
