"""Test-wide settings: eight virtual CPU devices and a hypothesis profile without deadlines."""

import hypothesis
import jax

# Before the backend starts: sharding tests want a 2 x 4 mesh, the others do not notice.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=20, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("default")
