"""One training run, told twice: ten steps in one go, and five, a checkpoint, a restart and five more.

Each test module of this folder gives a `Run`: how one framework holds the same small model, its optimizer
and its step. `check` trains it on a mesh of eight devices and asks of every framework the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_optax
import sage_optax
from layout_optax.memory import state_leaves

VOCABULARY, WIDTH, HIDDEN = 16, 8, 24
SHAPES = {
    "embed_tokens": {"embedding": (VOCABULARY, WIDTH)},
    "norm": {"scale": (WIDTH,)},
    "up": {"kernel": (WIDTH, HIDDEN)},
    "lm_head": {"kernel": (HIDDEN, VOCABULARY)},
}
SPECS = {
    "embed_tokens": {"embedding": ("tensor", "fsdp")},
    "norm": {"scale": ("fsdp",)},
    "up": {"kernel": ("fsdp", "tensor")},
    "lm_head": {"kernel": ("tensor", "fsdp")},
}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    "sage_hybrid": lambda: sage_optax.sage_hybrid(1e-2),
    "lorapre_adamw": lambda: lorapre_optax.lorapre_adamw(1e-2, 2),
    "lorapre_sinkgd": lambda: lorapre_optax.lorapre_sinkgd(1e-2, 2),
}
# Both kinds of mesh with both families of optimizers, at half the compilations. Plain trees take all.
FIRST = [("sage_hybrid", AxisType.Auto), ("lorapre_adamw", AxisType.Explicit)]
SECOND = [("lorapre_sinkgd", AxisType.Auto), ("sage_hybrid", AxisType.Explicit)]


def over(cases):
    """Parametrizes a test with an optimizer and a kind of mesh."""
    rows = [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1].name}",
            marks=[pytest.mark.extended] if case in SECOND else [],
        )
        for case in cases
    ]
    return pytest.mark.parametrize(("optimizer", "kind"), rows)


def make_mesh(kind, shape=(2, 4)):
    return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(kind, kind))


def weights():
    """The model's parameters at the start, NumPy arrays."""
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: generator.normal(0.0, 0.5, shape).astype(np.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def specs():
    return jax.tree.map(
        lambda names: P(*names), SPECS, is_leaf=lambda node: isinstance(node, tuple)
    )


def batch(seed, mesh=None):
    """Tokens that can be foretold, int32 of shape (8, 6), sharded along the batch."""
    starts = np.random.default_rng(100 + seed).permutation(VOCABULARY)[:8]
    tokens = np.asarray((starts[:, None] + 3 * np.arange(6)) % VOCABULARY, np.int32)
    return tokens if mesh is None else jax.device_put(tokens, NamedSharding(mesh, P("fsdp")))


def forward(params, tokens):
    """Logits of a model small enough to compile in no time; plain arrays."""
    x = params["embed_tokens"]["embedding"][tokens] * params["norm"]["scale"]
    return jax.nn.relu(x @ params["up"]["kernel"]) @ params["lm_head"]["kernel"]


def cross_entropy(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def auto(loss, mesh):
    """A loss written for Auto axes, made to run on a mesh of Explicit ones too.

    The model of every module relies on XLA to place its activations; only the optimizer, which stays outside,
    sees the Explicit axes. Gradients come back with their parameters' types.
    """
    if mesh.axis_types[0] == AxisType.Auto:
        return loss
    return jax.sharding.auto_axes(loss, out_sharding=NamedSharding(mesh, P()))


class Run:
    """A run whose parameters and optimizer state are one pytree, stepped by a pure function.

    Attributes:
      tree: all that a checkpoint holds; assigned to on restart.
      step: trains on one batch and returns the loss.
      params: the parameters, by path, and ``opt_state`` the optimizer's state, both without boxes.
    """

    def __init__(self, params, opt_state, step, plain=lambda tree: tree):
        self.tree = {"params": params, "opt_state": opt_state}
        self._step = step
        self._plain = plain

    def step(self, tokens):
        params, opt_state, loss = self._step(self.tree["params"], self.tree["opt_state"], tokens)
        self.tree = {"params": params, "opt_state": opt_state}
        return float(loss)

    @property
    def params(self):
        return self._plain(self.tree["params"])

    @property
    def opt_state(self):
        return self.tree["opt_state"]


@functools.cache
def on_one_device(optimizer):
    """Losses of ten steps on plain dictionaries and one device."""
    tx = OPTIMIZERS[optimizer]()

    @jax.jit
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(lambda p: cross_entropy(forward(p, tokens), tokens))(
            params
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(jnp.asarray, weights())
    run = Run(params, tx.init(params), step)
    return [run.step(batch(seed)) for seed in range(10)]


def check(build, optimizer, kind, folder, *, same_numbers=True, expected_specs=None):
    """Trains, saves, restarts on the same mesh and on another one, and compares.

    Args:
      build: from a mesh and an optimizer to a `Run`.
      optimizer: a name in `OPTIMIZERS`.
      kind: the mesh's axis type.
      folder: for the checkpoint.
      same_numbers: whether the losses must be those of plain dictionaries on one device.
      expected_specs: the parameters' specs as ``run.params`` has them; None for those of `specs`.
    """
    mesh, other = make_mesh(kind), make_mesh(kind, (4, 2))
    with jax.set_mesh(mesh):
        run = build(mesh, OPTIMIZERS[optimizer]())
        losses = [run.step(batch(seed, mesh)) for seed in range(5)]
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "run", run.tree)
        saved = run.tree
        losses += [run.step(batch(seed, mesh)) for seed in range(5, 10)]
        finished = jax.tree.map(np.asarray, run.tree)
        check_shardings(run, mesh, specs() if expected_specs is None else expected_specs)
        assert losses[-1] < losses[0]
        if same_numbers:
            np.testing.assert_allclose(losses, on_one_device(optimizer), rtol=1e-5)

        run.tree = restore(folder, run.tree)
        chex.assert_trees_all_equal(run.tree, saved)
        chex.assert_trees_all_equal_dtypes(run.tree, saved)
        assert [run.step(batch(seed, mesh)) for seed in range(5, 10)] == losses[5:]
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, run.tree), finished)
    with jax.set_mesh(other):
        moved = build(other, OPTIMIZERS[optimizer]())
        moved.tree = restore(folder, moved.tree)
        # Leaf by leaf: a train state of Flax holds its optimizer, and no two are equal.
        for leaf, was in zip(jax.tree.leaves(moved.tree), jax.tree.leaves(saved), strict=True):
            np.testing.assert_array_equal(leaf, was)
        check_shardings(moved, other, specs() if expected_specs is None else expected_specs)
        if (optimizer, kind) == FIRST[0]:  # another mesh is another compilation
            continued = [moved.step(batch(seed, other)) for seed in range(5, 10)]
            np.testing.assert_allclose(continued, losses[5:], rtol=1e-5)
            check_shardings(moved, other, specs() if expected_specs is None else expected_specs)


