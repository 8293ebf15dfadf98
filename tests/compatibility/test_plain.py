"""Plain dictionaries and a step of JAX's own, on a mesh, through a checkpoint."""

from __future__ import annotations

import functools

import jax
import optax
from jax.sharding import NamedSharding

from layout_optax import state_shardings
from tests.compatibility import runs


def build(mesh, tx):
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), runs.specs())
    params = jax.device_put(runs.weights(), shardings)
    placed = state_shardings(tx, params)
    loss_fn = runs.auto(lambda p, tokens: runs.cross_entropy(runs.forward(p, tokens), tokens), mesh)

    @functools.partial(jax.jit, out_shardings=(shardings, placed, None))
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return runs.Run(params, jax.jit(tx.init, out_shardings=placed)(params), step)


@runs.over(runs.FIRST + runs.SECOND)
def test_train_save_restore_continue(optimizer, kind, tmp_path):
    runs.check(build, optimizer, kind, tmp_path)
