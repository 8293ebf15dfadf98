"""Every transformation on every kind of parameter and sharding: equal to one device, stable types, shards."""

from __future__ import annotations

import contextlib
import functools
import math
import os

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layout_optax import state_shardings
from layout_optax.leaves import flatten_with_layout
from tests.sharding import grid

STEPS = 3
FULL = os.environ.get("SHARDING_GRID") == "full"
TRANSFORMATIONS = {**grid.DIRECTIONS, **grid.COMPOSITIONS}
# Signs flip where their argument is at rounding level; a share of the entries that would be no accident.
FLIPS = {
    "scale_by_sage",
    "scale_by_lorapre_lion",
    "lorapre_lion",
    "sage",
    "sage_hybrid",
    "lion_hybrid",
}
# Compositions that other tests of `make test` compare with one device too, as they are (LoRA-Pre's in
# tests/lorapre/test_contract.py, the moment in test_rank_axis.py) or as their directions here.
REPEATED = {
    "sage",
    "sinkgd",
    "lion_hybrid",
    "low_rank_ema",
    "lorapre_muon",
    "lorapre_sgd",
    "lorapre_lion",
    "lorapre_sinkgd",
}
# Directions that share their sharded mathematics with another one: one mode, 0 or 1, instead of two.
ONE_MODE = {"scale_by_sage_int8": 0, "scale_by_lorapre_lion": 1, "scale_by_lorapre_muon": 1}


def cases():
    """Each transformation in its modes: mesh axes, under `jax.set_mesh` or not, and the turn of the specs.

    The four modes of a direction see the four turns, so that together they see every cell; of the compositions
    two modes are enough. Not extended are two modes of a direction, or that of `ONE_MODE`, and the first one of
    a composition that is not in `REPEATED`.
    ``SHARDING_GRID=full`` gives every mode of a direction every cell.
    """
    modes = [("explicit", False), ("auto", True), ("explicit", True), ("auto", False)]
    for name in TRANSFORMATIONS:
        for turn, (kind, in_context) in enumerate(modes):
            if turn < 2 or FULL or name in grid.DIRECTIONS:
                where = kind + ("-set_mesh" if in_context else "")
                once = (0, 1) if name in grid.DIRECTIONS else (0,)
                once = (ONE_MODE[name],) if name in ONE_MODE else once
                extended = turn not in once or name in REPEATED
                marks = [pytest.mark.extended] if extended else []
                yield pytest.param(name, kind, in_context, turn, id=f"{name}-{where}", marks=marks)


def paths_of(name, turn):
    return grid.full_paths() if FULL and name in grid.DIRECTIONS else grid.square_paths(turn)


def gradients(paths):
    return [grid.draw(paths, seed) for seed in range(1, STEPS + 1)]


@functools.cache
def on_one_device(name, turn):
    """The updates of all steps and the last state."""
    tx, paths = TRANSFORMATIONS[name](), paths_of(name, turn)
    params = grid.draw(paths, 0)
    state = tx.init(params)
    step = jax.jit(tx.update, compiler_options=grid.quick())
    updates = []
    for g in gradients(paths):
        update, state = step(g, state, params)
        updates.append(update)
    return jax.device_get(updates), jax.device_get(state)


