"""The form of Sinkhorn's algorithm that accelerators run, on a CPU, against the float64 plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_optax import _sinkhorn, scale_by_sinkhorn
from tests import reference
from tests.sage import directions
from tests.sage.common import LAYOUTS
from tests.sage.directions import KERNEL, WEIGHT, check, normal
from tests.sage.test_sinkhorn import EXTREMES, SETTINGS


@pytest.fixture(autouse=True, scope="module")
def _accelerators_form():
    """Runs the other platforms' form where a CPU would run its own."""
    caches = (directions.compiled.cache_clear, _sinkhorn._direction.clear_cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sinkhorn, "_by_products", _sinkhorn._by_sums)
        for clear in caches:
            clear()
        yield
    for clear in caches:
        clear()


# Single numbers take the CPU's form everywhere.
MATRICES = [name for name in EXTREMES if np.size(EXTREMES[name]) > 1]


@pytest.mark.parametrize("name", MATRICES)
def test_reference_on_extremes(name):
    for settings in SETTINGS.values():
        check(EXTREMES[name], **settings)
    if EXTREMES[name].shape == (24, 40):
        check(EXTREMES[name].T, KERNEL, iterations=25)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "scalar"])
def test_reference_on_every_layout(name):
    layout, shape = LAYOUTS[name]
    check(normal(*shape), layout, variant="sqrt")


def test_sweeps_that_are_written_out():
    """Numbers of iterations that are known when the program is traced, as in most uses."""
    update = jax.jit(lambda g: scale_by_sinkhorn(3, layout=WEIGHT).update(g, ())[0])
    for name in (
        "sparse",
        "row up, column down",
        "every size",
        "all at 1e-36",
        "blocks at 1 and 1e-30",
    ):
        g = np.asarray(EXTREMES[name], np.float32)
        g[np.abs(g) < np.finfo(np.float32).tiny] = 0
        expected = reference.sinkhorn(g, WEIGHT, iterations=3)
        error = np.linalg.norm(np.asarray(update(g), np.float64) - expected)
        assert error < directions.TOLERANCE * np.linalg.norm(expected), name


def test_a_narrow_copy_costs_two_ten_thousandths_of_the_direction():
    """Measured 3e-5, 2e-4 and 3e-5: normal entries, heavy tails, rows and columns of every size."""
    gradients = {
        "normal": normal(96, 160),
        "heavy tails": np.random.default_rng(1).standard_t(2, (96, 160)),
        "rows and columns of every size": normal(96, 160)
        * np.exp(4 * normal(96, 1, seed=1) + 4 * normal(1, 160, seed=2)),
    }
    rule = _sinkhorn._Rule(*(_sinkhorn.scaling(jnp.float32(1e-8)),) * 3)

    @jax.jit
    def found_from(g):
        # Rounded beforehand: XLA:CPU leaves out a rounding that is undone at once.
        copy = jax.lax.reduce_precision(g, 8, 7)
        factors = _sinkhorn._sweeps(g, copy, WEIGHT, 5, rule)
        return _sinkhorn.scaled(g, *factors)

    for name, g in gradients.items():
        g = jnp.asarray(g, jnp.float32)
        expected = reference.sinkhorn(np.asarray(g), WEIGHT)
        error = np.linalg.norm(np.asarray(found_from(g), np.float64) - expected)
        assert 1e-6 < error / np.linalg.norm(expected) < 2.1e-4, name


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_no_squares_are_written_for_an_accelerator(platform):
    """The lowered program holds no product of a matrix with a vector, which would need the squares."""
    g = {"up": {"kernel": jnp.ones((24, 40), jnp.bfloat16)}}
    tx = scale_by_sinkhorn()
    text = jax.jit(tx.update).trace(g, tx.init(g)).lower(lowering_platforms=(platform,)).as_text()
    assert "dot_general" not in text
