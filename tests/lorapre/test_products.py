"""Products of lower precision: who rounds, what it costs, the inverses by blocks, and what is lowered where."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layout_optax.hyperparameters import float_dtype
from lorapre_optax import (
    RECOMMENDED,
    _solves,
    lorapre_lion,
    lorapre_sgd,
    low_rank_ema,
    low_rank_trace,
    scale_by_lorapre_adam,
    scale_by_lorapre_lion,
    scale_by_lorapre_muon,
)
from lorapre_optax._newton_schulz import orthogonalize
from lorapre_optax._products import Narrow, large_product
from tests.lorapre.common import KERNEL, apart, run, signal

BFLOAT16 = Narrow(jnp.dtype(jnp.bfloat16), True)


def lowered(tx, dtype: str, platform: str, shape=(96, 160)) -> str:
    """StableHLO of an update."""
    return lowered_tree(tx, {"mlp": {"kernel": jnp.ones(shape, dtype)}}, platform)


def lowered_tree(tx, g, platform: str) -> str:
    """StableHLO of an update of a tree."""
    state = jax.eval_shape(tx.init, g)
    return jax.jit(tx.update).trace(g, state, g).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("platform", "narrow"), [("cpu", 0), ("cuda", 6), ("tpu", 6)])
def test_bfloat16_gradients_enter_the_large_products_as_they_are(platform, narrow):
    """Two reconstructions, as large as the gradient, and four products with it, whose sums stay float32."""
    tx = scale_by_lorapre_adam(4)
    text = lowered(tx, "bfloat16", platform)
    products = [line for line in text.splitlines() if "dot_general" in line]
    rounded = [line for line in products if line.rpartition("->")[0].count("bf16>") == 2]
    assert len(rounded) == narrow
    results = [line.rpartition("->")[2] for line in rounded]
    assert (
        sorted("96x160xbf16" in result for result in results) == [False] * 4 + [True] * 2
        or not narrow
    )
    assert sum("xf32" in result for result in results) == narrow * 2 // 3
    assert "bf16" not in "".join(
        line for line in lowered(tx, "float32", platform).splitlines() if "dot_general" in line
    )
    wide = scale_by_lorapre_adam(4, product_dtype="float32")
    found = [x for x in lowered(wide, "bfloat16", platform).splitlines() if "dot_general" in x]
    assert len(found) == len(products)
    assert not any("bf16" in line for line in found)


@pytest.mark.parametrize(
    ("platform", "how"), [("cuda", "tf32"), ("tpu", "HIGHEST"), ("cpu", "HIGHEST")]
)
def test_products_with_inverses_take_three_passes_on_cuda(platform, how):
    text = lowered(scale_by_lorapre_adam(40), "float32", platform)
    products = [line for line in text.splitlines() if "dot_general" in line]
    # Grams, inverses from roots, inverses times factors: two or four of each, in two moments.
    precise = [line for line in products if how in line]
    assert len(precise) >= 8, products


def test_product_dtype_is_exact_but_for_rounding():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((96, 8), (8, 160)))
    rounded = large_product("az,zb->ab", a, b, BFLOAT16)
    expected = np.asarray(a.astype(jnp.bfloat16), np.float64) @ np.asarray(
        b.astype(jnp.bfloat16), np.float64
    )
    assert rounded.dtype == jnp.float32
    assert apart(rounded, expected) < 1e-6
    assert 1e-4 < apart(rounded, np.asarray(a, np.float64) @ np.asarray(b, np.float64)) < 5e-3
    plain = large_product("az,zb->ab", a, b)
    np.testing.assert_array_equal(
        large_product("az,zb->ab", a, b, Narrow(BFLOAT16[0], False)), plain
    )


def test_adam_with_rounded_products_stays_near():
    """Both from the same gradients in bfloat16; entries where the second moment is small differ most."""
    grads = signal((48, 64), KERNEL, steps=12)
    grads = np.asarray(jnp.asarray(grads, jnp.bfloat16).astype(jnp.float32))
    found = []
    for dtype in ("float32", "bfloat16"):
        tx = scale_by_lorapre_adam(4, bound=1.0, layout=KERNEL, product_dtype=dtype)
        found.append(run(tx, grads, tx.init(jnp.asarray(grads[0])))[0])
    assert 1e-5 < apart(found[1], found[0]) < 2e-2


ROUNDING = {
    "ema": lambda **options: low_rank_ema(0.9, 4, **options),
    "trace": lambda **options: low_rank_trace(0.9, 4, **options),
    "lion": lambda **options: scale_by_lorapre_lion(4, **options),
    "lorapre_lion": lambda **options: lorapre_lion(1e-3, 4, **options),
    "lorapre_sgd": lambda **options: lorapre_sgd(1e-3, 4, **options),
}


@pytest.mark.parametrize("name", ROUNDING)
def test_every_momentum_rounds_the_products_with_a_whole_matrix(name):
    """B A, G A^T and B^T G: on CUDA for bfloat16 gradients by default, and everywhere by the option."""

    def rounded(dtype, platform, **options):
        text = lowered(ROUNDING[name](**options), dtype, platform)
        products = [line for line in text.splitlines() if "dot_general" in line]
        return sum(line.rpartition("->")[0].count("bf16>") == 2 for line in products)

    assert rounded("bfloat16", "cuda") == 3
    assert rounded("bfloat16", "cuda", product_dtype="float32") == 0
    assert rounded("bfloat16", "cpu") == rounded("float32", "cuda") == 0
    assert rounded("float32", "cpu", product_dtype="bfloat16") == 3
    with pytest.raises(ValueError, match="product_dtype must be None or a float dtype"):
        ROUNDING[name](product_dtype="int8")


@pytest.mark.parametrize("rank", [1, 31, 32, 33, 64, 100, 256])
def test_inverses_by_halves_are_inverses(rank):
    rng = np.random.default_rng(rank)
    x = rng.normal(size=(3, rank, rank + 8))
    lower = np.linalg.cholesky(x @ x.transpose(0, 2, 1) / rank + 1e-3 * np.eye(rank))
    found = jax.jit(_solves._invert_by_halves)(jnp.asarray(lower, jnp.float32))
    expected = np.linalg.inv(np.asarray(jnp.asarray(lower, jnp.float32), np.float64))
    solved = apart(_solves._solve_identity(jnp.asarray(lower, jnp.float32)), expected)
    assert apart(found, expected) < max(2 * solved, 1e-6)
    assert not np.any(np.triu(np.asarray(found), 1))


def test_a_group_of_leaves_shares_its_solves_and_the_branch_of_its_first_step():
    """However many leaves: one inverse, and in the branch, where the speed of a step is not at stake, two
    orthonormal bases by solves, so that the products of the inverse by halves are compiled once."""
    tx = scale_by_lorapre_adam(96, **RECOMMENDED)

    def counts(leaves: int) -> tuple[int, int]:
        g = {f"w{i}": {"kernel": jnp.ones((256, 320))} for i in range(leaves)}
        update = jax.make_jaxpr(tx.update)(g, jax.eval_shape(tx.init, g))
        conditions = [each for each in update.jaxpr.eqns if each.primitive.name == "cond"]
        chosen = [each for each in conditions if not each.params.get("branches_platforms")]
        return len(chosen), lowered_tree(tx, g, "cuda").count("triangular_solve")

    assert counts(1) == counts(4) == (1, 3)


def test_accelerators_solve_small_triangles_only():
    text = lowered(scale_by_lorapre_adam(96), "float32", "cuda", (256, 320))
    solves = [line for line in text.splitlines() if "triangular_solve" in line]
    assert len(solves) == 1
    assert "x32x32x" in solves[0]


def optax_direction(x):
    tx = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)
    return tx.update(x, tx.init(x))[0]


def test_newton_schulz_in_bfloat16_is_optaxs_in_bfloat16():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(48, 96)), jnp.bfloat16)
    ours = jax.jit(lambda x: orthogonalize(x.astype(jnp.float32), KERNEL, narrow=BFLOAT16))(x)
    theirs = np.asarray(jax.jit(optax_direction)(x).astype(jnp.float32))
    exact = np.asarray(jax.jit(optax_direction)(x.astype(jnp.float32)))
    assert ours.dtype == jnp.float32
    noise = apart(theirs, exact)
    assert noise > 1e-3  # bfloat16 shows
    assert apart(ours, exact) < 1.5 * noise
    assert apart(ours, theirs) < 1.5 * noise


@pytest.mark.parametrize(
    ("ns_dtype", "platform", "narrow"),
    [
        (None, "cuda", True),
        (None, "cpu", False),
        ("float32", "cuda", False),
        ("bfloat16", "cpu", True),
    ],
)
def test_newton_schulz_runs_in_the_gradients_dtype_on_accelerators(ns_dtype, platform, narrow):
    tx = scale_by_lorapre_muon(4, ns_dtype=ns_dtype, product_dtype="float32")
    text = lowered(tx, "bfloat16", platform)
    assert any("dot_general" in x and "bf16" in x for x in text.splitlines()) == narrow


def test_words_that_are_no_float_dtype_are_refused():
    for name in ("product_dtype", "ns_dtype"):
        for bad in ("int8", jnp.ones(())):
            with pytest.raises(ValueError, match=f"{name} must be None or a float dtype"):
                scale_by_lorapre_muon(4, **{name: bad})
    assert float_dtype("x", "bfloat16") == jnp.bfloat16
