"""The small model of `runs` as a Flax NNX module with partition metadata on its parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tests.compatibility import runs


class Scale(nnx.Module):
    """A norm's scale without the norm."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(runs.WIDTH), out_sharding=runs.SPECS["norm"]["scale"])

    def __call__(self, x):
        return x * self.scale[...]


class Model(nnx.Module):
    """Embedding, scale, hidden layer and head."""

    def __init__(self, rngs):
        def spec(name):
            return {"out_sharding": next(iter(runs.SPECS[name].values()))}

        self.embed_tokens = nnx.Embed(
            runs.VOCABULARY,
            runs.WIDTH,
            embedding_metadata=spec("embed_tokens"),
            rngs=rngs,
        )
        self.norm = Scale()
        self.up = nnx.Linear(
            runs.WIDTH, runs.HIDDEN, use_bias=False, kernel_metadata=spec("up"), rngs=rngs
        )
        self.lm_head = nnx.Linear(
            runs.HIDDEN, runs.VOCABULARY, use_bias=False, kernel_metadata=spec("lm_head"), rngs=rngs
        )

    def __call__(self, tokens):
        return self.lm_head(nnx.relu(self.up(self.norm(self.embed_tokens(tokens)))))


def make_model():
    """The model on the mesh of the context, at the weights of `runs`."""
    model = Model(nnx.Rngs(0))
    shardings = jax.tree.map(lambda v: v.sharding, nnx.as_pure(nnx.state(model, nnx.Param)))
    nnx.update(model, jax.device_put(nnx.State(runs.weights()), shardings))
    return model
