"""Keys of a `rank` mapping that match nothing are errors at init; those for roles without factors warn."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import pytest

from layout_optax import LayoutWarning, doubts
from lorapre_optax import lorapre_adamw, lorapre_muon, lorapre_sgd, lorapre_sinkgd, low_rank_ema

PARAMS = {
    "embed": {"embedding": jax.ShapeDtypeStruct((64, 16), jnp.float32)},
    "up": {"kernel": jax.ShapeDtypeStruct((16, 40), jnp.float32)},
    "norm": {"scale": jax.ShapeDtypeStruct((16,), jnp.float32)},
}
MODELS = [lorapre_adamw, lorapre_muon, lorapre_sgd, lorapre_sinkgd]


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(doubts, "_SAID", set())


@pytest.mark.parametrize("make", [*MODELS, low_rank_ema], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("nothing", "matches no parameter; the nearest path is"),
        ("matrices", "is no role (embedding, head, matrix, vector)"),
        ("matrx", "did you mean 'matrix'"),
        ("up/kernal", "the nearest path is 'up/kernel'"),
        ("up/(", "is not a regular expression"),
    ],
)
def test_a_key_that_matches_nothing_is_an_error(make, key, said):
    tx = make(0.5, rank={key: 4})
    with pytest.raises(ValueError, match="rank: ") as error:
        jax.eval_shape(tx.init, PARAMS)
    assert repr(key) in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_key_for_other_roles_warns(make):
    key = "^up/" if make is lorapre_sinkgd else "^embed/"
    tx = make(0.5, rank={key: 4, "matrix": 4, "embedding": 4})
    with pytest.warns(LayoutWarning, match="that get no factors here"):
        jax.eval_shape(tx.init, PARAMS)


def test_roles_paths_and_matching_patterns_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A role that this model has not, a whole path as `suggest_ranks` gives it, None for a table.
        rank = {"head": None, "embed/embedding": 4, "^embed/": None, "norm|up": 4, "matrix": 4}
        jax.eval_shape(lorapre_adamw(1e-3, rank=rank).init, PARAMS)
