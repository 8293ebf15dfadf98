"""Optimizers around Linen boxes and NNX variables: no metadata in the state, all of it on the updates."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core, nnx, struct

import lorapre_optax
import sage_optax
from layout_optax import state_bytes, unboxed
from layout_optax.boxes import is_box

SHAPES = {
    "embed_tokens": {"embedding": (12, 8)},
    "up": {"kernel": (8, 6), "bias": (6,)},
    "norm": {"scale": (8,)},
}
NAMES = {
    "embed_tokens": {"embedding": ("vocab", "embed")},
    "up": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
    "norm": {"scale": ("norm",)},
}
INNER = {
    "adamw": lambda: optax.adamw(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=1),
    "sage_hybrid": lambda: sage_optax.sage_hybrid(1e-2),
    "lorapre_adamw": lambda: lorapre_optax.lorapre_adamw(1e-2, 2),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.trace(0.9), {"embed_tokens": True, "up": False, "norm": False}),
        optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.0, 1e-2, 4)),
    ),
    "multi_steps": lambda: optax.MultiSteps(
        sage_optax.sage_hybrid(1e-2), 2
    ).gradient_transformation(),
}


OLD_OPTAX = tuple(map(int, optax.__version__.split(".")[:3])) < (0, 2, 7)
"""Its adafactor's statistics have no sharding on Explicit axes."""


def is_shape(node):
    return isinstance(node, tuple)


def draw(seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=is_shape,
    )


def box_partitioned(value, names):
    return nn.Partitioned(value, names=names)


def box_logically(value, names):
    return nn.LogicallyPartitioned(value, names=names)


def box_param(value, names):
    return nnx.Param(value, out_sharding=names, eager_sharding=False)


def box_twice(value, names):
    return nn.Partitioned(nn.LogicallyPartitioned(value, names=names), names=names)


BOXES = {
    "Partitioned": box_partitioned,
    "LogicallyPartitioned": box_logically,
    "Param": box_param,
    "nested": box_twice,
}


def boxed(tree, box):
    return jax.tree.map(box, tree, NAMES)


PAIRS = [(inner, "Partitioned") for inner in INNER] + [("adafactor", box) for box in BOXES]


@pytest.mark.parametrize(("inner", "kind"), dict.fromkeys(PAIRS))
def test_boxes_change_neither_state_nor_numbers(inner, kind):
    box = BOXES[kind]
    plain, wrapped = INNER[inner](), unboxed(INNER[inner]())
    params, boxes = draw(0), boxed(draw(0), box)
    plain_state, state = plain.init(params), wrapped.init(boxes)
    update, box_update = jax.jit(plain.update), jax.jit(wrapped.update)
    for seed in (1, 2):
        # Of NNX variables the state has metadata too, unless init makes it of bare shapes.
        assert any(map(is_box, jax.tree.leaves(state, is_leaf=is_box))) == (
            kind == "Param" and not (inner == "adafactor" and OLD_OPTAX)
        )
        chex.assert_trees_all_equal(nnx.as_pure(state), plain_state)
        updates, plain_state = update(draw(seed), plain_state, params)
        box_updates, state = box_update(boxed(draw(seed), box), state, boxes)
        chex.assert_trees_all_equal(box_updates, boxed(updates, box))
        params = optax.apply_updates(params, updates)
        boxes = optax.apply_updates(boxes, box_updates)
    chex.assert_trees_all_equal(boxes, boxed(params, box))


@pytest.mark.parametrize("kind", BOXES)
def test_without_unboxed_init_refuses_names_and_says_what_to_do(kind):
    """The thin factors of a (8, 6) kernel would get names of its axes."""
    kernel = {"up": {"kernel": BOXES[kind](jnp.ones((8, 6)), ("embed", "mlp"))}}
    for tx in (lorapre_optax.scale_by_lorapre_adam(2), sage_optax.scale_by_sage()):
        with pytest.raises(TypeError, match=r"^'up/kernel' is a .* with names .*unboxed\(tx\)"):
            tx.init(kernel)
        unboxed(tx).init(kernel)
        # Boxes that say nothing do no harm.
        tx.init({"up": {"kernel": nnx.Param(jnp.ones((8, 6)))}})


def test_gradients_and_parameters_may_be_boxed_apart():
    """NNX shows variables at init and arrays at update; a Linen user may have unboxed only one tree."""
    tx = unboxed(sage_optax.sage_hybrid(1e-2))
    params, grads = draw(0), draw(1)
    state = nnx.as_pure(tx.init(boxed(params, box_param)))  # as an nnx.Optimizer gives it to update
    update = jax.jit(tx.update)
    expected = update(grads, state, params)
    chex.assert_trees_all_equal(update(grads, state, boxed(params, box_param)), expected)
    updates, _ = update(boxed(grads, box_param), state, params)
    chex.assert_trees_all_equal(updates, boxed(expected[0], box_param))


