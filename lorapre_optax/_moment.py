"""One low-rank moment of every leaf: its state, its options, its initial value and its step.

An optimizer chooses the targets and reads the moments. Each update has two parts::

    stepped = step_leaves(leaves, options, step, (state, target))    # the paper's equations, leaf by leaf
    values, state = collect(leaves, count, stepped, state)

``step`` gets a leaf and its `History` and returns the leaf's value and, for each moment, its `Kept` part.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from layout_optax.axes import compute_dtype, shape_without, zeros_without
from layout_optax.boxes import refuse_boxes
from layout_optax.fit import check_shapes
from layout_optax.hyperparameters import Number, at, check_number, check_one_of, float_dtype
from layout_optax.layout import LayoutLike, ParamLayout, PyTree, is_empty
from layout_optax.leaves import LayoutLeaves, flatten_with_layout
from layout_optax.notes import note
from lorapre_optax import _factors, _solves
from lorapre_optax._factor_sharding import with_rank
from lorapre_optax._factors import DampingKind
from lorapre_optax._products import Narrow, narrow_operands
from lorapre_optax._rank import RankLike, check_rule, leaf_rank, look_up, warn_of_full_ranks
from lorapre_optax._subspace import Start, gradient_rights

InitialSubspace: TypeAlias = Literal["normal", "gradient"]
Value: TypeAlias = jax.Array | float
Target: TypeAlias = Callable[[jax.Array], jax.Array]


class LowRankState(NamedTuple):
    """A moment of every parameter, as factors or in full. The trees are shaped like the parameters.

    Attributes:
      count: the number of steps taken, int32.
      left: factors B, initially zero: the parameter's batch and row axes with the rank second to last;
        ``MaskedNode`` where the moment is full or the leaf is unmanaged.
      right: factors A: batch and column axes with the rank second to last; ``MaskedNode`` likewise.
      full: full moments of the leaves without factors; ``MaskedNode`` elsewhere.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    left: PyTree
    right: PyTree
    full: PyTree


@dataclasses.dataclass(frozen=True)
class MomentOptions:
    """Options that every low-rank momentum shares: how factors follow their target.

    Attributes:
      rank: see `lorapre_optax.RankLike`.
      damping: damping of the r x r systems. The paper does not give its value.
      damping_kind: ``"relative"`` adds damping * trace(gram) / r to each diagonal, so that the scale of
        gradients does not matter, and keeps the factors balanced. ``"absolute"`` adds damping itself and does
        not balance the factors, for parity with other implementations.
      initial_subspace: ``"normal"`` (paper) or ``"gradient"``, see `lorapre_optax._subspace`.
      factor_dtype: storage dtype of factors and full moments; None for float32 (float64 for float64).
        Arithmetic uses float32 or wider regardless.
      full_rank_fallback: whether to keep a full moment where r (p + q) >= p q.
      product_dtype: dtype of the operands of products with a whole matrix, see `scale_by_lorapre_adam`.
    """

    rank: RankLike
    damping: Number = 1e-4
    damping_kind: DampingKind = "relative"
    initial_subspace: InitialSubspace = "normal"
    factor_dtype: Any = None
    full_rank_fallback: bool = True
    product_dtype: Any = None

    def __post_init__(self):
        """Refuses invalid options."""
        float_dtype("product_dtype", self.product_dtype)
        check_number("damping", self.damping, 0)
        check_one_of("damping_kind", self.damping_kind, ("relative", "absolute"))
        float_dtype("factor_dtype", self.factor_dtype)
        check_one_of("initial_subspace", self.initial_subspace, ("normal", "gradient"))


class Kept(NamedTuple):
    """The next state of one leaf, in the state's dtypes; ``MaskedNode`` for fields that it does not use."""

    left: Any
    right: Any
    full: Any


@dataclasses.dataclass(frozen=True)
class FullHistory:
    """The history of a leaf that keeps its moment in full."""

    moment: jax.Array
    factored: ClassVar[bool] = False

    def past(self, like: jax.Array) -> jax.Array:
        """The previous moment in the dtype of ``like``."""
        return self.moment.astype(like.dtype)

    def step(self, target: jax.Array, gamma: Value, scale: Value = 1.0) -> None:
        """Does nothing: a full moment has no factors."""
        del target, gamma, scale

    def keep(self, step: None, moment: jax.Array) -> Kept:
        """The new moment, for the state."""
        del step
        full = moment.astype(self.moment.dtype)
        return Kept(optax.MaskedNode(), optax.MaskedNode(), full)


