"""Benchmarks of time and memory import where the trainer's other packages are missing."""

from __future__ import annotations

import subprocess
import sys

MODULES = (
    "steps.step_time",
    "steps.memory",
    "sinkhorn",
    "meshes.collectives",
    "tokens.__main__",
    "mfu",
    "accelerator",
)
IMPORT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tyro", "grain", "tokenizers", "safetensors", "tensorboardX"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
for name in sys.argv[1:]:
    __import__(f"benchmarks.{name}")
"""


def test_benchmarks_import_with_jax_optax_and_flax_alone():
    subprocess.run([sys.executable, "-c", IMPORT, *MODULES], check=True)


def test_the_check_would_notice():
    run = subprocess.run(
        [sys.executable, "-c", IMPORT, "quality.cells"], capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "ModuleNotFoundError" in run.stderr
