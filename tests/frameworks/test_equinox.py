"""Modules of Equinox and of Haliax in the loops of docs/frameworks.md; Equinox's files between runs."""

from __future__ import annotations

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sage_optax
from tests.frameworks import harness

VOCABULARY, WIDTH, HIDDEN = 128, 32, 64
LINEAR = ("matrix", (0,), (1,))  # both have weights (out, in)
ROLES = {
    r"^embed_tokens/weight$": ("embedding", (0,), (1,)),
    r"^lm_head/weight$": ("head", (0,), (1,)),
    r"^layers/0/(up|down)/weight$": LINEAR,
    r"^norm/weight$": ("vector", (), (0,)),
}


def cross_entropy(logits, tokens):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return losses.mean()


class Block(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.up = eqx.nn.Linear(WIDTH, HIDDEN, use_bias=False, key=up)
        self.down = eqx.nn.Linear(HIDDEN, WIDTH, use_bias=False, key=down)

    def __call__(self, x):
        return x + self.down(jax.nn.silu(self.up(x)))


class Model(eqx.Module):
    embed_tokens: eqx.nn.Embedding
    layers: list
    norm: eqx.nn.RMSNorm
    lm_head: eqx.nn.Linear
    steps: int = 3  # a leaf that is not trained

    def __init__(self, key):
        table, block, head = jax.random.split(key, 3)
        self.embed_tokens = eqx.nn.Embedding(VOCABULARY, WIDTH, key=table)
        self.layers = [Block(block)]
        self.norm = eqx.nn.RMSNorm(WIDTH, use_bias=False)
        self.lm_head = eqx.nn.Linear(WIDTH, VOCABULARY, use_bias=False, key=head)

    def __call__(self, token):
        return self.lm_head(self.norm(self.layers[0](self.embed_tokens(token))))


class NamedBlock(eqx.Module):
    up: hnn.Linear
    down: hnn.Linear

    def __init__(self, key):
        up, down = jax.random.split(key)
        embed, mlp = hax.Axis("embed", WIDTH), hax.Axis("mlp", HIDDEN)
        options = {"use_bias": False, "out_first": True}
        self.up = hnn.Linear.init(embed, mlp, key=up, **options)
        self.down = hnn.Linear.init(mlp, embed, key=down, **options)

    def __call__(self, x):
        return x + self.down(hnn.silu(self.up(x)))


class NamedModel(eqx.Module):
    embed_tokens: hnn.Embedding
    layers: list
    norm: hnn.RmsNorm
    lm_head: hnn.Linear

    def __init__(self, key):
        table, block, head = jax.random.split(key, 3)
        embed, vocabulary = hax.Axis("embed", WIDTH), hax.Axis("vocab", VOCABULARY)
        self.embed_tokens = hnn.Embedding.init(vocabulary, embed, key=table)
        self.layers = [NamedBlock(block)]
        self.norm = hnn.RmsNorm.init(embed, use_bias=False)
        options = {"use_bias": False, "out_first": True}
        self.lm_head = hnn.Linear.init(embed, vocabulary, key=head, **options)

    def __call__(self, tokens):
        return self.lm_head(self.norm(self.layers[0](self.embed_tokens(tokens))))


def loop(found, model, tokens, folder, resume):
    """The steps of a run, saved after half of them; a resumed run starts with the file."""
    path, losses = folder / "saved.eqx", []
    params = eqx.filter(model, eqx.is_inexact_array)
    state = found["state"]
    steps = range(harness.STEPS)
    if resume:
        places = jax.tree.map(lambda x: x.sharding, (params, state))
        read = eqx.tree_deserialise_leaves(path, (params, state))
        (params, state), steps = jax.device_put(read, places), steps[harness.SAVED :]
        model = eqx.combine(params, model)
    with harness.compilations("step") as count:
        for number in steps:
            if number == harness.SAVED and not resume:
                saved = eqx.filter(model, eqx.is_inexact_array), state
                eqx.tree_serialise_leaves(path, saved)
            model, state, loss = found["step"](model, state, tokens)
            losses.append(float(loss))
        compilations = count()
    params = eqx.filter(model, eqx.is_inexact_array)
    return harness.Trained(losses, params, state, compilations, found["tx"])


def train_equinox(optimizer, folder, resume):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def place(leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        return jax.device_put(leaf, NamedSharding(mesh, P(*("fsdp", "tensor")[: leaf.ndim])))

    def loss_fn(model, tokens):
        return cross_entropy(jax.vmap(jax.vmap(model))(tokens), tokens)

    model = jax.tree.map(place, Model(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (16, 16), 0, VOCABULARY)
    tokens = jax.device_put(tokens, NamedSharding(mesh, P("fsdp")))
    found = harness.run_section("Equinox", optimizer, {"model": model, "loss_fn": loss_fn})
    return loop(found, model, tokens, folder, resume)


def train_haliax(optimizer, folder, resume):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    batch, position = hax.Axis("batch", 16), hax.Axis("position", 16)

    shared = {"mlp": "model", "vocab": "model"}

    def loss_fn(model, tokens):
        with hax.axis_mapping({**shared, "batch": "data"}):  # activations are not split by embed
            logits = model(tokens).rearrange(("batch", "position", "vocab")).array
        return cross_entropy(logits, tokens.array)

    with jax.set_mesh(mesh), hax.axis_mapping({**shared, "embed": "data"}):
        model = hax.named_jit(NamedModel)(jax.random.key(0))
        tokens = hax.random.randint(jax.random.key(1), (batch, position), 0, VOCABULARY)
        tokens = hax.shard(tokens, {"batch": "data"})
        found = harness.run_section("Haliax", optimizer, {"model": model, "loss_fn": loss_fn})
        return loop(found, model, tokens, folder, resume)


@pytest.mark.parametrize("optimizer", harness.OPTIMIZERS)
@pytest.mark.parametrize("framework", ["Equinox", "Haliax"])
def test_modules(framework, optimizer, tmp_path):
    train = {"Equinox": train_equinox, "Haliax": train_haliax}[framework]
    whole = train(optimizer, tmp_path, resume=False)
    resumed = train(optimizer, tmp_path, resume=True)
    mesh = {"Equinox": "fsdp 4 x tensor 2", "Haliax": "data 4 x model 2"}[framework]
    harness.check(framework, optimizer, f"the page's loop, {mesh}", whole, resumed, ROLES)


def test_haliax_needs_unboxed_where_names_make_shardings():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), hax.axis_mapping({"embed": "data"}):
        model = hax.named_jit(NamedModel)(jax.random.key(0))
        with pytest.raises(ValueError, match="rank"):
            hax.named_jit(sage_optax.sage_hybrid(1e-2).init)(model)