@dataclasses.dataclass(frozen=True)
class FactoredHistory:
    """The history of a leaf whose moment is B A: its old factors and their damped inverses."""

    layout: ParamLayout
    old: _factors.Prepared
    left_inverse: jax.Array
    right_inverse: jax.Array
    damping_kind: DampingKind
    dtype: Any
    narrow: Narrow | None = None
    factored: ClassVar[bool] = True

    def past(self, like: jax.Array) -> jax.Array:
        """The previous moment B A, shaped and sharded like ``like``."""
        return _factors.past(self.old, self.layout, like, self.narrow)

    def step(self, target: jax.Array, gamma: Value, scale: Value = 1.0) -> _factors.Step:
        """Takes one Newton step of both factors towards ``scale * target``; see `_factors.newton_step`."""
        return _factors.newton_step(
            target,
            self.old,
            self.left_inverse,
            self.right_inverse,
            gamma,
            self.layout,
            self.damping_kind,
            self.narrow,
            scale,
        )

    def remembered(
        self, like: jax.Array, step: _factors.Step, decay: Value, weight: Value
    ) -> jax.Array:
        """``decay B A - weight (P_B T + T P_A) / 2`` for the target T of ``step``.

        Adding ``weight T`` adds ``weight`` times the part of T that the factors cannot hold to ``decay B A``.
        """
        return _factors.remembered(like, self.old, step, decay, weight, self.layout, self.narrow)

    def keep(self, step: _factors.Step, moment: jax.Array) -> Kept:
        """The new factors, for the state, which does not store the moment itself."""
        del moment
        left, right = step.left.astype(self.dtype), step.right.astype(self.dtype)
        return Kept(left, right, optax.MaskedNode())


History: TypeAlias = Any
"""A `FullHistory` or a `FactoredHistory`. ``keep`` takes the result of the same object's ``step``."""


def init(options: MomentOptions, layout: LayoutLike, seed: int = 0) -> Callable[..., LowRankState]:
    """Returns the ``init`` of one low-rank moment; ``seed`` distinguishes the moments of one optimizer.

    It refuses leaves that are not real floating-point arrays, and rank mappings with a key that matches
    nothing. It warns of ranks that save nothing.
    """

    def init_fn(params: PyTree) -> LowRankState:
        refuse_boxes(params)
        leaves = flatten_with_layout(layout, params)
        leaves.check_trainable()
        check_rule(options.rank, leaves)
        if options.full_rank_fallback and not seed:  # once per optimizer, not per moment
            warn_of_full_ranks(options.rank, leaves)
        kept = leaves.map(lambda path, own, leaf: _start(path, own, leaf, options, seed))
        return _state(leaves, jnp.zeros([], jnp.int32), kept, lambda kept: kept)

    return init_fn


def step_leaves(
    leaves: LayoutLeaves,
    options: MomentOptions,
    step: Callable[..., tuple[Any, ...]],
    *moments: tuple[LowRankState, Target],
) -> PyTree:
    """Calls ``step(path, layout, leaf, *histories)`` for every managed leaf.

    One call solves the systems of many leaves and moments, see `lorapre_optax._solves`. Leaves form groups
    whose systems stay under a size limit, and the groups run one after the other, so the temporaries of one
    group are freed before the next.

    Args:
      leaves: the updates with their layouts.
      options: the options of the moments.
      step: the equations of one leaf; its last results are the `Kept` of each moment.
      *moments: states with their targets, element-wise functions of the updates. This function reads the
        targets only for ``initial_subspace="gradient"``.

    Returns:
      A tree of the results of ``step``.

    Raises:
      ValueError: for a state that does not belong to these updates; it names the path.
    """
    for state, _ in moments:
        leaves.map(_check_fits, state.left, state.right, state.full)
    count = moments[0][0].count
    lefts, rights, fulls = (
        [leaves.align(getattr(state, name)) for state, _ in moments]
        for name in ("left", "right", "full")
    )
    rows: list[Any] = [optax.MaskedNode()] * len(leaves.leaves)
    done: list[Any] = []
    for group in _in_order(leaves, lefts):
        factors = [
            [(left[i], right[i]) for left, right in zip(lefts, rights, strict=True)] for i in group
        ]
        if done:  # small arrays that the group before this one ends with, and this one starts with
            factors, _ = jax.lax.optimization_barrier((factors, done))
        histories = _open(leaves, options, group, factors, count, [target for _, target in moments])
        for i, own in zip(group, histories, strict=True):
            full = [FullHistory(each[i]) for each in fulls]
            own = [each or other for each, other in zip(own, full, strict=True)]
            rows[i] = step(leaves.paths[i], leaves.layouts[i], leaves.leaves[i], *own)
        done = [kept[:2] for i in group for kept in rows[i][1:]]
    return leaves.unflatten(rows)


