"""Orbax saves and restores the state of SAGE's optimizers as it is, and the run goes on bit for bit."""

from __future__ import annotations

import optax
import pytest

import sage_optax
from tests.checkpoint import save_restore_continue

OPTIMIZERS = {
    "sage": lambda: sage_optax.sage(1e-3),
    "sage_hybrid": lambda: sage_optax.sage_hybrid(1e-3, matrix_learning_rate=5e-4),
    "sage_hybrid_int8": lambda: sage_optax.sage_hybrid(1e-3, mu_dtype="int8"),
    "sage_hybrid_bfloat16": lambda: sage_optax.sage_hybrid(1e-3, mu_dtype="bfloat16"),
    "lion_hybrid": lambda: sage_optax.lion_hybrid(optax.linear_schedule(0.0, 1e-3, 5)),
    "sinkgd_hybrid": lambda: sage_optax.sinkgd_hybrid(1e-3),
    "sinkgd_hybrid_factored": lambda: sage_optax.sinkgd_hybrid(1e-3, table_rule="factored_rms"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_save_restore_continue(name, tmp_path):
    save_restore_continue(OPTIMIZERS[name](), tmp_path)
