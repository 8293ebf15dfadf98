"""LoRA-Pre Muon with a rule of its own for tables: Adafactor's, SAGE's, and what is refused."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorapre_optax
import sage_optax
from layout_optax import ParamLayout, adam_direction, by_role
from layout_optax.routing import OTHER
from tests import reference
from tests.lorapre.aliases import NOT_OURS, SHAPES, as_float32, draw, run

STEPS = 4


LAYOUTS = {"embed": ParamLayout("embedding", 0, 1), "lm_head": ParamLayout("head", 1, 0)}


@pytest.mark.parametrize("others", ["adamw", "sage"])
def test_only_embedding_and_head_get_it(others):
    params, gradients = as_float32(draw(1)), as_float32(draw(2))
    plain = lorapre_optax.lorapre_muon(1e-2, 2, others=others, layout=NOT_OURS)
    tx = lorapre_optax.lorapre_muon(
        1e-2, 2, others=others, table_rule="factored_rms", layout=NOT_OURS
    )
    theirs, _ = plain.update(gradients, plain.init(params), params)
    ours, state = tx.update(gradients, tx.init(params), params)
    for name in ("up", "norm", "odd"):
        chex.assert_trees_all_equal(ours[name], theirs[name])
    for name in ("embed", "lm_head"):
        (g,), (u,) = jax.tree.leaves(gradients[name]), jax.tree.leaves(ours[name])
        (wanted,) = reference.factored_rms_directions([g], LAYOUTS[name])
        np.testing.assert_allclose(u, -1e-2 * wanted, 1e-5, 1e-7)
    v, d = SHAPES["embed"]["embedding"]
    flat = jax.tree_util.tree_leaves_with_path(state)
    kept = [leaf for path, leaf in flat if "embed" in jax.tree_util.keystr(path) and leaf.ndim]
    assert sum(leaf.size for leaf in kept) == v + d


@pytest.mark.parametrize(("rule", "mu_dtype"), [("sage", None), ("sage_int8", "int8")])
def test_embedding_and_head_can_have_sage(rule, mu_dtype):
    """The same as the call of `by_role`, over steps; the recommended options give it a rate of its own."""
    params, gradients = as_float32(draw(1)), as_float32(draw(2, steps=STEPS))
    options = {**sage_optax.RECOMMENDED_WITH_MUON, "table_rule": rule}
    recommended = lorapre_optax.lorapre_muon(1e-2, layout=NOT_OURS, **options)
    sage = sage_optax.scale_by_sage(mu_dtype=mu_dtype, layout=NOT_OURS)
    muon = lorapre_optax.scale_by_lorapre_muon(
        None, nesterov=True, consistent_rms=0.2, layout=NOT_OURS
    )
    adam = adam_direction(b2=0.95)
    composed = by_role(
        {"embedding": sage, "matrix": muon, "vector": adam, OTHER: adam},
        1e-2,
        weight_decay=0.0,
        layout=NOT_OURS,
        learning_rate_multipliers=options["learning_rate_multipliers"],
    )
    ours, _, state = run(recommended, params, gradients)
    theirs, _, _ = run(composed, params, gradients)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)
    others = {**options, "table_rule": "others"}
    plain, _, _ = run(
        lorapre_optax.lorapre_muon(1e-2, layout=NOT_OURS, **others), params, gradients
    )
    assert np.abs(plain["lm_head"]["kernel"] - ours["lm_head"]["kernel"]).max() > 1e-3
    dtypes = {
        leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if "embed" in jax.tree_util.keystr(path) and leaf.shape == SHAPES["embed"]["embedding"]
    }
    assert dtypes == {jnp.dtype(mu_dtype or jnp.float32)}


def test_two_rules_for_tables_are_refused():
    with pytest.raises(ValueError, match=r"table_rank=4 and table_rule='factored_rms'.*give one"):
        lorapre_optax.lorapre_muon(1e-2, 2, table_rank=4, table_rule="factored_rms")
    with pytest.raises(ValueError, match="table_rule"):
        lorapre_optax.lorapre_muon(1e-2, 2, table_rule="adafactor")  # type: ignore[arg-type]


def test_the_recommended_options_move_tables_four_times_as_far():
    params, gradients = as_float32(draw(1)), as_float32(draw(2))
    recommended = {**lorapre_optax.RECOMMENDED_MUON, "rank": 2}
    tx = lorapre_optax.lorapre_muon(1e-2, layout=NOT_OURS, **recommended)
    updates, _ = tx.update(gradients, tx.init(params), params)
    for name in ("embed", "lm_head"):
        (g,), (u,) = jax.tree.leaves(gradients[name]), jax.tree.leaves(updates[name])
        (wanted,) = reference.factored_rms_directions([g], LAYOUTS[name])
        np.testing.assert_allclose(u, -4e-2 * wanted, 1e-5, 1e-7)
    matrix = np.asarray(updates["up"]["kernel"])
    assert np.sqrt(np.mean(matrix**2)) == pytest.approx(2e-3, rel=0.2)
