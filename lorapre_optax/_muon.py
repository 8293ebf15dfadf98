"""LoRA-Pre Muon: orthogonalised momentum whose history is two thin factors (Algorithm 2)."""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, Unpack

import jax.numpy as jnp
import optax

from layout_optax.fit import check_state_type
from layout_optax.hyperparameters import (
    Number,
    at,
    check_adam,
    check_factor_decay,
    check_number,
    check_rate,
    choose,
    float_dtype,
    in_dtype,
)
from layout_optax.layout import LayoutLike, ParamLayout, PyTree
from layout_optax.leaves import LayoutLeaves, flatten_with_layout
from layout_optax.routing import WholeModel, takes_whole_model
from lorapre_optax._adam import full_adam, scale_by_lorapre_adam
from lorapre_optax._distributed_newton_schulz import distributed_orthogonalize
from lorapre_optax._factors import DampingKind
from lorapre_optax._moment import InitialSubspace, LowRankState, MomentOptions, as_updates, init
from lorapre_optax._momentum import step_trace
from lorapre_optax._newton_schulz import orthogonalize
from lorapre_optax._products import Narrow, narrow_operands
from lorapre_optax._rank import RankLike
from lorapre_optax._recommended import RECOMMENDED
from lorapre_optax._routing import Others, route_matrices
from sage_optax import scale_by_factored_rms, scale_by_sage

TableRule: TypeAlias = Literal["others", "factored_rms", "sage", "sage_int8"]


