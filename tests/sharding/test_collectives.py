"""No update moves anything of a parameter's size, counted on the compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import lorapre_optax as lorapre
from benchmarks.meshes import collectives as benchmark
from benchmarks.meshes.hlo import moved
from layout_optax import state_shardings
from tests.sharding import grid

# Elements for the leaf of 1024 x 2048 at rank 16 on 2 x 4 devices, from what has to be summed:
# a shard has 512 rows and 512 columns, so factors of 16 x 512 each and Gram matrices of 16 x 16.
THIN = 2 * 16 * 512 + 2 * 16 * 16 + 16
MOMENT = 2 * THIN  # gathered along the rank, and the sums of the products
LIMITS = {
    "SAGE": 512 + 16,
    "SAGE, int8 momentum": 2 * 512 + 16,
    "SinkGD, 5 iterations": 6 * (512 + 512) + 16,
    "one low-rank moment": MOMENT,
    "LoRA-Pre Adam, the paper's": 2 * MOMENT,
    "LoRA-Pre Adam, recommended, first step": 2 * MOMENT
    + 3 * THIN,  # the search for a first subspace
    "LoRA-Pre Adam, recommended, later steps": 2 * MOMENT,
    "LoRA-Pre Lion": MOMENT,
}


# Every rule on one kind of mesh, the two kinds in turn; the rest is for test-all.
CASES = [
    pytest.param(name, kind, marks=() if (i + j) % 2 == 0 else pytest.mark.extended)
    for i, name in enumerate(LIMITS)
    for j, kind in enumerate(benchmark.KINDS)
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_only_vectors_and_factors_move(name, kind):
    found = benchmark.measure(benchmark.CASES[name], benchmark.KINDS[kind])
    assert 0 < found["elements"] <= LIMITS[name]
    kinds = {each["kind"] for each in found["operations"]}
    factored = "Pre" in name or "low-rank" in name
    assert kinds == ({"all-reduce", "all-gather"} if factored else {"all-reduce"})
    gathered = [each["elements"] for each in found["operations"] if each["kind"] == "all-gather"]
    assert max(gathered, default=0) <= 16 * 512  # one thin factor at a time
    if name.startswith("SinkGD"):
        loops = [each for each in found["operations"] if each["times"] == 5]
        assert sum(each["elements"] for each in loops) == 1024


@pytest.mark.parametrize("kind", benchmark.KINDS)
@pytest.mark.parametrize(("mesh", "side"), [("fsdp=8", 2048), ("tensor=8", 1024)])
def test_under_one_mesh_axis_the_whole_factor_is_gathered_once(mesh, side, kind):
    """Two moments: the factor without the sharded axis moves there and back, the other one not at all."""
    found = benchmark.measure(
        benchmark.CASES[f"LoRA-Pre Adam, recommended, later steps, {mesh}"], benchmark.KINDS[kind]
    )
    large = [each for each in found["operations"] if each["elements"] >= 16 * side]
    assert {each["kind"] for each in large} == {"all-reduce", "all-gather"}
    assert sum(each["elements"] for each in large) <= 4 * 16 * side + 64
    assert found["elements"] <= 4 * 16 * side + 8 * 16 * 16 + 64


@pytest.mark.parametrize("kind", benchmark.KINDS)
def test_muon_on_whole_matrices_moves_each_shard_four_times(kind):
    name = "8 layers: LoRA-Pre Muon, whole matrices"
    found = benchmark.measure(benchmark.CASES[name], benchmark.KINDS[kind])
    large = [each for each in found["operations"] if each["elements"] >= found["parameter"] // 100]
    assert [(each["kind"], each["times"]) for each in large] == [("all-to-all", 1)] * 4
    assert {each["elements"] for each in large} == {found["parameter"] // 8}
    # The rest is factors; on an Auto mesh some of the stack's sharding spreads to them.
    assert found["elements"] <= found["parameter"] // 2 + 8 * 2 * MOMENT


def adam(**options):
    options = {**lorapre.RECOMMENDED, **options}
    return lambda: lorapre.scale_by_lorapre_adam(grid.RANK, layout=grid.LAYOUT, **options)


# The share of all gradients that moves on Explicit and on Auto mesh axes. XLA shards some small things of its
# own accord on Auto axes, and gathers them.
SHARES = {
    "sinkhorn": (grid.DIRECTIONS["scale_by_sinkhorn"], 0.04, 0.07),
    "adam, first step": (adam(), 0.05, 0.09),
    "adam, later steps": (adam(initial_subspace="normal"), 0.04, 0.06),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sinkhorn", "explicit"),
        ("sinkhorn", "auto"),
        ("adam, first step", "explicit"),
        ("adam, later steps", "auto"),
        pytest.param("adam, first step", "auto", marks=pytest.mark.extended),
        pytest.param("adam, later steps", "explicit", marks=pytest.mark.extended),
    ],
)
def test_every_kind_of_parameter(name, kind):
    """The grid's parameters, sixteen times as wide: a small share of them moves."""
    make, *shares = SHARES[name]
    tx, paths, mesh = make(), grid.square_paths(), grid.mesh_of(kind)
    placed = grid.shardings(paths, mesh)

    def wide(path):
        shape = grid.PARAMETERS[path.partition("/")[2]][0]
        return jax.ShapeDtypeStruct(tuple(n * 16 if n >= 16 else n for n in shape), jnp.float32)

    plain = {path: wide(path) for path in paths}
    shardings = state_shardings(tx, plain, placed)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    params = jax.tree.map(place, plain, placed)
    state = jax.tree.map(place, jax.eval_shape(tx.init, plain), shardings)
    step = jax.jit(tx.update, out_shardings=(placed, shardings), compiler_options=grid.quick())
    total = sum(x.size for x in plain.values())
    share = dict(zip(("explicit", "auto"), shares, strict=True))[kind]
    assert 0 < moved(step.lower(params, state, params).compile().as_text()) <= share * total


def test_the_benchmark_writes_its_page(tmp_path):
    benchmark.main(["--cases", "SAGE", "--output", str(tmp_path)])
    page = (tmp_path / "collectives.md").read_text()
    assert "| SAGE | Explicit |" in page
    assert "python -m benchmarks.meshes.collectives --cases SAGE" in page
