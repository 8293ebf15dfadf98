"""Changes the ranks of an existing state, so that a saved run continues with more factors, fewer, or none.

Only the state changes; the optimizer with the new ranks then uses it. The singular value decompositions are
of r x r matrices, except where a full moment becomes factors.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from layout_optax.axes import (
    compute_dtype,
    explicit_sharding,
    known_sharding,
    placed,
    spec_entries,
)
from layout_optax.layout import LayoutLike, ParamLayout, PyTree, is_empty
from layout_optax.leaves import flatten_with_layout
from lorapre_optax._factor_sharding import factor_sharding, rank_whole
from lorapre_optax._factors import (
    INIT_STD,
    broadcast,
    core_axes,
    einsum_axes,
    normal_factor,
    power_of_two,
)
from lorapre_optax._moment import LowRankState
from lorapre_optax._rank import RankLike, check_rule, leaf_rank
from lorapre_optax._states import (
    Moment,
    is_factored,
    map_states,
    moments,
    owner_of,
    owners,
    with_moments,
)
from lorapre_optax._truncation import truncated_matrix, truncated_product

_SEEDS = (11, 12)
"""Seeds of the new rows of first and second moments; ``init`` uses 0 and 1."""


def resize_ranks(
    state: PyTree,
    ranks: RankLike,
    params: PyTree,
    *,
    layout: LayoutLike = None,
    full_rank_fallback: bool = True,
) -> PyTree:
    """Changes the ranks of the low-rank moments in an optimizer state and keeps their content.

    * A smaller rank keeps the best approximation of B A: its truncated singular value decomposition, with the
      roots of the singular values on both sides.
    * A larger rank adds zero columns to B and new random rows, at the scale of the old rows, to A. The product
      does not change by a bit, and the new directions learn from the next gradient on.
    * A leaf whose factors no longer save memory gets a full moment, and a full moment becomes factors where
    they
      save memory again. LoRA-Pre Adam's second moment is the square of its product.
    * An equal rank changes nothing.

    A `LowRankState` without any factor does not change, since it may never have any (the full Adam that
    `lorapre_adamw` uses on embedding and head, ``second_moment="full"``). A state that was resized to full
    moments everywhere can therefore not be resized back.

    Counts, dtypes and shardings stay. The random rows depend only on the leaf's path and batch indices, like
    those of ``init``. The result has the structure, shapes and dtypes of ``tx.init(params)`` of the optimizer
    with the new ranks. Call this function once, between runs: on a mesh it replicates the factors of one leaf
    at a time, and any full moment that becomes factors.

    Args:
      state: the state of any optax chain that contains low-rank moments, inside any wrappers.
      ranks: the ``rank`` argument of the new optimizer; see `lorapre_optax.RankLike`.
      params: the parameters, or their `jax.ShapeDtypeStruct`.
      layout: the ``layout`` of the optimizer; None infers it.
      full_rank_fallback: the ``full_rank_fallback`` of the new optimizer.

    Returns:
      The state for the optimizer with the new ranks.

    Raises:
      ValueError: if the state holds no low-rank moment, or one that does not fit ``params`` and ``layout``
        (it names the path), for ranks out of range, and for a key of ``ranks`` that matches no parameter.

    Example:
      >>> from lorapre_optax import low_rank_ema
      >>> params = {"mlp": {"kernel": jnp.ones((24, 40))}}
      >>> state = resize_ranks(low_rank_ema(0.9, rank=2).init(params), 8, params)
      >>> state.left["mlp"]["kernel"].shape
      (8, 40)
    """
    found = owners(params, layout)
    check_rule(ranks, flatten_with_layout(layout, params))

    def resize(low_rank: LowRankState, second: bool) -> LowRankState:
        if not is_factored(low_rank):
            return low_rank
        new = []
        for moment in moments(low_rank):
            if not moment.factored and is_empty(moment.full):
                new.append(moment)
                continue
            own, param = owner_of(moment, found, "params")
            rank = leaf_rank(ranks, moment.path, own, param.shape, fallback=full_rank_fallback)
            leaf = _Leaf(moment.path, own, tuple(param.shape), second)
            new.append(_resized(moment, rank, leaf))
        return with_moments(low_rank, new)

    resized, count = map_states(
        functools.partial(resize, second=False), functools.partial(resize, second=True), state
    )
    if not count:
        raise ValueError(
            "resize_ranks: the state holds no LowRankState. Give it the state of an optimizer of "
            "lorapre_optax, in any optax chain."
        )
    return resized


class _Leaf(NamedTuple):
    """The parameter of a moment, and whether the moment is Adam's second."""

    path: str
    layout: ParamLayout
    shape: tuple[int, ...]
    second: bool

    def shardings(self, own: NamedSharding | None, rank: int) -> list[NamedSharding | None]:
        """Shardings of the left and the right factor of this rank, for a parameter with this sharding."""
        removed = (self.layout.column_axes, self.layout.row_axes)
        return [factor_sharding(own, len(self.shape), axes, rank) for axes in removed]

    def noise(self, rank: int) -> jax.Array:
        """Standard normal numbers shaped like a right factor of this rank."""
        like = jax.ShapeDtypeStruct(self.shape, jnp.float32)
        seed = _SEEDS[self.second]
        return normal_factor(self.path, like, self.layout, rank, "right", seed)