def scale_by_lorapre_muon(
    rank: RankLike = 128,
    mu: Number = 0.95,
    *,
    ns_steps: Number = 5,
    eps: Number = 1e-8,
    nesterov: bool = False,
    scale: Number = 1.0,
    consistent_rms: Number | None = None,
    residual: Number | None = None,
    gamma: Number | None = None,
    damping: Number = 1e-4,
    damping_kind: DampingKind = "relative",
    initial_subspace: InitialSubspace = "normal",
    factor_dtype: Any = None,
    full_rank_fallback: bool = True,
    whole_matrices: bool = False,
    product_dtype: Any = None,
    ns_dtype: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Computes Muon's direction from a low-rank accumulator: Algorithm 2, with the previous factors.

    ::

        m = mu B A + G                                            (see `low_rank_trace`)
        direction = NewtonSchulz(m) * sqrt(max(1, fan_out / fan_in))

    Vectors are not orthogonalised; their direction is the accumulator.

    Args:
      rank: see `low_rank_ema`. Matrices where factors save no memory keep a full accumulator.
      mu: decay of the accumulator, in [0, 1). Every number except the rank may be a schedule.
      ns_steps: number of Newton-Schulz iterations; a float is rounded.
      eps: added to the norm that the iteration divides by at first.
      nesterov: whether to orthogonalise G + mu m instead of m.
      scale: multiplies the direction of matrices.
      consistent_rms: if given, the shape factor is sqrt(max(fan_in, fan_out)) times this number instead
        (0.2 gives about the RMS of AdamW), as in `optax.contrib.muon`.
      residual: kappa in [0, mu], see `low_rank_ema`; None in the paper.
      gamma: see `low_rank_trace`.
      damping: see `low_rank_ema`.
      damping_kind: see `low_rank_ema`.
      initial_subspace: see `low_rank_ema`.
      factor_dtype: see `low_rank_ema`.
      full_rank_fallback: see `low_rank_ema`.
      whole_matrices: on a mesh, whether to stack equal matrices, distribute the stack over the devices and
        iterate on whole matrices instead of sharded ones. Each shard then moves twice instead of several times
        per step. A mesh axis that divides no stack is gathered, and its devices repeat the same work.
      product_dtype: see `scale_by_lorapre_adam`; static.
      ns_dtype: dtype of the Newton-Schulz iteration. None means bfloat16 for bfloat16 gradients on
        accelerators, as in `optax.contrib.muon`, otherwise float32; ``"float32"`` always uses float32; static.
      layout: see `layout_optax.ParamLayout`; None infers it. Unmanaged leaves pass through.

    Returns:
      A transformation with state `LowRankState`. Updates keep their dtype.

    Raises:
      ValueError: for numbers out of range, at construction if they are concrete.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"mlp": {"kernel": jnp.ones((24, 40))}}
      >>> tx = scale_by_lorapre_muon(rank=4)
      >>> state = tx.init(params)
      >>> state.left["mlp"]["kernel"].shape
      (4, 40)
    """
    check_factor_decay("mu", mu)
    for name, value in (("ns_steps", ns_steps), ("eps", eps), ("consistent_rms", consistent_rms)):
        check_number(name, value, 0)
    check_number("gamma", gamma, 0, 1)
    check_number("residual", residual, 0, 1)
    check_rate("scale", scale)
    float_dtype("ns_dtype", ns_dtype)
    options = MomentOptions(
        rank,
        damping,
        damping_kind,
        initial_subspace,
        factor_dtype,
        full_rank_fallback,
        product_dtype,
    )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_state_type("scale_by_lorapre_muon", state, LowRankState)
        leaves = flatten_with_layout(layout, updates)
        before = state.count
        moments, state = step_trace(
            leaves, state, options, mu, nesterov=nesterov, gamma=gamma, residual=residual
        )
        steps, offset = _whole(at(ns_steps, before)), at(eps, before)
        if whole_matrices:
            orthogonal = _distributed(leaves, moments, steps, offset, ns_dtype)
        else:

            def direct(path, own, leaf, m):
                if own.role == "vector" or not leaf.size:
                    return m
                return orthogonalize(m, own, steps, offset, _narrow(ns_dtype, leaf))

            orthogonal = leaves.map(direct, moments, other="leaf")

        def resize(path, own, leaf, direction):
            if own.role == "vector":
                return direction
            rms, factor = in_dtype(direction.dtype, at(consistent_rms, before), at(scale, before))
            return direction * (_shape_factor(own, leaf.shape, rms) * factor)

        directions = leaves.map(resize, orthogonal, other="leaf")
        return as_updates(leaves, directions), state

    return optax.GradientTransformationExtraArgs(init(options, layout), update_fn)


def _whole(steps: Any) -> Any:
    """Rounds a number of iterations, from a schedule or an injected float, to the nearest integer."""
    return steps if isinstance(steps, int) else jnp.rint(jnp.asarray(steps)).astype(jnp.int32)


def _narrow(ns_dtype: Any, leaf: Any) -> Narrow | None:
    return narrow_operands("ns_dtype", ns_dtype, leaf.dtype)


def _distributed(
    leaves: LayoutLeaves, moments: PyTree, steps: Any, eps: Any, ns_dtype: Any
) -> PyTree:
    """Orthogonalises the moments of all matrices, with equal matrices in one stack over the devices."""
    values = leaves.align(moments)
    matrices = {
        i: own
        for i, own in enumerate(leaves.layouts)
        if own is not None and own.role != "vector" and leaves.leaves[i].size
    }
    found = distributed_orthogonalize(
        [values[i] for i in matrices],
        list(matrices.values()),
        steps,
        eps,
        [_narrow(ns_dtype, leaves.leaves[i]) for i in matrices],
    )
    for i, direction in zip(matrices, found, strict=True):
        values[i] = direction
    return leaves.unflatten(values)


def _shape_factor(layout: ParamLayout, shape: Sequence[int], consistent_rms: Any) -> Any:
    """sqrt(max(1, fan_out / fan_in)), or sqrt(max(fan_in, fan_out)) times ``consistent_rms``."""
    fan_out, fan_in = (
        math.prod(shape[axis] for axis in axes) for axes in (layout.row_axes, layout.column_axes)
    )
    if consistent_rms is None:
        return math.sqrt(max(1.0, fan_out / max(fan_in, 1)))
    return math.sqrt(max(fan_in, fan_out)) * consistent_rms


@takes_whole_model(weight_decay=0.0)
def lorapre_muon(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    mu: Number = 0.95,
    *,
    ns_steps: Number = 5,
    eps: Number = 1e-8,
    nesterov: bool = False,
    scale: Number = 1.0,
    consistent_rms: Number | None = None,
    residual: Number | None = None,
    gamma: Number | None = None,
    damping: Number = 1e-4,
    damping_kind: DampingKind = "relative",
    initial_subspace: InitialSubspace = "normal",
    factor_dtype: Any = None,
    full_rank_fallback: bool = True,
    whole_matrices: bool = False,
    product_dtype: Any = None,
    ns_dtype: Any = None,
    adam_b1: Number = 0.9,
    adam_b2: Number = 0.999,
    table_rank: RankLike = None,
    table_rule: TableRule = "others",
    others: Others = "adamw",
    layout: LayoutLike = None,
    **whole_model: Unpack[WholeModel],
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Pre Muon for a whole model: orthogonalised matrices, full AdamW or SAGE on everything else.

    An orthogonalised direction has entries of about 1 / sqrt(larger side), so its learning rate is about twenty
    times AdamW's. Give the other roles their own learning rates, or set ``consistent_rms=0.2``. With
    ``table_rank`` the state of a whole model is only thin factors and vectors.

    Args:
      learning_rate: a number or schedule for every role without a learning rate of its own.
      rank: rank of the matrices' factors; see `scale_by_lorapre_muon`.
      mu: see `scale_by_lorapre_muon`.
      ns_steps: see `scale_by_lorapre_muon`.
      eps: eps of Newton-Schulz, and of AdamW on the rest.
      nesterov: see `scale_by_lorapre_muon`.
      scale: see `scale_by_lorapre_muon`.
      consistent_rms: see `scale_by_lorapre_muon`.
      residual: see `scale_by_lorapre_muon`.
      gamma: see `low_rank_trace`.
      damping: see `low_rank_ema`.
      damping_kind: see `low_rank_ema`.
      initial_subspace: see `low_rank_ema`.
      factor_dtype: see `low_rank_ema`.
      full_rank_fallback: see `low_rank_ema`.
      whole_matrices: see `scale_by_lorapre_muon`.
      product_dtype: see `scale_by_lorapre_adam`; static.
      ns_dtype: see `scale_by_lorapre_muon`; static.
      adam_b1: b1 of AdamW on the rest.
      adam_b2: b2 of AdamW on the rest.
      table_rank: if given, embedding and head use LoRA-Pre Adam at this rank with the options of
        `lorapre_optax.RECOMMENDED`, and no matrix, embedding or head keeps a full moment. Not in the paper.
      table_rule: ``"factored_rms"`` gives embedding and head Adafactor's direction (arXiv:1804.04235): the
        gradient over a factored estimate of its rms, clipped to an rms of 1
        (`sage_optax.scale_by_factored_rms`). An embedding of V x d then keeps V + d floats. ``"sage"`` gives
        them SAGE's (`sage_optax.scale_by_sage`), ``"sage_int8"`` SAGE's with an int8 momentum. ``"others"``
        uses the rule of ``others``. Not in the paper.
      others: ``"adamw"`` or ``"sage"``; see `lorapre_adamw`.
      layout: see `layout_optax.ParamLayout`; None infers it.
      **whole_model: see `layout_optax.by_role`.

    Returns:
      The transformation; with `optax.inject_hyperparams` pass ``static_args=STATIC_ARGS``.

    Raises:
      ValueError: see `scale_by_lorapre_muon`; also for both a ``table_rank`` and a ``table_rule``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"mlp": {"kernel": jnp.ones((24, 40))}, "norm": {"scale": jnp.ones(40)}}
      >>> tx = lorapre_muon(2e-2, rank=4, vector_learning_rate=1e-3)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
      >>> print(updates["norm"]["scale"][0].round(6))
      -0.001
    """
    direction = scale_by_lorapre_muon(
        rank,
        mu,
        ns_steps=ns_steps,
        eps=eps,
        nesterov=nesterov,
        scale=scale,
        consistent_rms=consistent_rms,
        residual=residual,
        gamma=gamma,
        damping=damping,
        damping_kind=damping_kind,
        initial_subspace=initial_subspace,
        factor_dtype=factor_dtype,
        full_rank_fallback=full_rank_fallback,
        whole_matrices=whole_matrices,
        product_dtype=product_dtype,
        ns_dtype=ns_dtype,
        layout=layout,
    )
    check_adam(adam_b1, adam_b2, eps, prefix="adam_")
    table_rules = {
        "others": None,
        "factored_rms": scale_by_factored_rms(layout),
        "sage": scale_by_sage(layout=layout),
        "sage_int8": scale_by_sage(mu_dtype="int8", layout=layout),
    }
    table = choose("table_rule", table_rule, table_rules)
    if table_rank is not None and table is not None:
        raise ValueError(
            f"table_rank={table_rank!r} and table_rule={table_rule!r} both decide what embedding and head "
            "keep; give one of them."
        )
    if table_rank is not None:
        table = scale_by_lorapre_adam(
            table_rank,
            adam_b1,
            adam_b2,
            eps,
            factor_dtype=factor_dtype,
            product_dtype=product_dtype,
            layout=layout,
            **RECOMMENDED,
        )
    return route_matrices(
        direction,
        full_adam(adam_b1, adam_b2, eps),
        others=others,
        table=table,
        learning_rate=learning_rate,
        layout=layout,
        rank=rank,
        **whole_model,
    )
