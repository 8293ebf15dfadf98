"""`describe` says which rank every parameter got, and where the full-rank fallback was taken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lorapre_optax import describe, lorapre_adamw, lorapre_sinkgd, scale_by_lorapre_adam

SHAPES = {
    "embed": {"embedding": (64, 16)},
    "layers": {"up": {"kernel": (3, 24, 40)}, "small": {"kernel": (3, 4, 6)}},
    "query": {"kernel": (24, 2, 20)},
    "norm": {"scale": (16,)},
}
PARAMS = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
)


def ranks(tx):
    lines = [line.split(" | ") for line in describe(PARAMS, tx).splitlines()]
    column = [cell.strip() for cell in lines[0]].index("rank")
    return {line[0].strip(): line[column].strip() for line in lines[1:-2]}


@pytest.mark.parametrize(
    ("tx", "embedding", "up", "small"),
    [
        (lorapre_adamw(1e-3, 4), "full", "4", "full-rank fallback"),
        (lorapre_adamw(1e-3, 99), "full", "full-rank fallback", "full-rank fallback"),
        (lorapre_sinkgd(1e-3, 4), "4", "-", "-"),
        (scale_by_lorapre_adam(14), "full-rank fallback", "14", "full-rank fallback"),
    ],
    ids=["adamw", "rank too large", "sinkgd", "bare direction"],
)
def test_rank_of_every_parameter(tx, embedding, up, small):
    found = ranks(tx)
    assert found["embed/embedding"] == embedding
    assert found["layers/up/kernel"] == found["query/kernel"] == up
    assert found["layers/small/kernel"] == small
    assert found["norm/scale"] == "-"
