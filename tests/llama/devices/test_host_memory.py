"""Freed memory stays with the process: XLA's temporaries cost no new pages once the heap has grown."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

STEPS = """
import json, resource, sys
import jax, jax.numpy as jnp
from examples.llama.devices.host_memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
step = jax.jit(lambda m, g: (jnp.sign(m + g) @ jnp.ones(64), 0.9 * m + g), donate_argnums=0)
m, g = jnp.ones((1 << 17, 64)), jnp.ones((1 << 17, 64))
found = []
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    out, m = jax.block_until_ready(step(m, g))
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps({"kept": kept, "faults": sorted(found[-11:])[5]}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these options")
def test_steps_take_no_new_pages():
    found = {}
    for which in ("keep", "default"):
        run = subprocess.run(
            [sys.executable, "-c", STEPS, which], capture_output=True, text=True, check=True
        )
        found[which] = json.loads(run.stdout)
    pages = (1 << 17) * 64 * 4 // 4096  # of one array
    assert found["keep"]["kept"] is True
    assert found["keep"]["faults"] < pages / 100
    assert found["default"]["faults"] >= pages


RELEASE = """
import pathlib
import numpy as np
from examples.llama.devices.host_memory import keep_freed_memory, release_freed_memory

def resident():
    return 4096 * int(pathlib.Path("/proc/self/statm").read_text().split()[1])

keep_freed_memory()
before = resident()
block = np.ones(1 << 25)
del block
kept = resident() - before
release_freed_memory()
print(kept, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these options")
def test_kept_memory_can_be_given_back():
    run = subprocess.run(
        [sys.executable, "-c", RELEASE], capture_output=True, text=True, check=True
    )
    kept, after = map(int, run.stdout.split())
    assert kept > 200 * 2**20
    assert after < 64 * 2**20


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    from examples.llama.devices.host_memory import keep_freed_memory

    assert keep_freed_memory() is False
