"""The pure training step: accumulation, clipping, the schedule, one compile, and its statistics."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama.reporting.clock import StepClock
from examples.llama.training.step import (
    StepRecord,
    accumulated_gradients,
    init_state,
    make_evaluation,
    make_train_step,
    warmup_cosine,
)
from examples.llama.training.step_statistics import (
    damper_statistics,
    low_rank_statistics,
    make_statistics,
    sage_states,
    update_statistics,
)
from lorapre_optax import lorapre_metrics, scale_by_lorapre_adam
from sage_optax import sage_damper, scale_by_sage


def quadratic(params, tokens):
    """A loss that depends on every sequence, with a weight that differs between sequences."""
    x = tokens.astype(jnp.float32)
    weights = (x > 0).astype(jnp.float32)
    count = jnp.sum(weights)
    return jnp.sum(weights * (params["w"] * x - params["b"]) ** 2) / jnp.maximum(count, 1), count


PARAMS = {"w": jnp.asarray([0.3, -0.2, 0.5]), "b": jnp.asarray([1.0, 2.0, 3.0])}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 5, (8, 3)))


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_equals_the_big_batch_where_parts_have_unequal_counts(accumulate):
    assert len(set(np.sum(np.asarray(TOKENS) > 0, axis=1))) > 1
    loss, gradients = accumulated_gradients(quadratic, PARAMS, TOKENS)
    parts_loss, parts = accumulated_gradients(quadratic, PARAMS, TOKENS, accumulate)
    np.testing.assert_allclose(parts_loss, loss, rtol=1e-6)
    for name in PARAMS:
        np.testing.assert_allclose(parts[name], gradients[name], rtol=1e-5)


def test_accumulators_are_float32_for_bfloat16_parameters():
    def linear(w, tokens):
        return w * jnp.mean(tokens.astype(w.dtype)), jnp.ones((), jnp.float32)

    # In bfloat16 a running sum of ones stops at 256.
    ones, w = jnp.ones((512, 1), jnp.int32), jnp.ones((), jnp.bfloat16)
    _, gradient = accumulated_gradients(linear, w, ones, 512)
    assert gradient.dtype == jnp.bfloat16
    assert float(gradient) == 1.0


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="8 sequences does not divide into 3 parts"):
        accumulated_gradients(quadratic, PARAMS, TOKENS, 3)


def test_clipping_happens_before_the_optimizer_and_the_norm_reported_is_unclipped():
    step = make_train_step(quadratic, optax.sgd, optax.constant_schedule(1.0), clip_norm=0.01)
    state = init_state(PARAMS, optax.sgd)
    _, gradients = accumulated_gradients(quadratic, PARAMS, TOKENS)
    new, metrics, _ = jax.jit(step)(state, TOKENS, 2.0)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(gradients), rtol=1e-6)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, new.params, PARAMS))
    np.testing.assert_allclose(moved, 2.0 * 0.01, rtol=1e-4)
    assert int(new.step) == 1


def test_the_learning_rate_reported_is_the_one_applied():
    schedule = warmup_cosine(steps=10, warmup_steps=2, final_fraction=0.0)
    step = jax.jit(make_train_step(quadratic, optax.sgd, schedule))
    state = init_state(PARAMS, optax.sgd)
    for count in range(3):
        _, gradients = accumulated_gradients(quadratic, state.params, TOKENS)
        old = state.params
        state, metrics, _ = step(state, TOKENS, 0.01)
        np.testing.assert_allclose(metrics.learning_rate, 0.01 * schedule(count), rtol=1e-6)
        np.testing.assert_allclose(
            state.params["w"], old["w"] - metrics.learning_rate * gradients["w"], rtol=1e-5
        )


def test_schedule_warms_up_to_the_peak_and_ends_at_its_fraction():
    rates = [float(warmup_cosine(100, 10, 0.1)(count)) for count in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == max(rates) == pytest.approx(1.0)
    assert np.all(np.diff(rates[:11]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)
    assert rates[100] == pytest.approx(0.1)
    assert float(warmup_cosine(4, 0, 0.0)(0)) == 1.0


def test_evaluation_is_the_mean_over_tokens_not_over_batches():
    evaluate = make_evaluation(quadratic)
    zero = jnp.zeros(())
    sums = evaluate(PARAMS, TOKENS[5:], evaluate(PARAMS, TOKENS[:5], (zero, zero)))
    expected, count = quadratic(PARAMS, TOKENS)
    np.testing.assert_allclose(sums[0] / sums[1], expected, rtol=1e-6)
    assert float(sums[1]) == float(count)


def test_update_statistics_pool_all_parameters_of_a_role():
    params = {
        "norm": {"scale": jnp.full(4, 2.0)},
        "layers": {"input_layernorm": {"scale": jnp.full((3, 4), 2.0)}},
        "up": {"kernel": jnp.zeros((4, 8))},
    }
    updates = {
        "norm": {"scale": jnp.full(4, -1.0)},
        "layers": {"input_layernorm": {"scale": jnp.zeros((3, 4))}},
        "up": {"kernel": jnp.full((4, 8), 0.25).at[0, 0].set(-3.0)},
    }
    numbers = jax.jit(update_statistics)(params, updates)
    assert float(numbers["update/vector/rms"]) == pytest.approx(math.sqrt(4 / 16))
    assert float(numbers["update/vector/max"]) == 1.0
    assert float(numbers["update/vector/relative"]) == pytest.approx(0.25)
    assert float(numbers["update/matrix/max"]) == 3.0
    # Parameters that are all zero do not make the ratio infinite.
    assert float(numbers["update/matrix/relative"]) == float(numbers["update/matrix/rms"])


def hybrid_like():
    """SAGE on tables and vectors inside the wrappers that the hybrids use."""
    labels = {"embed": "sage", "norm": {"scale": "sage"}, "up": {"kernel": "plain"}}
    sage = optax.chain(scale_by_sage(), optax.scale_by_learning_rate(1e-2))
    return optax.partition({"sage": sage, "plain": optax.sgd(1e-2)}, labels)


def test_damper_statistics_find_sage_inside_a_partition():
    params = {
        "embed": jnp.ones((6, 4)),
        "norm": {"scale": jnp.ones(4)},
        "up": {"kernel": jnp.ones((4, 8))},
    }
    gradients = jax.tree.map(jnp.ones_like, params)
    # One loud column is damped; the vector's gradient is so small that eps damps it.
    gradients["embed"] = gradients["embed"].at[:, 0].set(10.0)
    gradients["norm"]["scale"] = jnp.full(4, 1e-8)
    tx = hybrid_like()
    old = tx.init(params)
    _, new = tx.update(gradients, old, params)
    assert len(list(sage_states(old))) == 1
    numbers = jax.jit(damper_statistics)(gradients, old, new)

    state = next(sage_states(old))
    masked = {**gradients, "up": {"kernel": optax.MaskedNode()}}
    damper = sage_damper(masked, state)
    assert float(numbers["damper/embedding/min"]) == pytest.approx(float(damper["embed"].min()))
    assert float(numbers["damper/embedding/mean"]) == pytest.approx(float(damper["embed"].mean()))
    assert float(numbers["damper/embedding/damped_share"]) == 0.25
    assert float(numbers["damper/embedding/small_scale_share"]) == 0.0
    assert float(numbers["damper/vector/mean"]) == pytest.approx(0.5, rel=1e-3)
    assert float(numbers["damper/vector/small_scale_share"]) == 1.0
    assert not any("matrix" in name for name in numbers)


def test_damper_statistics_are_empty_without_a_damper():
    params = {"embed": jnp.ones((6, 4))}
    for tx in (optax.adamw(1e-3), scale_by_sage(damper=None)):
        state = tx.init(params)
        assert damper_statistics(params, state, state) == {}


def test_low_rank_statistics_summarise_each_stack():
    params = {"layers": {"up": {"kernel": jnp.ones((3, 12, 16))}}, "norm": {"scale": jnp.ones(12)}}
    gradients = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32), params
    )
    tx = optax.chain(scale_by_lorapre_adam(2), optax.scale_by_learning_rate(1e-2))
    update = jax.jit(tx.update)
    _, old = update(gradients, tx.init(params), params)
    updates, new = update(gradients, old, params)
    record = StepRecord(params, updates, gradients, old, new)
    numbers = jax.jit(make_statistics())(record)
    path = "lorapre/layers/up/kernel"
    found = lorapre_metrics(old, gradients, updates)["layers/up/kernel"]
    share = np.asarray(found["energy_share"])
    assert share.shape == (3,)
    assert float(numbers[f"{path}/energy_share"]) == pytest.approx(share.mean(), rel=1e-4)
    assert float(numbers[f"{path}/energy_share_min"]) == pytest.approx(share.min(), rel=1e-4)
    own = np.asarray(updates["layers"]["up"]["kernel"], np.float64)
    rms = float(np.sqrt(np.mean(own**2)))
    assert float(numbers[f"{path}/update_rms"]) == pytest.approx(rms, rel=1e-5)
    assert float(numbers[f"{path}/update_max"]) == pytest.approx(np.abs(own).max())
    assert {name for name in numbers if name.startswith("lorapre/")} == {
        f"{path}/{key}" for key in ("energy_share", "energy_share_min", "update_rms", "update_max")
    }
    plain = optax.adamw(1e-3).init(params)
    assert low_rank_statistics(gradients, plain, updates) == {}


def test_clock_leaves_pauses_out_and_prefers_ordinary_steps(monkeypatch):
    now = iter([0.0, 2.0, 10.0, 16.0, 16.0, 17.0])
    monkeypatch.setattr("examples.llama.reporting.clock.time.perf_counter", lambda: next(now))
    clock = StepClock()
    assert clock.median() is None
    for steps, ordinary in ((2, True), (1, False), (1, True)):
        clock.start()
        for _ in range(steps):
            clock.count()
        clock.stop(ordinary=ordinary)
    assert (clock.seconds, clock.steps) == (9.0, 4)
    assert clock.median() == 1.0
    assert clock.interval() == (9.0, 4)
    assert clock.interval() == (0.0, 0)


def test_record_fields_are_what_the_optimizer_saw():
    seen = {}

    def statistics(record):
        seen.update(record._asdict())
        return {"gradient_norm": optax.tree.norm(record.gradients)}

    step = make_train_step(
        quadratic,
        optax.sgd,
        optax.constant_schedule(1.0),
        clip_norm=0.5,
        statistics=statistics,
    )
    _, _, numbers = step(init_state(PARAMS, optax.sgd), TOKENS, 0.1)
    assert float(numbers["gradient_norm"]) == pytest.approx(0.5, rel=1e-5)
    np.testing.assert_allclose(seen["updates"]["w"], -0.1 * seen["gradients"]["w"], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(bad):
    def loss(params, tokens):
        poison = jnp.where(tokens[0, 0] < 0, bad, 1.0)
        value, count = quadratic(params, jnp.abs(tokens))
        return poison * value, count

    schedule = warmup_cosine(steps=10, warmup_steps=4, final_fraction=0.0)
    step = jax.jit(make_train_step(loss, optax.adam, schedule, clip_norm=1.0), donate_argnums=0)
    clean, poisoned = (init_state(jax.tree.map(jnp.copy, PARAMS), optax.adam) for _ in range(2))
    rates = []
    for _ in range(2):
        clean, _, _ = step(clean, TOKENS, 0.1)
    for tokens in (TOKENS, -TOKENS - 1, -TOKENS - 1, TOKENS):
        poisoned, metrics, _ = step(poisoned, tokens, 0.1)
        rates.append((float(metrics.learning_rate), bool(metrics.skipped)))
        assert bool(metrics.skipped) != math.isfinite(metrics.loss)
    for one, other in zip(*map(jax.tree.leaves, (clean[:2], poisoned[:2])), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (int(poisoned.step), int(poisoned.skipped)) == (4, 2)
    # The rate goes on where the last update left it, as the optimizer's own count does.
    assert [skipped for _, skipped in rates] == [False, True, True, False]
    np.testing.assert_allclose(rates[-1][0], 0.1 * schedule(1), rtol=1e-6)
    assert rates[1][0] == rates[3][0]
