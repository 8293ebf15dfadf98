"""LoRA-Pre Adam against golden data, the float64 reference, optax, and the facts of the specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layout_optax import ParamLayout
from lorapre_optax import lorapre_adamw, scale_by_lorapre_adam
from tests import reference_lorapre as reference
from tests.lorapre.common import KERNEL, LAYOUTS, TORCH, apart, golden, run, run_tree, signal


def golden_adam(name, layout, dtype, **options):
    data, meta = golden(name)
    grads = data["grads"] if layout == TORCH else data["grads"].swapaxes(1, 2)
    options = {
        "damping": meta["damping"],
        "damping_kind": meta["damping_kind"].split(":")[0],
        "full_rank_fallback": False,
        "layout": layout,
    } | options
    tx = scale_by_lorapre_adam(meta["rank"], meta["b1"], meta["b2"], meta["eps"], **options)
    state = jax.jit(tx.init)(jnp.asarray(grads[0], dtype))
    start = lambda moment, key: moment._replace(right=jnp.asarray(data[key], dtype))  # noqa: E731
    state = state._replace(mu=start(state.mu, "mA0"), nu=start(state.nu, "vA0"))
    out, state = run(tx, grads, state, dtype)
    return (out if layout == TORCH else out.swapaxes(1, 2)), state, data


@pytest.mark.parametrize("name", ["adam_relative", "adam_absolute"])
@pytest.mark.parametrize(
    ("layout", "dtype", "tolerance"),
    [(TORCH, "float64", 1e-9), (KERNEL, "float64", 1e-9), (KERNEL, "float32", 1e-4)],
)
def test_golden(name, layout, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        directions, state, data = golden_adam(name, layout, dtype)
        factors = jax.tree.map(lambda x: np.asarray(x, np.float64), state)
    assert apart(directions, data["directions"]) < tolerance
    if dtype == "float64":
        for step, expected in zip(directions, data["directions"], strict=True):
            assert apart(step, expected) < tolerance
    for moment, left, right in ((factors.mu, "mB", "mA"), (factors.nu, "vB", "vA")):
        assert apart(moment.left.T @ moment.right, data[left] @ data[right]) < tolerance
        if name == "adam_absolute":  # no balancing: the factors themselves
            assert apart(moment.left.T, data[left]) < tolerance
            assert apart(moment.right, data[right]) < tolerance


@pytest.mark.parametrize(
    "wrong", [{"bias_correction": "exact"}, {"second_moment": "full"}], ids=str
)
def test_golden_refuses_other_options(wrong):
    directions, _, data = golden_adam("adam_relative", TORCH, "float32", **wrong)
    assert apart(directions, data["directions"]) > 1e-2


def test_golden_refuses_wrong_couplings():
    data, meta = golden("adam_relative")
    numbers = {"gamma1": 1 - 0.9**0.5, "gamma2": 1 - 0.95**0.25, "damping": 1e-6, "residual": 0.0}
    grads = jnp.asarray(data["grads"], jnp.float32)

    @jax.jit
    def directions(numbers):
        tx = scale_by_lorapre_adam(6, full_rank_fallback=False, layout=TORCH, **numbers)
        start = tx.init(grads[0])
        mu = start.mu._replace(right=jnp.asarray(data["mA0"], jnp.float32))
        nu = start.nu._replace(right=jnp.asarray(data["vA0"], jnp.float32))
        step = lambda state, g: tuple(reversed(tx.update(g, state)))  # noqa: E731
        return jax.lax.scan(step, start._replace(mu=mu, nu=nu), grads)[1]

    assert meta["rank"] == 6
    assert apart(directions(numbers), data["directions"]) < 1e-4
    for name, value in (
        ("gamma1", 1 - 0.9),
        ("gamma2", 1 - 0.95),
        ("gamma2", 1 - 0.95**0.5),
        ("residual", 0.9),
        ("damping", 1e-2),
    ):
        assert apart(directions(numbers | {name: value}), data["directions"]) > 1e-2, (name, value)


def wrong_order(data, meta, reading):
    """Misreadings of Algorithm 1 found in public code, in NumPy."""
    mA, vA = data["mA0"], data["vA0"]
    mB, vB = np.zeros_like(data["mB"]), np.zeros_like(data["vB"])
    b1, b2 = meta["b1"], meta["b2"]
    out = []
    for t, G in enumerate(data["grads"], 1):
        old = mB @ mA, vB @ vA
        step = lambda g, B, A, rate: reference.newton_step(g, B, A, rate, meta["damping"])  # noqa: E731
        if reading == "sequential factors":
            new_B, _ = step(G, mB, mA, 1 - b1**0.5)
            _, mA = step(G, new_B, mA, 1 - b1**0.5)
            mB = new_B
        else:
            mB, mA = step(G, mB, mA, 1 - b1**0.5)
        v_target = G**2 if reading == "factors of G^2" else np.abs(G)
        vB, vA = step(v_target, vB, vA, 1 - b2**0.25)
        past = (mB @ mA, vB @ vA) if reading == "new factors" else old
        weight = (0, 0) if reading == "no fresh gradient" else (1 - b1, 1 - b2)
        m = b1 * past[0] + weight[0] * G
        v_past = np.abs(past[1]) if reading == "factors of G^2" else past[1] ** 2
        v = b2 * v_past + weight[1] * G**2
        out.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + meta["eps"]))
    return np.stack(out)


@pytest.mark.parametrize(
    "reading", ["new factors", "no fresh gradient", "factors of G^2", "sequential factors"]
)
def test_golden_refuses_wrong_orders(reading):
    data, meta = golden("adam_relative")
    assert apart(wrong_order(data, meta, "none"), data["directions"]) < 1e-9
    assert apart(wrong_order(data, meta, reading), data["directions"]) > 1e-2


@pytest.mark.parametrize("exact", [False, True], ids=["paper", "exact"])
def test_equals_the_reference_on_any_layout(exact):
    some = dict(list(LAYOUTS.items())[-3:]) if exact else LAYOUTS
    layouts = {name: layout.resolve(len(shape)) for name, (shape, layout) in some.items()}
    grads = {name: signal(shape, layouts[name]) for name, (shape, _) in some.items()}
    tx = scale_by_lorapre_adam(
        2,
        bias_correction="exact" if exact else "paper",
        full_rank_fallback=False,
        layout=layouts,
    )
    with jax.enable_x64(True):
        state = jax.jit(tx.init)({name: jnp.zeros(shape) for name, (shape, _) in some.items()})
        out = run_tree(tx, grads, state)
    for name, layout in layouts.items():
        ndim = len(LAYOUTS[name][0])
        rights = [
            reference.factor_matrices(moment.right[name], layout, ndim, "right")
            for moment in (state.mu, state.nu)
        ]
        expected, _ = reference.adam(grads[name], *rights, layout, exact=exact)
        assert apart(out[name], expected) < 1e-9, name


@pytest.mark.parametrize("mode", ["faithful", "options", "full"])
def test_step_one_is_adams_and_full_moments_are_adam(mode):
    some = {name: LAYOUTS[name] for name in ("matrix", "layers on axis 1, output")}
    grads = {name: signal(shape, layout)[:4] for name, (shape, layout) in some.items()}
    grads["norm"] = {"scale": np.ones((4, 5)) * np.arange(4)[:, None]}
    layouts = {name: layout for name, (_, layout) in some.items()} | {"norm": None}
    steps = 4 if mode == "full" else 1
    grads = jax.tree.map(lambda g: jnp.asarray(g[:steps], jnp.float32), grads)
    params = jax.tree.map(lambda g: g[0], grads)
    options = {"residual": 0.9, "bias_correction": "exact", "initial_subspace": "gradient"}
    tx = scale_by_lorapre_adam(
        None if mode == "full" else 2,
        full_rank_fallback=False,
        layout=layouts,
        **(options if mode == "options" else {}),
    )
    out = run_tree(tx, grads, jax.jit(tx.init)(params))
    adam = optax.scale_by_adam(0.9, 0.95)
    expected = run_tree(adam, grads, adam.init(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), out, expected)


def test_direction_is_scale_equivariant():
    grads = signal((12, 20), KERNEL, steps=10)
    tx = scale_by_lorapre_adam(3, eps=1e-30)
    init = jax.jit(tx.init)(jnp.zeros((12, 20)))
    out, _ = run(tx, grads, init)
    for c in (2.0**-20, 2.0**10):
        scaled, _ = run(tx, c * grads, init)
        np.testing.assert_allclose(scaled, out, rtol=1e-5)


def test_bound_scale_and_memory_options():
    grads = {"kernel": signal((24, 40), KERNEL), "norm": {"scale": np.ones((12, 40))}}
    grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
    params = jax.tree.map(lambda g: g[0], grads)

    def directions(**options):
        tx = scale_by_lorapre_adam(2, **options)
        return run_tree(tx, grads, jax.jit(tx.init)(params))

    free, bounded, scaled = directions(), directions(bound=1.0), directions(scale=0.25)
    assert np.abs(free["kernel"]).max() > 1.5
    np.testing.assert_allclose(bounded["kernel"], np.clip(free["kernel"], -1, 1), rtol=1e-5)
    np.testing.assert_allclose(scaled["kernel"], free["kernel"] / 4, rtol=1e-5)
    np.testing.assert_array_equal(scaled["norm"]["scale"], free["norm"]["scale"])

    state = jax.eval_shape(scale_by_lorapre_adam(2, second_moment="full").init, params)
    assert state.nu.full["kernel"].shape == (24, 40)
    assert state.mu.left["kernel"].shape == (2, 40)
    state = jax.eval_shape(scale_by_lorapre_adam(2, factor_dtype=jnp.bfloat16).init, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {
        jnp.dtype("bfloat16"),
        jnp.dtype("int32"),
    }


def test_exact_bias_correction_is_exact_on_a_constant_gradient():
    rng = np.random.default_rng(0)
    g = np.outer(rng.uniform(1, 2, 12), rng.uniform(1, 2, 16))
    params = jnp.zeros((12, 16))
    ratios = {}
    for kind in ("paper", "exact"):
        tx = scale_by_lorapre_adam(2, b2=0.999, bias_correction=kind, full_rank_fallback=False)
        out, _ = run(tx, [g] * 63, jax.jit(tx.init)(params))
        ratios[kind] = np.abs(out[-1]).mean()
    assert abs(ratios["exact"] - 1) < 0.06
    assert ratios["paper"] > 4  # v is 0.03 of the truth at t = 63, the specification says


def test_rates_decay_and_routing_of_the_alias():
    shapes = {
        "embed": {"embedding": (10, 6)},
        "mlp": {"kernel": (24, 40)},
        "norm": {"scale": (6,)},
        "lm_head": {"kernel": (6, 10)},
    }
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    tx = lorapre_adamw(
        1e-3,
        4,
        weight_decay=0.1,
        weight_decay_mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
        embedding_learning_rate=2e-3,
        head_learning_rate=optax.constant_schedule(3e-3),
        vector_learning_rate=4e-3,
    )
    updates, state = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
    rates = jax.tree.map(lambda u: float(-u.ravel()[0]), updates)
    np.testing.assert_allclose(
        [rates["mlp"]["kernel"], rates["embed"]["embedding"], rates["lm_head"]["kernel"]],
        [1.1e-3, 2.2e-3, 3.3e-3],
        rtol=1e-5,
    )
    np.testing.assert_allclose(rates["norm"]["scale"], 4e-3, rtol=1e-5)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert sizes == sorted([4 * 24, 4 * 40] * 2 + [60] * 4 + [6] * 2)

    sage = lorapre_adamw(1e-3, 4, others="sage")
    plain = lorapre_adamw(1e-3, 4)
    count = lambda t: sum(x.size for x in jax.tree.leaves(jax.eval_shape(t.init, params)))  # noqa: E731
    assert count(sage) < count(plain)


def test_not_ours_gets_adamw_and_passes_through_the_bare_direction():
    layout = {"a": ParamLayout("matrix", (1,), (0,)), "b": optax.MaskedNode()}
    params = {"a": jnp.ones((24, 40)), "b": 3 * jnp.ones((24, 40))}
    tx = scale_by_lorapre_adam(4, layout=layout)
    updates, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params))
    np.testing.assert_array_equal(updates["b"], params["b"])
    tx = lorapre_adamw(1e-3, 4, layout=layout)
    updates, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
    np.testing.assert_allclose(updates["b"], -1e-3, rtol=1e-5)


def test_schedules_for_every_number():
    constant = optax.constant_schedule
    numbers = {"b1": 0.8, "b2": 0.9, "eps": 1e-6, "scale": 0.5, "bound": 2.0, "residual": 0.5}
    grads = signal((12, 20), KERNEL, steps=4)
    outs = []
    for tx in (
        scale_by_lorapre_adam(3, **numbers),
        scale_by_lorapre_adam(3, **{k: constant(v) for k, v in numbers.items()}),
    ):
        outs.append(run(tx, grads, jax.jit(tx.init)(jnp.zeros((12, 20))))[0])
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-5)