def _resized(moment: Moment, rank: int | None, leaf: _Leaf) -> Moment:
    """Resizes one moment; None gives a full moment."""
    if not moment.factored:
        return moment if rank is None else _factorised(moment, rank, leaf)
    if rank is None:
        return _multiplied_out(moment, leaf)
    old = moment.left.shape[-2]
    if rank == old:
        return moment
    return (_grown if rank > old else _shrunk)(moment, rank, leaf)


def _grown(moment: Moment, rank: int, leaf: _Leaf) -> Moment:
    """Adds zero columns to the left factor and new rows to the right one."""
    left, right = moment.left, moment.right
    old = left.shape[-2]
    zeros = jnp.zeros((*left.shape[:-2], rank - old, left.shape[-1]), left.dtype)
    names = einsum_axes(leaf.layout, len(leaf.shape))
    wide = right.astype(compute_dtype(right.dtype))
    unit = power_of_two(wide, names.right, names.batch)
    square = jnp.square(wide / broadcast(unit, names.right, names.batch))
    axes = core_axes(names.right, names.batch)
    scale = broadcast(jnp.sqrt(jnp.mean(square, axis=axes)) * unit, names.right, names.batch)
    own = _of_parameter(moment, leaf)
    # Each part is sharded for its own rank, so the parts are joined where the rank is whole.
    whole, new = leaf.shardings(own, 1), leaf.shardings(own, rank)
    # The later rows of a longer draw with another seed, so that no row of `init` repeats.
    fresh = placed(leaf.noise(rank)[..., old:, :], whole[1])
    fresh = (jnp.where(scale > 0, scale, INIT_STD) * fresh).astype(right.dtype)
    joined = [
        placed(jnp.concatenate([placed(factor, at), placed(more, at)], axis=-2), after)
        for factor, more, at, after in zip((left, right), (zeros, fresh), whole, new, strict=True)
    ]
    return moment._replace(left=joined[0], right=joined[1])


def _shrunk(moment: Moment, rank: int, leaf: _Leaf) -> Moment:
    """Returns the best factors of the smaller rank."""
    left, right = moment.left, moment.right
    wide = (_replicated(factor.astype(compute_dtype(factor.dtype))) for factor in (left, right))
    noise = placed(leaf.noise(rank), _replication(right))
    new_left, new_right = truncated_product(*wide, noise, leaf.layout, leaf.shape)
    left_sharding, right_sharding = leaf.shardings(_of_parameter(moment, leaf), rank)
    return moment._replace(
        left=placed(new_left.astype(left.dtype), left_sharding),
        right=placed(new_right.astype(right.dtype), right_sharding),
    )


def _multiplied_out(moment: Moment, leaf: _Leaf) -> Moment:
    """Returns the full moment of a pair of factors."""
    names = einsum_axes(leaf.layout, len(leaf.shape))
    dtype = compute_dtype(moment.left.dtype)
    left, right = moment.left.astype(dtype), moment.right.astype(dtype)
    sharding = _of_parameter(moment, leaf)
    full = jnp.einsum(
        f"{names.left},{names.right}->{names.param}",
        rank_whole(left),
        rank_whole(right),
        precision="highest",
        out_sharding=sharding if explicit_sharding(left) is not None else None,
    )
    full = jnp.square(full) if leaf.second else full
    full = placed(full.astype(moment.left.dtype), sharding)
    return Moment(moment.path, optax.MaskedNode(), optax.MaskedNode(), full)


def _factorised(moment: Moment, rank: int, leaf: _Leaf) -> Moment:
    """Returns factors of a full moment."""
    full = moment.full
    wide = _replicated(full.astype(compute_dtype(full.dtype)))
    wide = jnp.sqrt(jnp.maximum(wide, 0)) if leaf.second else wide
    noise = placed(leaf.noise(rank), _replication(full))
    factors = truncated_matrix(wide, noise, leaf.layout, leaf.shape)
    left, right = (
        placed(factor.astype(full.dtype), sharding)
        for factor, sharding in zip(
            factors, leaf.shardings(known_sharding(full), rank), strict=True
        )
    )
    return Moment(moment.path, left, right, optax.MaskedNode())


def _of_parameter(moment: Moment, leaf: _Leaf) -> NamedSharding | None:
    """The sharding of the parameter, derived from the shardings of its two factors."""
    ours, theirs = known_sharding(moment.left), known_sharding(moment.right)
    if ours is None or theirs is None:
        return None
    names = einsum_axes(leaf.layout, len(leaf.shape))
    entries = dict(zip(names.left, spec_entries(ours, moment.left.ndim), strict=True))
    entries |= dict(zip(names.right, spec_entries(theirs, moment.right.ndim), strict=True))
    return NamedSharding(ours.mesh, PartitionSpec(*(entries[name] for name in names.param)))


def _replication(x: jax.Array) -> NamedSharding | None:
    """Replication over an array's mesh, if it has one."""
    sharding = known_sharding(x)
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())


def _replicated(x: jax.Array) -> jax.Array:
    return placed(x, _replication(x))
