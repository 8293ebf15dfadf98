"""APOLLO, APOLLO-Mini and Fira against their papers' rules in float64 NumPy, matrix by matrix."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.baselines import apollo, apollo_mini, fira, scale_by_apollo, scale_by_fira
from benchmarks.baselines.apollo import projection
from layout_optax import ParamLayout, state_bytes

B1, B2, EPS = 0.9, 0.99, 1e-8
STEPS, RANK = 7, 3
KERNEL, STACK = ParamLayout("matrix", (1,), (0,)), ParamLayout("matrix", (2,), (1,))
# Flax kernels (in, out): tall, wide and square seen as (out, in), and a stack of tall ones.
SHAPES = {"wide": (12, 7), "tall": (7, 12), "square": (6, 6), "layers": (3, 5, 8)}
LAYOUTS = {name: STACK if name == "layers" else KERNEL for name in SHAPES}
PARAMS = {name: np.zeros(shape) for name, shape in SHAPES.items()}


def gradients(seed: int = 0):
    """Gradients whose size jumps, so that the limiter acts."""
    rng = np.random.default_rng(seed)
    sizes = (1.0, 1.5, 0.1, 30.0, 0.2, 5.0, 1.0)
    return [
        {name: size * rng.standard_normal(shape) for name, shape in SHAPES.items()}
        for size in sizes
    ]


def run(tx, grads):
    """Directions and states of all steps in float64."""
    with jax.enable_x64(True):
        state = tx.init(jax.tree.map(jnp.asarray, PARAMS))
        update = jax.jit(tx.update)
        found, states = [], []
        for g in grads:
            direction, state = update(jax.tree.map(jnp.asarray, g), state)
            found.append(jax.tree.map(np.asarray, direction))
            states.append(jax.tree.map(np.asarray, state))
    return found, states


def matrices_of(name, grads):
    """Each matrix of a leaf as its gradients (out, in) over time."""
    if name == "layers":
        return {(i,): [g[name][i].T for g in grads] for i in range(SHAPES[name][0])}
    return {(): [g[name].T for g in grads]}


class Adam:
    def __init__(self):
        self.m = self.v = 0.0
        self.t = 0

    def __call__(self, r):
        self.t += 1
        self.m = B1 * self.m + (1 - B1) * r
        self.v = B2 * self.v + (1 - B2) * r**2
        hat = self.m / (1 - B1**self.t), self.v / (1 - B2**self.t)
        return hat[0] / (np.sqrt(hat[1]) + EPS)


class Limiter:
    """Norms may grow by a factor of 1.01 a step; nothing is limited in the first."""

    def __init__(self):
        self.before = None

    def __call__(self, x):
        norm = np.linalg.norm(x)
        if self.before is not None:
            x = x / (max(norm / (self.before + 1e-8), 1.01) / 1.01)
        self.before = np.linalg.norm(x)
        return x


def reference_apollo(grads, matrix_of_step, scale, tensorwise):
    adam, limit, out = Adam(), Limiter(), []
    for step, g in enumerate(grads):
        rows, columns = g.shape
        p = matrix_of_step(step)
        r = g @ p if rows >= columns else p.T @ g
        n = adam(r)
        if tensorwise:
            s = np.linalg.norm(n) / (np.linalg.norm(r) + 1e-8)
        else:  # a channel of the larger side
            axis = 1 if rows >= columns else 0
            s = np.linalg.norm(n, axis=axis, keepdims=True)
            s = s / (np.linalg.norm(r, axis=axis, keepdims=True) + 1e-8)
        out.append(limit(g * s * np.sqrt(scale)))
    return out


def reference_fira(grads, alpha, gap, projector_of_step):
    adam, limit, out = Adam(), Limiter(), []
    p = None
    for step, g in enumerate(grads):
        right = g.shape[0] >= g.shape[1]
        if step % gap == 0:
            u, _, vt = np.linalg.svd(g, full_matrices=False)
            p = vt[:RANK].T if right else u[:, :RANK]
            # The signs of singular vectors are LAPACK's choice, and the moments remember them.
            signs = np.sum(p * projector_of_step(step), axis=0)
            np.testing.assert_allclose(np.abs(signs), 1.0, rtol=1e-9)
            p = p * np.sign(signs)
        r = g @ p if right else p.T @ g
        n = adam(r)
        low, back = (n @ p.T, r @ p.T) if right else (p @ n, p @ r)
        axis = 1 if r.shape[0] > r.shape[1] else 0
        phi = np.linalg.norm(n, axis=axis, keepdims=True)
        phi = phi / (np.linalg.norm(r, axis=axis, keepdims=True) + 1e-8)
        out.append(alpha * low + limit(phi * (g - back)))
    return out


def compare(found, grads, reference, rtol):
    for name in SHAPES:
        for index, own in matrices_of(name, grads).items():
            expected = reference(name, index, own)
            for step, one in enumerate(found):
                np.testing.assert_allclose(
                    one[name][index].T, expected[step], rtol=rtol, atol=rtol, err_msg=name
                )


@pytest.mark.parametrize(("tensorwise", "scale", "rank"), [(False, 1.0, RANK), (True, 128.0, 1)])
def test_apollo(tensorwise, scale, rank):
    grads, gap = gradients(), 3
    tx = scale_by_apollo(
        rank, scale=scale, tensorwise=tensorwise, update_gap=gap, b1=B1, b2=B2, layout=LAYOUTS
    )
    found, _ = run(tx, grads)

    def reference(name, index, own):
        def matrix_of_step(step):
            drawn = projection(name, SHAPES[name], LAYOUTS[name], rank, step // gap)
            return np.asarray(drawn, np.float64)[index]

        return reference_apollo(own, matrix_of_step, scale, tensorwise)

    compare(found, grads, reference, rtol=1e-6)  # projections are drawn in float32


def test_fira():
    grads, gap = gradients(1), 3
    tx = scale_by_fira(RANK, update_gap=gap, b1=B1, b2=B2, layout=LAYOUTS)
    found, states = run(tx, grads)

    def reference(name, index, own):
        return reference_fira(own, 0.25, gap, lambda step: states[step].projector[name][index])

    compare(found, grads, reference, rtol=1e-9)


def test_projections_are_normal_and_fresh():
    shape = (4, 300, 400)
    drawn = [np.asarray(projection("up", shape, STACK, 128, period)) for period in (0, 1)]
    assert drawn[0].shape == (4, 300, 128)
    np.testing.assert_allclose(drawn[0].var(), 1 / 128, rtol=0.02)
    flat = np.stack([*drawn[0].reshape(4, -1), *drawn[1].reshape(4, -1)])
    correlation = np.corrcoef(flat) - np.eye(8)  # of layers and of periods
    assert np.abs(correlation).max() < 0.03
    other = projection("down", shape, STACK, 128, 0)
    assert abs(np.corrcoef(np.ravel(other), drawn[0].ravel())[0, 1]) < 0.03


def test_the_limiter_acts_in_these_tests():
    """Without it the references would be other numbers; a factor of 300 in size must be held back."""
    grads = gradients()
    found, states = run(scale_by_apollo(RANK, b1=B1, b2=B2, layout=LAYOUTS), grads)
    norms = [np.linalg.norm(one["tall"]) for one in found]
    growth = [b / a for a, b in itertools.pairwise(norms)]
    assert max(growth) <= 1.01 + 1e-6
    assert any(abs(g - 1.01) < 1e-6 for g in growth)
    np.testing.assert_allclose(states[-1].norm["tall"], norms[-1], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "per_matrix"),
    [
        (lambda: apollo(1e-2, RANK), lambda p, q: 2 * RANK * max(p, q) + 1),
        (lambda: apollo_mini(1e-2), lambda p, q: 2 * max(p, q) + 1),
        (lambda: fira(1e-2, RANK), lambda p, q: RANK * (2 * max(p, q) + min(p, q)) + 1),
    ],
    ids=["apollo", "apollo_mini", "fira"],
)
def test_aliases_train_matrices_and_tables(make, per_matrix):
    rng = np.random.default_rng(0)
    params = {
        "embed_tokens": {"embedding": rng.normal(size=(20, 8)).astype(np.float32)},
        "layers": {"up": {"kernel": rng.normal(size=(2, 8, 12)).astype(np.float32)}},
        "norm": {"scale": np.ones(8, np.float32)},
    }
    tx = make()
    others = 2 * (20 * 8 + 8)
    counters = 2  # of the matrices' rule and of Adam
    assert state_bytes(tx, params) == 4 * (2 * per_matrix(12, 8) + others + counters)
    targets = jax.tree.map(lambda x: x + 0.3, params)

    def loss(p):
        return optax.tree.norm(jax.tree.map(jnp.subtract, p, targets)) ** 2

    @jax.jit
    def step(p, state):
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    state, first = tx.init(params), float(loss(params))
    structure = jax.tree.structure(state)
    for _ in range(60):
        params, state = step(params, state)
    assert jax.tree.structure(state) == structure
    assert float(loss(params)) < 0.5 * first
    # AdamW on everything else, bit for bit.
    adamw = optax.adam(1e-2)
    g = {"norm": {"scale": jnp.full(8, 0.5)}}
    own, _ = tx.update(g, tx.init(g), g)
    peer, _ = adamw.update(g, adamw.init(g), g)
    np.testing.assert_array_equal(own["norm"]["scale"], peer["norm"]["scale"])


def test_weight_decay_is_decoupled():
    params = {"up": {"kernel": jnp.ones((8, 12))}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = fira(0.1, RANK, weight_decay=0.5)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["up"]["kernel"], -0.05, rtol=1e-6)


def test_bad_input():
    for make in (scale_by_apollo, scale_by_fira):
        with pytest.raises(ValueError, match="rank and update_gap"):
            make(0)
    tx = scale_by_fira(2, layout=ParamLayout("matrix", (1, 2), (0,)))
    with pytest.raises(ValueError, match=r"query.*one row axis"):
        tx.init({"query": jnp.ones((8, 4, 4))})
