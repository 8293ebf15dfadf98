"""Linen's ``TrainState`` with boxed parameters and ``nn.get_partition_spec``, through a checkpoint."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from layout_optax import state_shardings, unboxed
from tests.compatibility import runs

# Logical names of the axes, and where each goes.
NAMES = {
    "embed_tokens": ("vocabulary", "embed"),
    "norm": ("embed",),
    "up": ("embed", "mlp"),
    "lm_head": ("mlp_in", "vocabulary_out"),
}
RULES = (
    ("vocabulary", "tensor"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("mlp_in", "tensor"),
    ("vocabulary_out", "fsdp"),
)


def boxed(init, name):
    return nn.with_logical_partitioning(init, NAMES[name])


class Norm(nn.Module):
    """A norm's scale without the norm."""

    @nn.compact
    def __call__(self, x):
        ones = boxed(nn.initializers.ones_init(), "norm")
        return x * self.param("scale", ones, (runs.WIDTH,))


class Model(nn.Module):
    """The small model of `runs`, every parameter boxed with its logical names."""

    @nn.compact
    def __call__(self, tokens):
        normal = nn.initializers.normal(0.5)
        x = nn.Embed(
            runs.VOCABULARY,
            runs.WIDTH,
            embedding_init=boxed(normal, "embed_tokens"),
            name="embed_tokens",
        )(tokens)
        dense = functools.partial(nn.Dense, use_bias=False)
        x = dense(runs.HIDDEN, kernel_init=boxed(normal, "up"), name="up")(Norm(name="norm")(x))
        head = dense(runs.VOCABULARY, kernel_init=boxed(normal, "lm_head"), name="lm_head")
        return head(nn.relu(x))


def shardings_of(state, mesh, tx):
    """Shardings of a train state: the parameters' from their boxes, the optimizer's derived from those.

    ``nn.get_partition_spec`` alone would call the optimizer's state replicated, having no boxes to read.
    """
    found = nn.spmd.logical_to_mesh_sharding(nn.get_partition_spec(state), mesh, RULES)
    return found.replace(opt_state=state_shardings(tx, state.params, found.params))


class LinenRun:
    """A run whose parameters and optimizer state are a `TrainState`; see `runs.Run`."""

    def __init__(self, mesh, tx):
        model, tx = Model(), unboxed(tx)

        def create():
            params = model.init(jax.random.key(0), jnp.zeros((8, 6), jnp.int32))["params"]
            return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

        abstract = jax.eval_shape(create)
        shardings = shardings_of(abstract, mesh, tx)
        # The weights of every other module, so that the losses can be compared.
        params = jax.device_put(runs.weights(), shardings.params)
        params = nn.meta.replace_boxed(abstract.params, params)
        opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
        step = jax.device_put(jnp.int32(0), shardings.step)
        self.tree = abstract.replace(step=step, params=params, opt_state=opt_state)

        def loss_fn(params, tokens):
            return runs.cross_entropy(model.apply({"params": params}, tokens), tokens)

        @functools.partial(jax.jit, out_shardings=(shardings, None))
        def step_fn(state, tokens):
            loss, grads = jax.value_and_grad(runs.auto(loss_fn, mesh))(state.params, tokens)
            return state.apply_gradients(grads=grads), loss

        self._step = step_fn

    def step(self, tokens):
        with nn.logical_axis_rules(RULES):
            self.tree, loss = self._step(self.tree, tokens)
        return float(loss)

    @property
    def params(self):
        return nn.meta.unbox(self.tree.params)

    @property
    def opt_state(self):
        return self.tree.opt_state


@runs.over(runs.FIRST)
def test_train_save_restore_continue(optimizer, kind, tmp_path):
    runs.check(LinenRun, optimizer, kind, tmp_path)


def test_a_train_state_born_on_its_devices():
    """Parameters too are made by a compiled function with these shardings (Auto axes)."""
    mesh = runs.make_mesh(AxisType.Auto)
    model, tx = Model(), unboxed(runs.OPTIMIZERS["lorapre_adamw"]())

    def create():
        params = model.init(jax.random.key(0), jnp.zeros((8, 6), jnp.int32))["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    run = LinenRun.__new__(LinenRun)
    run.tree = jax.jit(create, out_shardings=shardings_of(jax.eval_shape(create), mesh, tx))()
    runs.check_shardings(run, mesh, runs.specs())


def test_state_without_boxes_has_no_partition_spec_of_its_own():
    """Why `shardings_of` asks `state_shardings`: a spec of None axes would replicate every moment."""
    params = {"up": {"kernel": nn.Partitioned(jnp.ones((8, 24)), names=("fsdp", "tensor"))}}
    state = jax.eval_shape(unboxed(runs.OPTIMIZERS["lorapre_adamw"]()).init, params)
    held = nn.get_partition_spec(state)[0].inner_states["matrix"].inner_state
    assert held.mu.left["up"]["kernel"] == P()
    with pytest.raises(TypeError, match=r"'up/kernel' is a Partitioned with names .*unboxed"):
        runs.OPTIMIZERS["lorapre_adamw"]().init(params)