def _in_order(leaves: LayoutLeaves, lefts: list[list[Any]]) -> list[list[int]]:
    """Positions of managed leaves in groups whose Gram matrices stay under `_solves.GROUP_BYTES`."""
    groups: list[list[int]] = []
    filled = 0
    for i, layout in enumerate(leaves.layouts):
        if layout is None:
            continue
        size = 0
        for left in (each[i] for each in lefts):
            if not isinstance(left, optax.MaskedNode):
                leaf = leaves.leaves[i]
                batch = math.prod(leaf.shape[axis] for axis in layout.batch_axes(jnp.ndim(leaf)))
                size += 2 * batch * left.shape[-2] ** 2 * compute_dtype(leaf.dtype).itemsize
        if not groups or (size and filled + size > _solves.GROUP_BYTES):
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += size
    return groups


def _open(
    leaves: LayoutLeaves,
    options: MomentOptions,
    group: list[int],
    factors: list[list[tuple[Any, Any]]],
    count: jax.Array,
    targets: list[Target],
) -> list[list[FactoredHistory | None]]:
    """The histories of a group's leaves in every moment, None where a moment is full."""
    flat = [
        (i, target, *pair)
        for i, pairs in zip(group, factors, strict=True)
        for target, pair in zip(targets, pairs, strict=True)
    ]
    factored = [each for each in flat if not isinstance(each[2], optax.MaskedNode)]
    kind = options.damping_kind

    def start(i: int, target: Target, left: jax.Array, right: jax.Array) -> Start:
        leaf, layout = leaves.leaves[i], leaves.layouts[i]
        assert layout is not None
        return Start(leaves.paths[i], layout, leaf, target, right.astype(compute_dtype(leaf.dtype)))

    starts = [start(*each) for each in factored]
    rights = [each.right for each in starts]
    if options.initial_subspace == "gradient" and starts:
        # Compute the targets in the branch: inputs of a branch have to be written. One branch serves the group.
        rights = jax.lax.cond(count == 0, lambda: gradient_rights(starts), lambda: rights)
    prepared = [
        _factors.prepare(
            left.astype(compute_dtype(each.leaf.dtype)),
            right,
            each.layout,
            jnp.ndim(each.leaf),
            kind,
        )
        for each, (_, _, left, _), right in zip(starts, factored, rights, strict=True)
    ]
    inverses = _solves.damped_inverses(
        [(old.left_gram, old.right_gram) for old in prepared], at(options.damping, count), kind
    )
    opened = iter(
        FactoredHistory(
            leaves.layouts[i],  # pyright: ignore[reportArgumentType]
            old,
            left_inverse,
            right_inverse,
            kind,
            left.dtype,
            narrow_operands("product_dtype", options.product_dtype, leaves.leaves[i].dtype),
        )
        for (i, _, left, _), old, (left_inverse, right_inverse) in zip(
            factored, prepared, inverses, strict=True
        )
    )
    found = [None if isinstance(each[2], optax.MaskedNode) else next(opened) for each in flat]
    size = len(targets)
    return [found[k : k + size] for k in range(0, len(found), size)]


def collect(
    leaves: LayoutLeaves, count: jax.Array, stepped: PyTree, *states: LowRankState
) -> tuple[Any, ...]:
    """Splits the result of a step into its values and the next states.

    Args:
      leaves: the updates with their layouts.
      count: the step count of the next states.
      stepped: for every managed leaf a tuple: its value, then a `Kept` for each state.
      *states: the states that the step started from.

    Returns:
      A tree of values, with unmanaged leaves as they are, and the next states.
    """
    values = leaves.map(lambda path, layout, leaf, row: row[0], stepped, other="leaf")
    following = [
        _state(leaves, count, stepped, lambda row, i=i: row[i], state)
        for i, state in enumerate(states, start=1)
    ]
    return values, *following


