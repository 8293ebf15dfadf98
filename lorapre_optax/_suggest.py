"""Suggests ranks from a few gradients: how many directions hold a given share of their mean."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from layout_optax.axes import compute_dtype, sharding_without
from layout_optax.layout import LayoutLike, ParamLayout, PyTree, is_empty, path_string
from layout_optax.leaves import flatten_with_layout
from lorapre_optax._factors import einsum_axes
from lorapre_optax._subspace import normalised


def suggest_ranks(
    params: PyTree, gradients: Sequence[PyTree], energy: float = 0.9, *, layout: LayoutLike = None
) -> dict[str, int]:
    """Suggests a rank for every parameter with rows and columns, from a few gradients.

    The mean of the gradients approximates a momentum M. The rank is the smallest r with ::

        sigma_1^2 + ... + sigma_r^2  >=  energy * ||M||_F^2

    and, for a stack, the largest such r over the batch indices, since its matrices share one rank. A few
    gradients of different batches, some way into training, are more informative than one at the start. The
    spectrum comes from the Gram matrix of the smaller side, in float32 or wider, so shares of the energy below
    about 1e-6 are rounding errors and count as zero.

    Args:
      params: a pytree of arrays or `jax.ShapeDtypeStruct`.
      gradients: one or more trees like ``params``.
      energy: the share that the factors should be able to hold, in (0, 1].
      layout: the ``layout`` of the optimizer; None infers it.

    Returns:
      A rank of at least 1 by path, for matrices, embeddings and heads: a valid ``rank`` argument. A zero mean
      gives 1. The result includes ranks that save no memory (see `lorapre_optax.RankLike`); the optimizer keeps
      full moments there.

    Raises:
      ValueError: for an energy out of range, no gradients, a gradient of another structure or shape, or one
        that is not finite (it names the path).
      TypeError: for a parameter that is not a real floating-point array.

    Example:
      >>> params = {"mlp": {"kernel": jnp.ones((24, 40))}, "norm": {"scale": jnp.ones(40)}}
      >>> suggest_ranks(params, [params])  # a matrix of ones has rank one
      {'mlp/kernel': 1}
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}.")
    if not gradients:
        raise ValueError("suggest_ranks needs at least one gradient, got none.")
    leaves = flatten_with_layout(layout, params)
    leaves.check_trainable()
    aligned = [_aligned(params, gradient, index) for index, gradient in enumerate(gradients)]
    ranks = {}
    for path, found, *own in zip(leaves.paths, leaves.layouts, *aligned, strict=True):
        if found is None or found.role == "vector" or any(map(is_empty, own)):
            continue
        if 0 in own[0].shape:
            continue
        spectra, finite = _spectra(own, found)
        if not np.all(finite):
            raise ValueError(
                f"suggest_ranks: gradient {int(np.argmin(finite))} of '{path}' is not finite."
            )
        ranks[path] = max(map(functools.partial(_rank, energy=energy), _rows(spectra)))
    return ranks


def _aligned(params: PyTree, gradient: PyTree, index: int) -> list[jax.Array]:
    """The gradient's leaves in the order of the parameters' leaves."""
    (ours, structure), (theirs, other) = (
        jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_empty) for tree in (params, gradient)
    )
    if structure != other:
        raise ValueError(
            f"gradient {index} has another structure than the parameters: {other}, not {structure}."
        )
    for (keys, param), (_, leaf) in zip(ours, theirs, strict=True):
        if not is_empty(param) and not is_empty(leaf) and np.shape(param) != np.shape(leaf):
            raise ValueError(
                f"gradient {index} of '{path_string(keys)}' has shape {np.shape(leaf)}, the parameter "
                f"{np.shape(param)}."
            )
    return [leaf for _, leaf in theirs]


@functools.partial(jax.jit, static_argnames="layout")
def _spectra(
    gradients: Sequence[jax.Array], layout: ParamLayout
) -> tuple[jax.Array, list[jax.Array]]:
    """Squared singular values of the mean, ascending, up to a scale: batch axes, then the smaller side.

    Also returns whether each gradient is finite.
    """
    wide = [jnp.asarray(g).astype(compute_dtype(g.dtype)) for g in gradients]
    finite = [jnp.all(jnp.isfinite(g)) for g in wide]
    core = layout.row_axes + layout.column_axes
    # Normalise before and after the mean, so that squares neither overflow nor underflow despite cancellation.
    largest = functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(g), axis=core, keepdims=True) for g in wide]
    )
    largest = jnp.where(largest > 0, largest, 1)
    mean = functools.reduce(jnp.add, [g / largest for g in wide]) / len(wide)
    peak = jnp.max(jnp.abs(mean), axis=core, keepdims=True)
    mean = jnp.where(peak > jnp.finfo(mean.dtype).eps, mean, 0)  # else only rounding error remains
    grams = _small_gram(normalised(mean, layout), layout)
    return jnp.linalg.eigvalsh(grams), finite


def _small_gram(matrix: jax.Array, layout: ParamLayout) -> jax.Array:
    """G G^T or G^T G, whichever is smaller, with (side, side) last; replicated."""
    names = einsum_axes(layout, matrix.ndim).param
    batch = "".join(names[axis] for axis in layout.batch_axes(matrix.ndim))
    size = lambda axes: int(np.prod([matrix.shape[axis] for axis in axes]))  # noqa: E731
    side = min(layout.row_axes, layout.column_axes, key=size)
    kept = "".join(names[axis] for axis in side)
    sharding = sharding_without(matrix, ())
    grams = jnp.einsum(
        f"{names},{names.translate(_upper(kept))}->{batch}{kept}{kept.upper()}",
        matrix,
        matrix,
        precision="highest",
        out_sharding=None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec()),
    )
    return grams.reshape(*grams.shape[: len(batch)], size(side), size(side))


def _upper(letters_kept: str) -> dict[int, int]:
    return str.maketrans(letters_kept, letters_kept.upper())


def _rows(spectra: jax.Array) -> Iterator[np.ndarray]:
    """Spectra in descending order, one per matrix."""
    yield from np.asarray(spectra, np.float64).reshape(-1, spectra.shape[-1])[:, ::-1]


def _rank(spectrum: np.ndarray, energy: float) -> int:
    """The smallest r whose first r entries hold ``energy`` of the sum."""
    rounding = 1e-6 * spectrum[0]
    spectrum = np.where(spectrum > rounding, spectrum, 0)
    held = np.cumsum(spectrum)
    # For energy = 1 the whole sum must be enough.
    return int(np.searchsorted(held, energy * held[-1] * (1 - 1e-12))) + 1
