"""Equinox-style modules: dataclasses as nodes, ``None`` where a leaf is not trained; through a checkpoint.

Equinox itself is not needed: ``eqx.filter(model, eqx.is_inexact_array)`` gives just such trees.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from layout_optax import state_shardings
from tests.compatibility import runs


def module(cls):
    """A frozen dataclass as a pytree node, all of its fields children: an ``eqx.Module``."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=fields, meta_fields=[])


@module
class Linear:
    weight: Any  # (out, in)
    bias: Any = None


@module
class Embedding:
    weight: Any


@module
class Norm:
    scale: Any
    bias: Any = None


@module
class Model:
    embed_tokens: Any
    norm: Any
    up: Any
    lm_head: Any
    vocabulary: Any = None  # an integer: static, filtered out of what is trained

    def __call__(self, tokens):
        x = self.embed_tokens.weight[tokens] * self.norm.scale
        return jax.nn.relu(x @ self.up.weight.T) @ self.lm_head.weight.T


def transposed(tree, flip):
    """The weights or specs of `runs` as the module: Equinox keeps (out, in)."""
    return Model(
        Embedding(tree["embed_tokens"]["embedding"]),
        Norm(tree["norm"]["scale"]),
        Linear(flip(tree["up"]["kernel"])),
        Linear(flip(tree["lm_head"]["kernel"])),
    )


def expected_specs():
    return transposed(runs.specs(), lambda spec: P(*reversed(spec)))


def build(mesh, tx):
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        expected_specs(),
        is_leaf=lambda node: isinstance(node, P),
    )
    trained = jax.device_put(transposed(runs.weights(), np.transpose), shardings)
    static = Model(None, None, None, None, vocabulary=runs.VOCABULARY)
    placed = state_shardings(tx, trained)

    def combine(trained):  # eqx.combine(trained, static)
        return dataclasses.replace(trained, vocabulary=static.vocabulary)

    def loss_fn(trained, tokens):
        model = combine(trained)
        return runs.cross_entropy(model(tokens % model.vocabulary), tokens)

    @functools.partial(jax.jit, out_shardings=(shardings, placed, None))
    def step(trained, state, tokens):
        loss, grads = jax.value_and_grad(runs.auto(loss_fn, mesh))(trained, tokens)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    return runs.Run(trained, jax.jit(tx.init, out_shardings=placed)(trained), step)


@runs.over(runs.FIRST)
def test_train_save_restore_continue(optimizer, kind, tmp_path):
    runs.check(
        build,
        optimizer,
        kind,
        tmp_path,
        # LoRA-Pre's random start is drawn by path, and the paths are others here.
        same_numbers=optimizer == "sage_hybrid",
        expected_specs=expected_specs(),
    )
