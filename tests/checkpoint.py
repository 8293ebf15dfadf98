"""A run that is saved with Orbax after two steps, restored from a template, and goes on bit for bit."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

PARAMS = {
    "embed_tokens": {"embedding": (12, 4)},
    "layers": {"up": {"kernel": (2, 4, 6)}, "norm": {"scale": (2, 4)}},
    "lm_head": {"kernel": (4, 12)},
}


def draw(seed):
    shapes, treedef = jax.tree.flatten(PARAMS, is_leaf=lambda node: isinstance(node, tuple))
    generator = np.random.default_rng(seed)
    return treedef.unflatten(
        [jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes]
    )


def save_restore_continue(tx, folder):
    """Steps, saves, restores and steps on; the state must come back as it was."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = draw(0), tx.init(draw(0))
    for seed in (1, 2):
        params, state = step(params, state, draw(seed))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", {"params": params, "opt_state": state})
        checkpointer.wait_until_finished()
        fresh = {"params": draw(0), "opt_state": tx.init(draw(0))}
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        restored = checkpointer.restore(folder / "state", template)
    chex.assert_trees_all_equal(restored, {"params": params, "opt_state": state})
    chex.assert_trees_all_equal_dtypes(restored["opt_state"], state)
    uninterrupted = step(params, state, draw(3))
    chex.assert_trees_all_equal(
        step(restored["params"], restored["opt_state"], draw(3)), uninterrupted
    )