def test_metadata_beyond_names_comes_back_on_the_updates():
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    rules = (("embed", "x"),)
    params = {
        "up": {"kernel": nn.LogicallyPartitioned(jnp.ones((8, 6)), ("embed", None), mesh, rules)},
        "down": {"kernel": nnx.Param(jnp.ones((6, 8)), tag="mine")},
    }
    tx = unboxed(optax.sgd(1.0))
    updates, _ = tx.update(params, tx.init(params), params)
    kernel = updates["up"]["kernel"]
    assert (kernel.names, kernel.mesh, kernel.rules) == (("embed", None), mesh, rules)
    assert updates["down"]["kernel"].get_metadata("tag") == "mine"
    assert params["up"]["kernel"].value[0, 0] == 1.0  # the gradient's own box is untouched
    assert updates["up"]["kernel"].value[0, 0] == -1.0


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_abstract_parameters_under_a_mesh(box):
    """``unbox()`` of a Linen box asks for a sharding constraint then, which a shape cannot bear."""
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES, is_leaf=is_shape
    )
    tx = sage_optax.sage_hybrid(1e-2)
    # Names that are no axes of the mesh: nothing may look at them.
    with jax.set_mesh(jax.make_mesh((2, 4), ("x", "y"))):
        boxes = boxed(shapes, box)
        state = unboxed(tx).init(boxes)
        assert state_bytes(unboxed(tx), boxes) == state_bytes(tx, shapes)
    state = nnx.as_pure(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(tx.init, shapes))


def test_none_masked_nodes_and_placeholders_pass_through():
    params = {
        "a": None,
        "b": optax.MaskedNode(),
        "c": box_partitioned(jnp.ones((4, 6)), ("x", "y")),
        "d": nnx.Param(None),
    }
    tx = unboxed(sage_optax.sage_hybrid(1e-2))
    updates, state = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    doubled = optax.tree.map_params(tx, lambda leaf: 2 * leaf, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)


def test_frozen_dicts_and_nnx_states_keep_their_kind():
    tx = unboxed(lorapre_optax.lorapre_adamw(1e-2, 2))
    frozen = core.freeze(boxed(draw(0), box_partitioned))
    state_of_model = nnx.State(boxed(draw(0), box_param))
    for params in (frozen, state_of_model):
        updates, _ = tx.update(params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_extra_arguments_arrive_without_boxes_and_unknown_ones_are_ignored():
    seen = []

    def update(updates, state, params=None, *, value_grad, **extra_args):
        seen.append((value_grad, extra_args))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = unboxed(inner)
    params = {"a": box_partitioned(jnp.ones(3), ("x",))}
    tx.update(params, tx.init(params), params, value_grad=params, loss=1.0)
    chex.assert_trees_all_equal(seen, [({"a": jnp.ones(3)}, {"loss": 1.0})])
    unboxed(optax.sgd(1.0)).update(params, optax.sgd(1.0).init(params), loss=1.0)


def test_state_of_a_transformation_that_needs_no_parameters():
    tx = unboxed(optax.scale(2.0))
    grads = {"a": box_param(jnp.ones(3), None)}
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(updates["a"].get_value(), 2.0)


@pytest.mark.parametrize("wrong", [optax.adam, None, "adam", lambda params: params])
def test_refuses_what_is_no_transformation(wrong):
    with pytest.raises(TypeError, match="Call the optimizer first"):
        unboxed(wrong)


def test_refuses_a_box_that_is_no_node():
    class Opaque(nn.Partitioned.__mro__[2]):  # flax.core.meta.AxisMetadata
        def __init__(self, value):
            self.value = value

        def unbox(self):
            return self.value

        def replace_boxed(self, val):
            return Opaque(val)

        def add_axis(self, index, params):
            return self

        def remove_axis(self, index, params):
            return self

    class Two(struct.PyTreeNode):
        value: jax.Array
        other: jax.Array

        def unbox(self):
            return self.value

        def replace_boxed(self, val):
            return self.replace(value=val)

    tx = unboxed(optax.sgd(1.0))
    for box in (Opaque(jnp.ones(3)), Two(jnp.ones(3), jnp.ones(3))):
        with pytest.raises(TypeError, match=rf"'layers/up' is a {type(box).__name__}"):
            tx.init({"layers": {"up": box}})
    grads = {"layers": {"up": Opaque(jnp.ones(3))}}
    with pytest.raises(TypeError, match="unbox it before the optimizer"):
        tx.update(grads, optax.sgd(1.0).init({}))


def test_custom_box_that_is_a_node():
    class Tagged(struct.PyTreeNode):
        value: jax.Array
        tag: str = struct.field(pytree_node=False)

        def unbox(self):
            raise AssertionError("not called: it may constrain shardings")

        def replace_boxed(self, val):
            return self.replace(value=val)

    grads = {"a": Tagged(jnp.ones((4, 6)), "mine")}
    tx = unboxed(lorapre_optax.scale_by_lorapre_adam(2))
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    assert updates["a"].tag == "mine"