def in_compute_dtype(leaf: Any) -> jax.Array:
    """A leaf in float32, or in its own dtype where that is wider."""
    return jnp.asarray(leaf).astype(compute_dtype(leaf.dtype))


def as_updates(leaves: LayoutLeaves, values: PyTree) -> PyTree:
    """Values in the dtypes of the leaves that they replace; unmanaged leaves pass through."""
    cast = lambda path, layout, leaf, value: value.astype(leaf.dtype)  # noqa: E731
    return leaves.map(cast, values, other="leaf")


def next_count(state: LowRankState) -> jax.Array:
    """The number, from 1, of the step that starts from a state."""
    return jnp.asarray(optax.safe_increment(state.count))


def coupled_gamma(decay: Value) -> Value:
    """1 - sqrt(decay): each of two factors takes half of the decay. Computed without cancellation."""
    return (1 - decay) / (1 + decay**0.5)


def bias_weight(decay: Value, count: jax.Array, dtype: Any) -> jax.Array:
    """1 - decay^count."""
    return 1 - jnp.asarray(decay, dtype) ** count.astype(dtype)


def residual_weight(kappa: Value, decay: Value, count: jax.Array, dtype: Any) -> jax.Array:
    """Kappa (1 - b^(t-1)): the weight of the part that the factors cannot hold.

    The history has weight b (1 - b^(t-1)) at step t. With kappa = b the part outside gets exactly the weight of
    the part inside, and nothing at t = 1, where there is no history.
    """
    return kappa * (1 - jnp.asarray(decay, dtype) ** (count - 1).astype(dtype))


def _start(path: str, layout: ParamLayout, leaf: Any, options: MomentOptions, seed: int) -> Kept:
    """The initial zero moment of one parameter: factors where they save memory, otherwise a full moment."""
    dtype = options.factor_dtype
    dtype = compute_dtype(leaf.dtype) if dtype is None else dtype
    fallback = options.full_rank_fallback
    rank = leaf_rank(options.rank, path, layout, leaf.shape, fallback=fallback)
    if rank is None:
        asked = look_up(options.rank, path, layout, tuple(leaf.shape)) is not None
        why = "full-rank fallback" if asked else "full"
        note(path, "full_moment", why, "low_rank")
        full = zeros_without(leaf, (), dtype)
        return Kept(optax.MaskedNode(), optax.MaskedNode(), full)
    note(path, "low_rank", str(rank), "low_rank")
    factors = _factors.init_factors(path, leaf, layout, rank, dtype, seed)
    return Kept(*factors, optax.MaskedNode())


def factor_shapes(
    shape: Sequence[int], layout: ParamLayout, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the left and right factors of a parameter.

    Example:
      >>> factor_shapes((12, 8), ParamLayout("embedding", (0,), (1,)), 2)
      ((2, 12), (2, 8))
    """
    sides = (layout.column_axes, layout.row_axes)
    left, right = (with_rank(shape_without(shape, axes), rank) for axes in sides)
    return left, right


def _check_fits(
    path: str, layout: ParamLayout, leaf: Any, left: Any, right: Any, full: Any
) -> None:
    """Refuses a moment that does not have its update's shape."""
    shape = jnp.shape(leaf)
    if is_empty(left):
        check_shapes(path, shape, full, shape)
        return
    rank = left.shape[-2] if jnp.ndim(left) > 1 else 0
    check_shapes(path, shape, (left, right), factor_shapes(shape, layout, rank))


def _state(
    leaves: LayoutLeaves,
    count: jax.Array,
    rows: PyTree,
    kept_of: Callable[[Any], Kept],
    old: LowRankState | None = None,
) -> LowRankState:
    """A state from the `Kept` of each leaf; unmanaged leaves keep their nodes, initially ``MaskedNode``."""
    nothing = [Kept(*(optax.MaskedNode(),) * 3)] * len(leaves.leaves)
    if old is not None:
        fields = map(leaves.align, (old.left, old.right, old.full))
        nothing = [Kept(*nodes) for nodes in zip(*fields, strict=True)]
    kept = [
        empty if layout is None else kept_of(row)
        for layout, row, empty in zip(leaves.layouts, leaves.align(rows), nothing, strict=True)
    ]
    fields = ([getattr(row, name) for row in kept] for name in Kept._fields)
    return LowRankState(count, *map(leaves.unflatten, fields))
