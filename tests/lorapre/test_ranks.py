"""Ranks that save nothing are said once, in one line with counts; mappings that match nothing are errors."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

from layout_optax import state_bytes
from lorapre_optax import (
    RECOMMENDED,
    lorapre_adamw,
    lorapre_lion,
    lorapre_muon,
    lorapre_sgd,
    lorapre_sinkgd,
    low_rank_ema,
    resize_ranks,
    scale_by_lorapre_adam,
    suggest_ranks,
)

PARAMS = {
    "embed_tokens": {"embedding": jnp.ones((96, 32))},
    "layers": [
        {"q_proj": {"kernel": jnp.ones((32, 16))}, "up_proj": {"kernel": jnp.ones((32, 64))}}
        for _ in range(2)
    ],
    "norm": {"scale": jnp.ones(32)},
}
MATRICES = [
    lorapre_adamw,
    lorapre_lion,
    lorapre_muon,
    lorapre_sgd,
]


def said(tx, params=PARAMS):
    """The warnings of an init."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(tx.init, params)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("factory", MATRICES)
def test_one_line_with_counts(factory):
    assert said(factory(1e-3, 8)) == []
    assert said(factory(1e-3, 16)) == [
        "rank 16 saves nothing on 2 of 4 parameters: full moments take the place of factors (the first is "
        "'layers/0/q_proj/kernel' of shape (32, 16), where up to 10 would save)."
    ]
    (line,) = said(factory(1e-3, 1000))
    assert line.startswith("rank 1000 saves nothing on 4 of 4 parameters")


def test_tables_with_factors_count_too():
    (line,) = said(lorapre_sinkgd(1e-3, 24, **RECOMMENDED))
    assert "rank 24 saves nothing on 1 of 1 parameters" in line
    assert "'embed_tokens/embedding'" in line
    (line,) = said(lorapre_muon(1e-2, 4, table_rank=24))
    assert "rank 24 saves nothing on 1 of 1" in line


def test_the_bound_in_the_line_is_the_fallbacks():
    """Rank 10 on 32 x 16 saves state, rank 11 does not."""
    full, ten, eleven = (
        state_bytes(scale_by_lorapre_adam(rank), {"up": {"kernel": jnp.ones((32, 16))}})
        for rank in (None, 10, 11)
    )
    assert ten < full == eleven


def test_what_was_asked_for_is_not_warned_of():
    """No rank for a role, factors at any price, vectors, empty arrays."""
    assert said(lorapre_adamw(1e-3, None)) == []
    assert said(lorapre_adamw(1e-3, {"up_proj": 8})) == []
    assert said(low_rank_ema(0.9, 1000, full_rank_fallback=False)) == []
    assert (
        said(low_rank_ema(0.9, 4), {"scale": jnp.ones(3), "q": {"kernel": jnp.ones((0, 4))}}) == []
    )


def test_one_process_says_it_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            lorapre_adamw(1e-3, 999).init(PARAMS)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ({"nothing": 4}, r"key 'nothing' is no role .* and matches no parameter; the nearest path"),
        ({"matrx": 4}, r"key 'matrx' is no role .*; did you mean 'matrix'"),
        ({"matrix": 4, "layers/0/q_proj/kernl": 2}, "the nearest path is 'layers/0/q_proj/kernel'"),
        ({"q_(proj": 4}, r"'q_\(proj' is not a regular expression"),
        ({3: 4}, "key 3 is neither"),
        ({"norm": 4}, r"no key of \['norm'\] matches any of the 4 parameters"),
        ({"head": 4}, r"no key of \['head'\] .* such as 'layers/0/q_proj/kernel' of role 'matrix'"),
    ],
)
def test_a_mapping_that_matches_nothing_is_an_error(rank, message):
    for tx in (lorapre_adamw(1e-3, rank), lorapre_muon(1e-2, rank)):
        with pytest.raises(ValueError, match=message):
            tx.init(PARAMS)


def test_resizing_refuses_it_too():
    state = scale_by_lorapre_adam(4).init(PARAMS)
    with pytest.raises(ValueError, match=r"key 'nothing' is no role .* and matches no parameter"):
        resize_ranks(state, {"nothing": 2}, PARAMS)


def test_keys_of_others_leaves_are_no_mistake():
    """Suggested ranks name tables, which LoRA-Pre AdamW keeps full; a model may lack a role."""
    ranks = suggest_ranks(PARAMS, [PARAMS])
    assert "embed_tokens/embedding" in ranks
    state = lorapre_adamw(1e-3, ranks).init(PARAMS)
    factors = optax.tree.get(state[0].inner_states["matrix"], "mu").left
    assert factors["layers"][0]["q_proj"]["kernel"].shape == (1, 16)
    low_rank_ema(0.9, {"matrix": 4, "head": None}).init(PARAMS)


def test_suggesting_refuses_what_cannot_be_trained():
    params = {"q": {"kernel": jnp.ones((8, 8), jnp.complex64)}}
    with pytest.raises(TypeError, match="'q/kernel' has dtype complex64"):
        suggest_ranks(params, [params])
