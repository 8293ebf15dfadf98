"""What is asked of every framework: roles, places and bytes of the state, compilations, losses, a restart.

A test module gives a `Trained` for each run of its framework's own trainer; `check` compares two of them and
records the figures that docs/results/frameworks.md shows.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.monitoring
import numpy as np

import lorapre_optax
import sage_optax
from layout_optax.layout import is_empty, path_string
from layout_optax.leaves import flatten_with_layout
from layout_optax.memory import leaf_bytes, state_leaves
from tests.snippets import snippets

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "frameworks.md"
RESULTS = os.environ.get("FRAMEWORKS_RESULTS")
DEVICES = 8
RANK = 8
STEPS, SAVED = 8, 4
"""A run's steps, and after how many it is saved for the one that goes on from there."""

OPTIMIZERS: Mapping[str, tuple[str, str]] = {
    "SAGE-Hybrid": ("sage_optax.sage_hybrid", ""),
    "LoRA-Pre AdamW, recommended": (
        "lorapre_optax.lorapre_adamw",
        f", {RANK}, **lorapre_optax.RECOMMENDED",
    ),
    "LoRA-Pre Muon": ("lorapre_optax.lorapre_muon", f", {RANK}"),
}
"""By name: the function, and what its call has after the learning rate."""


@dataclass
class Trained:
    """One run of a framework's trainer.

    Attributes:
      losses: of its steps.
      params: as the optimizer sees them.
      state: the optimizer's, after the last step.
      compilations: of the training step.
      tx: what the trainer was given.
    """

    losses: Sequence[float]
    params: Any
    state: Any
    compilations: int
    tx: Any