def restore(folder, like):
    """What was saved, as arrays with the shardings of a run that was built anew."""
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "run", template)


def check_shardings(run, mesh, expected):
    """Parameters and state lie where they should: nothing with a sharded axis of its own is replicated."""
    given = {
        jax.tree_util.keystr(path, simple=True, separator="/"): spec
        for path, spec in jax.tree_util.tree_flatten_with_path(
            expected, is_leaf=lambda node: isinstance(node, P)
        )[0]
    }
    for path, leaf in jax.tree_util.tree_flatten_with_path(run.params)[0]:
        spec = given[jax.tree_util.keystr(path, simple=True, separator="/")]
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), (path, leaf)
    found = [leaf for leaf in state_leaves(run.opt_state, run.params) if leaf.value.ndim]
    assert {leaf.owner for leaf in found} <= set(given)
    assert len(found) >= 4
    for leaf in found:
        spec = state_spec(leaf.field, leaf.owner, given[leaf.owner], mesh)
        where = NamedSharding(mesh, spec)
        assert leaf.value.sharding.is_equivalent_to(where, leaf.value.ndim), (
            f"{leaf.field} of {leaf.owner} is {leaf.value.sharding}, not {where}"
        )


def state_spec(field, owner, spec, mesh):
    """Where a buffer of ours belongs, by hand: factors have a rank axis and then one of the matrix's axes.

    The rank is 2: it takes the mesh axis of the other axis if that has two devices.
    """
    rows, columns = (0, 1) if "embed" in owner or "weight" in owner else (1, 0)
    ranked = lambda name: name if name and mesh.shape[name] == 2 else None  # noqa: E731
    if field == "left":
        return P(ranked(spec[columns]), spec[rows])
    if field == "right":
        return P(ranked(spec[rows]), spec[columns])
    if field == "magnitude" and len(spec) == 2:  # one number a column
        return P(spec[columns])
    assert field in ("mu", "nu", "full", "magnitude", "acc_grads", "z"), field
    return spec
