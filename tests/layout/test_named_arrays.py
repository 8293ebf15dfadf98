"""``unboxed`` around Haliax arrays, which a stand-in plays: names of the state, and rules by missing keys.

The real ones train in tests/frameworks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorapre_optax
import sage_optax
from layout_optax import describe, unboxed


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Named:
    """An array with a name for each axis, which gives its child no key."""

    array: Any
    axis_names: tuple[str, ...]

    def tree_flatten(self):
        return (self.array,), self.axis_names

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(children[0], names)


LEAVES = {
    "token_embeddings": ((16, 8), ("vocab", "embed")),
    "o_proj": ((8, 4, 8), ("embed", "heads", "head_size")),  # (out, in, in) of Haliax alone
    "norm": ((8,), ("embed",)),
}


def draw(seed):
    generator = np.random.default_rng(seed)
    return {
        name: {"weight": Named(jnp.asarray(generator.normal(size=shape), jnp.float32), names)}
        for name, (shape, names) in LEAVES.items()
    }


def names(state):
    """The names on the arrays of the state, by shape."""
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Named))
    return {node.array.shape: node.axis_names for node in leaves if isinstance(node, Named)}


OPTIMIZERS = {
    "sage_hybrid": (
        lambda: sage_optax.sage_hybrid(1e-2),
        {(16, 8): ("vocab", "embed"), (8,): ("embed",)},
    ),
    "lorapre_adamw": (
        lambda: lorapre_optax.lorapre_adamw(1e-2, 2, full_rank_fallback=False),
        {
            (2, 8): ("state_0", "embed"),  # eight devices: a rank of two is not cut
            (4, 2, 8): ("heads", "state_1", "head_size"),
            (16, 8): ("vocab", "embed"),
            (8,): ("embed",),
        },
    ),
    "lorapre_muon": (
        lambda: lorapre_optax.lorapre_muon(1e-2, 8, full_rank_fallback=False),
        {
            (8, 8): (
                "heads",
                "embed",
            ),  # the first axis that the factor lacks, not the one as long as the rank
            (4, 8, 8): ("heads", "embed", "head_size"),
            (16, 8): ("vocab", "embed"),
            (8,): ("embed",),
        },
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:rank .* saves nothing:UserWarning")
def test_every_array_of_the_state_has_names_that_apply(name):
    make, expected = OPTIMIZERS[name]
    tx, params = unboxed(make()), draw(0)
    state = tx.init(params)
    assert names(state) == expected
    update = jax.jit(tx.update)
    plain, bare = make(), make().init(params)
    for seed in (1, 2):
        updates, state = update(draw(seed), state, params)
        same, bare = jax.jit(plain.update)(draw(seed), bare, params)
        chex.assert_trees_all_close(updates, same, rtol=1e-6)  # with the parameters' names
    assert names(state) == expected
    chex.assert_trees_all_close(jax.tree.leaves(state), jax.tree.leaves(bare), rtol=1e-6)


def test_rules_still_know_haliax():
    table = describe(draw(0), unboxed(sage_optax.sage_hybrid(1e-2)))
    (row,) = [line for line in table.splitlines() if line.startswith("o_proj/weight")]
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["matrix", "0", "1,2"]
    assert "sinkgd" in row
