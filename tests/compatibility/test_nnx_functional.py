"""Functional NNX: ``nnx.split``, a pure step on states of variables, ``nnx.merge``; through a checkpoint."""

from __future__ import annotations

import functools

import jax
import optax
from flax import nnx

from layout_optax import state_shardings, unboxed
from tests.compatibility import runs
from tests.compatibility.nnx_model import make_model


def build(mesh, tx):
    graphdef, params = nnx.split(make_model(), nnx.Param)
    tx = unboxed(tx)
    shardings = nnx.get_named_sharding(params, mesh)
    placed = state_shardings(tx, params, shardings)

    def loss_fn(params, tokens):
        return runs.cross_entropy(nnx.merge(graphdef, params)(tokens), tokens)

    @functools.partial(jax.jit, out_shardings=(shardings, placed, None))
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(runs.auto(loss_fn, mesh))(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = jax.jit(tx.init, out_shardings=placed)(params)
    return runs.Run(params, state, step, plain=nnx.as_pure)


@runs.over(runs.FIRST)
def test_train_save_restore_continue(optimizer, kind, tmp_path):
    runs.check(build, optimizer, kind, tmp_path)
