"""Test-wide settings: virtual devices, how XLA compiles, the parts of the suite, hypothesis.

Two environment variables, which the Makefile sets, choose what a run does:

* ``TEST_CODEGEN=quick`` has XLA:CPU generate plain code: the partitioner and the mathematics stay, compiling
  takes a third of the time. Workers, subprocesses and later runs take a program that one of them has compiled
  from ``build/compiled``. Tests marked ``full_codegen`` (bits, bytes, HLO, long scans) are left to a run
  without it.
* ``TEST_PART=2/6`` keeps the second of six parts of the tests that ``-m`` selects, whole files at a time.
"""

from __future__ import annotations

import gc
import os
import pathlib
import subprocess
import sys

import hypothesis
import jax
import pytest

from tests.parts import part_of

collect_ignore = ["frameworks"]  # make test-frameworks, in environments of their own

QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",  # every core has a worker of its own
)
COMPILED = pathlib.Path(__file__).parents[1] / "build" / "compiled"


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


def keep_compiled_programs() -> None:
    """Has JAX keep every compiled program in a folder: here, and in workers and subprocesses."""
    options = {
        "jax_compilation_cache_dir": str(COMPILED),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


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


def pytest_collection_finish() -> None:
    """Spares the garbage collector what lives to the end: modules and tests, most of all objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


gc.disable()  # nothing that the collection of tests makes is garbage
QUICK_CODEGEN = os.environ.get("TEST_CODEGEN") == "quick"
PART = os.environ.get("TEST_PART", "")

# Before the backend starts.
if QUICK_CODEGEN:
    use_quick_codegen()
    keep_compiled_programs()
# Sharding tests want a 2 x 4 mesh, the others do not notice.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=20, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("default")
