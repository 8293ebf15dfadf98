"""Orbax saves and restores the state of LoRA-Pre's optimizers as it is, and the run goes on bit for bit."""

from __future__ import annotations

import jax.numpy as jnp
import optax
import pytest

import lorapre_optax
from tests.checkpoint import save_restore_continue

OPTIMIZERS = {
    "lorapre_adamw": lambda: lorapre_optax.lorapre_adamw(optax.linear_schedule(0.0, 1e-3, 5), 1),
    "lorapre_adamw, recommended, bfloat16": lambda: lorapre_optax.lorapre_adamw(
        1e-3, 1, factor_dtype=jnp.bfloat16, others="sage", **lorapre_optax.RECOMMENDED
    ),
    "lorapre_muon, low-rank tables": lambda: lorapre_optax.lorapre_muon(1e-3, 1, table_rank=2),
    "lorapre_sgd": lambda: lorapre_optax.lorapre_sgd(1e-1, 1),
    "lorapre_lion": lambda: lorapre_optax.lorapre_lion(1e-3, 1),
    "lorapre_sinkgd": lambda: lorapre_optax.lorapre_sinkgd(1e-3, 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_save_restore_continue(name, tmp_path):
    save_restore_continue(OPTIMIZERS[name](), tmp_path)
