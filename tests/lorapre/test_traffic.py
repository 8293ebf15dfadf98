"""Which arrays as large as a parameter LoRA-Pre's updates read and write on an accelerator; temporaries."""

from __future__ import annotations

import jax
import optax
import pytest

from benchmarks.accelerators.traffic import Move, moved_bytes
from layout_optax import ParamLayout
from lorapre_optax import RECOMMENDED, _solves, scale_by_lorapre_adam, scale_by_lorapre_muon
from tests.passes import Model

SHAPE, RANK = (2, 96, 160), 4
SIZE = 2 * 96 * 160


def traffic(tx, dtype: str) -> list[Move]:
    """What the update of a stack of kernels and its application move."""
    params = {"layers": {"kernel": jax.ShapeDtypeStruct(SHAPE, dtype)}}
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state)
        updates = jax.tree.map(lambda u: -1e-3 * u, updates)
        return optax.apply_updates(params, updates), state

    return Model(SIZE).count(step, params, state, params)


@pytest.mark.parametrize("options", [{}, RECOMMENDED], ids=["paper", "recommended"])
@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_adam_writes_two_products_the_absolute_gradient_and_the_parameters(dtype, width, options):
    found = traffic(scale_by_lorapre_adam(RANK, **options), dtype)
    written = [(move.name, move.writes) for move in found if move.writes]
    assert sorted(written) == [
        ("operand of a product", (width * SIZE,)),  # |G|, for the second moment's factors
        ("output", (width * SIZE,)),
        ("product", (width * SIZE,)),
        ("product", (width * SIZE,)),
    ]
    # Read: the gradient for |G|, two products and the rule, |G| twice, two products, the parameters.
    assert moved_bytes(found) == (9 + 4) * width * SIZE


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_muon_writes_products_what_it_iterates_on_and_the_parameters(dtype, width):
    found = traffic(scale_by_lorapre_muon(RANK, ns_steps=5), dtype)
    outside = [move for move in found if move.times == 1 and move.writes]
    assert [move.writes for move in outside] == [(width * SIZE,)] * 3  # B A, its start, parameters
    assert {move.times for move in found} == {1, 5}
    assert all(set(move.reads + move.writes) <= {width * SIZE} for move in found)
    # A round: the Gram matrix reads X, then comes its product with X, and the sum.
    rounds = [move for move in found if move.times == 5]
    assert sum(len(move.writes) for move in rounds) == 2


def temporaries(tx, dtype: str, leaves: int) -> float:
    """Bytes beside arguments and results, in the largest leaf in float32, for some leaves of one shape."""
    shape = (4, 64, 256)
    params = {f"w{i}": {"kernel": jax.ShapeDtypeStruct(shape, dtype)} for i in range(leaves)}
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    analysis = lowered.compile(options).memory_analysis()
    return analysis.temp_size_in_bytes / (4 * 4 * 64 * 256)


@pytest.mark.full_codegen
def test_temporaries_of_a_leaf_are_gone_before_those_of_the_next_one(monkeypatch):
    monkeypatch.setattr(_solves, "GROUP_BYTES", 1)  # a leaf at a time, as large leaves go
    tx = scale_by_lorapre_adam(8, layout=ParamLayout("matrix", (2,), (1,)), **RECOMMENDED)
    one, four = (temporaries(tx, "float32", leaves) for leaves in (1, 4))
    # Two products and the absolute gradient; with all leaves at once it was 4.5 and 6.4.
    assert one < 3
    assert four < 4
