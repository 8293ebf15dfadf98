"""Test-wide settings: virtual devices, how much XLA optimizes, the parts of the suite, hypothesis.

Two environment variables, which the Makefile sets, choose what a run does:

* ``TEST_CODEGEN=quick`` has XLA:CPU generate plain code: the partitioner and the mathematics stay, compiling
  takes a third of the time. Tests marked ``full_codegen`` (bits, bytes, HLO, long scans) are left to a run
  without it.
* ``TEST_PART=2/6`` keeps the second of six parts of the tests that ``-m`` selects, whole files at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys

import hypothesis
import jax
import pytest

from tests.parts import part_of

collect_ignore = ["frameworks"]  # make test-frameworks, in environments of their own

QUICK = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")


def accepts(flags: str) -> bool:
    """Whether XLA starts with these flags: it ends the process at one that it does not know."""
    command = [sys.executable, "-c", "import jax; jax.devices('cpu')"]
    environment = {**os.environ, "XLA_FLAGS": flags}
    return (
        subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    )


def use_quick_codegen() -> None:
    """Puts the flags that this XLA knows where workers and subprocesses inherit them."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    if all(flag in flags for flag in QUICK):  # a worker of pytest-xdist
        return
    if accepts(" ".join((*flags, *QUICK))):
        flags += QUICK
    else:
        flags += [flag for flag in QUICK if accepts(" ".join((*flags, flag)))]
    os.environ["XLA_FLAGS"] = " ".join(flags)


@pytest.hookimpl(trylast=True)  # after -m, so that a part is one of the tests that would run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what another run does: see the module's docstring."""
    kept = list(items)
    if QUICK_CODEGEN:
        kept = [item for item in kept if item.get_closest_marker("full_codegen") is None]
    if PART:
        nodeids = part_of([item.nodeid for item in kept], *map(int, PART.split("/")))
        kept = [item for item in kept if item.nodeid in nodeids]
    if len(kept) < len(items):
        kept_ids = {id(item) for item in kept}
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept_ids])
        items[:] = kept


QUICK_CODEGEN = os.environ.get("TEST_CODEGEN") == "quick"
PART = os.environ.get("TEST_PART", "")

# Before the backend starts.
if QUICK_CODEGEN:
    use_quick_codegen()
# Sharding tests want a 2 x 4 mesh, the others do not notice.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=20, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("default")