def apart(found, expected):
    """||found - expected|| / ||expected||."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


def types(tree):
    """Shapes, dtypes and shardings of a state; scalars belong to no mesh until a jit puts them there."""
    return [jax.typeof(x) for x in jax.tree.leaves(tree) if x.ndim]


def check_updates(name, found, expected, tolerance):
    for step, (update, reference) in enumerate(zip(found, expected, strict=True)):
        for path, value in update.items():
            if name in FLIPS:
                flipped = np.abs(value - reference[path]) > 1e-3 * np.abs(reference[path]).max()
                assert flipped.mean() <= 1e-3, (name, step, path)
                value = np.where(flipped, reference[path], value)
            assert apart(value, reference[path]) <= tolerance, (name, step, path)


def check_state(state, reference, tolerance):
    pairs = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(reference), strict=True)
    for (keys, value), expected in pairs:
        where = jax.tree_util.keystr(keys)
        if value.dtype == np.int8:  # stochastic rounding of what differs in the last bit
            assert np.mean(value != expected) <= 1e-3, where
            assert np.abs(np.int32(value) - expected).max(initial=0) <= 1, where
        else:
            assert apart(value, expected) <= tolerance, where


@pytest.mark.parametrize(("name", "kind", "in_context", "turn"), list(cases()))
def test_equals_one_device(name, kind, in_context, turn):
    tx, paths = TRANSFORMATIONS[name](), paths_of(name, turn)
    mesh = grid.mesh_of(kind)
    placed = grid.shardings(paths, mesh)
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        params = jax.device_put(grid.draw(paths, 0), placed)
        grads = [jax.device_put(g, placed) for g in gradients(paths)]
        shardings = state_shardings(tx, params, placed)
        state = jax.device_put(tx.init(params), shardings)
        at_init, found = types(state), []
        # Explicit types find their way alone; an Auto mesh is told.
        options = {} if kind == "explicit" else {"out_shardings": (placed, shardings)}
        step = jax.jit(tx.update, compiler_options=grid.quick(), **options)
        for g in grads:
            update, state = step(g, state, params)
            found.append(update)
    assert step._cache_size() == 1
    assert types(state) == at_init
    for array, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
        share = array.nbytes // shards_of(sharding)
        assert {shard.data.nbytes for shard in array.addressable_shards} == {share}
    for update in found:
        for path, value in update.items():
            assert value.sharding.is_equivalent_to(placed[path], value.ndim)
    tolerance = 1e-4 if "muon" in name else 1e-5
    updates, reference = on_one_device(name, turn)
    check_updates(name, jax.device_get(found), updates, tolerance)
    check_state(jax.device_get(state), reference, tolerance)


@pytest.mark.parametrize("name", grid.DIRECTIONS)
def test_every_cell_has_its_types_under_set_mesh(name):
    """What an Explicit mesh refuses it refuses while tracing, so this needs no compilation."""
    tx, paths = TRANSFORMATIONS[name](), grid.full_paths()
    placed = grid.shardings(paths, grid.mesh_of("explicit"))
    params = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed[path])
        for path, x in jax.eval_shape(lambda: grid.draw(paths, 0)).items()
    }
    with jax.set_mesh(grid.mesh_of("explicit")):
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
    spec = lambda x: (x.shape, x.dtype, x.sharding and x.sharding.spec)  # noqa: E731
    assert jax.tree.map(spec, updates) == jax.tree.map(spec, params)
    assert [spec(x) for x in jax.tree.leaves(after) if x.ndim] == [
        spec(x) for x in jax.tree.leaves(state) if x.ndim
    ]


def shards_of(sharding):
    """Into how many different pieces a sharding cuts an array."""
    names = [
        n for part in sharding.spec if part for n in (part if isinstance(part, tuple) else [part])
    ]
    return math.prod(sharding.mesh.shape[name] for name in names)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_no_state_is_left_unsharded(name):
    """Each field has its parameter's spec without the axes that the field lacks; a rank axis takes theirs."""
    tx, paths = TRANSFORMATIONS[name](), grid.full_paths()
    placed = grid.shardings(paths, grid.mesh_of("auto"))
    params = jax.eval_shape(lambda: grid.draw(paths, 0))
    leaves = flatten_with_layout(grid.LAYOUT, params)
    layouts = dict(zip(leaves.paths, leaves.layouts, strict=True))
    found = jax.tree_util.tree_leaves_with_path(state_shardings(tx, params, placed))
    checked = 0
    for keys, sharding in found:
        field, owner = field_and_owner(keys)
        if owner is None:
            assert sharding.spec == P()
            continue
        layout, spec = layouts[owner], list(placed[owner].spec)
        gone = {
            "left": layout.column_axes,
            "mu_row_max": layout.column_axes,
            "row_square": layout.column_axes,
            "column_square": layout.row_axes,
            "right": layout.row_axes,
            "magnitude": layout.row_axes,
        }.get(field, ())
        lacking = [part for axis, part in enumerate(spec) if axis in gone and part]
        spec = [part for axis, part in enumerate(spec) if axis not in gone]
        if field in ("left", "right"):
            # Rank 4 bears the axis of 2 or of 4 devices, of both together the larger.
            spec.insert(len(spec) - 1, "y" if ("x", "y") in lacking else (*lacking, None)[0])
        assert sharding.spec == P(*spec), (field, owner)
        checked += shards_of(sharding) > 1
    assert checked >= 10 or name in ("scale_by_sinkhorn", "sinkgd")


def field_and_owner(keys):
    """The state's field and the parameter that an array belongs to, from its key path."""
    owner = getattr(keys[-1], "key", None)
    if owner not in grid.full_paths():
        return None, None
    return keys[-2].name, owner
