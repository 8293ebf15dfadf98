"""Eight virtual CPU devices, and little optimization of what they run; `make test` does not come here."""

import os

FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")

os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS)).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