def run_section(title: str, optimizer: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the snippets of a section of docs/frameworks.md, with another optimizer in SAGE-Hybrid's place.

    Args:
      title: the section's heading.
      optimizer: a key of `OPTIMIZERS`.
      names: what the page takes for granted.

    Returns:
      The names that the snippets defined.
    """
    section = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    function, rest = OPTIMIZERS[optimizer]
    source = "\n".join(snippets(section))
    source, count = re.subn(r"sage_optax\.sage_hybrid\(([\w.-]+)", rf"{function}(\1{rest}", source)
    assert count == 1, f"{title}: {count} calls of sage_optax.sage_hybrid"
    found = {"sage_optax": sage_optax, "lorapre_optax": lorapre_optax, **names}
    found.setdefault("__name__", f"page:{title}")
    exec(compile(source, f"{PAGE.name}: {title}", "exec", dont_inherit=True), found)
    return found


@contextlib.contextmanager
def compilations(name: str) -> Iterator[Callable[[], int]]:
    """Counts how often XLA compiles the functions of this name inside the block."""
    found = []

    def listen(event: str, _: float, fun_name: str = "", **__: Any) -> None:
        if event.endswith("backend_compile_duration") and re.fullmatch(
            rf"(jit\()?{name}\)?", fun_name
        ):
            found.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: len(found)
    finally:
        with contextlib.suppress(AssertionError):  # Tunix takes all listeners away when it closes
            jax.monitoring.unregister_event_duration_listener(listen)


def arrays(tree: Any) -> dict[str, jax.Array]:
    """The arrays of a tree by path, without boxes."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {path_string(keys): leaf for keys, leaf in flat if isinstance(leaf, jax.Array)}


def device_bytes(array: jax.Array) -> int:
    """Bytes of an array on one device, the fullest."""
    return max(leaf_bytes(shard.data) for shard in array.addressable_shards)


def check_roles(params: Any, expected: Mapping[str, tuple[str, tuple, tuple]]) -> int:
    """Every leaf has the role, rows and columns that the one pattern for its path says.

    Returns:
      The number of leaves.
    """
    flat = flatten_with_layout(None, params)
    used = set()
    present = [
        (path, layout)
        for path, layout, leaf in zip(flat.paths, flat.layouts, flat.leaves, strict=True)
        if not is_empty(leaf)
    ]
    for path, layout in present:
        fitting = [pattern for pattern in expected if re.search(pattern, path)]
        assert len(fitting) == 1, f"{path}: {fitting}"
        used.update(fitting)
        found = (layout.role, layout.row_axes, layout.column_axes)
        assert found == expected[fitting[0]], path
    assert used == set(expected), f"no leaf for {set(expected) - used}"
    return len(present)


def check_places(trained: Trained) -> dict[str, int]:
    """Every array of the state lies where its parameter's axes do, and costs a device its part.

    A momentum as large as its parameter has the parameter's shards. A factor, which has a rank besides, and a
    statistic of one side are compared with `state_shardings`, the documented rule.

    Returns:
      Bytes: the state's, its arrays' on one device, and what AdamW would have there.
    """
    params, state = arrays(trained.params), arrays(trained.state)
    expected = arrays_of_shardings(trained)
    owners = {id(leaf.value): leaf.owner for leaf in state_leaves(trained.state, trained.params)}
    for path, array in state.items():
        if array.ndim:
            assert array.sharding.is_equivalent_to(expected[path], array.ndim), (
                f"{path}: {array.sharding}, not {expected[path]}"
            )
        owner = params.get(owners.get(id(array)) or "")
        if owner is not None and owner.shape == array.shape:
            assert array.sharding.is_equivalent_to(owner.sharding, array.ndim), path
        matrix = array.ndim > 1 and owner is not None and not owner.sharding.is_fully_replicated
        if matrix:
            assert not array.sharding.is_fully_replicated, f"{path}: a copy on every device"
    return {
        "state": sum(map(leaf_bytes, state.values())),
        "state_a_device": sum(map(device_bytes, state.values())),
        "adamw_a_device": sum(2 * device_bytes(param) for param in params.values()),
    }


def arrays_of_shardings(trained: Trained) -> dict[str, jax.sharding.NamedSharding]:
    """By path, where `state_shardings` puts the arrays of the state."""
    shardings = sage_optax.state_shardings(trained.tx, trained.params)
    flat = jax.tree_util.tree_leaves_with_path(shardings)
    return {path_string(keys): sharding for keys, sharding in flat}


def check_equal(found: Any, expected: Any) -> int:
    """The arrays of two trees are equal bit for bit; returns how many there are."""
    found, expected = arrays(found), arrays(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(array), err_msg=path)
    return len(expected)


def check(
    framework: str,
    optimizer: str,
    setting: str,
    whole: Trained,
    resumed: Trained,
    roles: Mapping[str, tuple[str, tuple, tuple]],
) -> None:
    """All that is asked of a framework, and the row of the page.

    Args:
      framework: its name.
      optimizer: a key of `OPTIMIZERS`.
      setting: the mesh and the trainer, in words.
      whole: a run of `STEPS` steps.
      resumed: the run that went on from a checkpoint of the other's, of its step `SAVED` or near it.
      roles: by pattern, the role, rows and columns of every parameter.
    """
    assert jax.device_count() == DEVICES
    assert len(whole.losses) == STEPS
    assert all(map(math.isfinite, whole.losses))
    assert whole.losses[-1] < 0.9 * whole.losses[0], whole.losses
    assert 0 < len(resumed.losses) < STEPS
    assert list(resumed.losses) == list(whole.losses[-len(resumed.losses) :])
    equal = check_equal(resumed.params, whole.params) + check_equal(resumed.state, whole.state)
    count = check_roles(whole.params, roles)
    sizes = check_places(whole)
    check_places(resumed)
    assert whole.compilations == resumed.compilations == 1
    row = {
        "setting": setting,
        "optimizer": optimizer,
        "leaves": count,
        "losses": [round(float(loss), 4) for loss in whole.losses],
        "compilations": whole.compilations,
        "equal_arrays_after_restart": equal,
        **sizes,
    }
    record(framework, row)


def record(framework: str, row: Mapping[str, Any]) -> None:
    """Adds a row to the framework's file of results, if the runner wants one."""
    if RESULTS:
        path = pathlib.Path(RESULTS) / f"{framework}.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*rows, row]))
