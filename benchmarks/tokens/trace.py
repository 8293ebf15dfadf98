"""Follows one optimizer over a run: what its updates are by role, and how far rare and frequent rows move."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tokens.file import Tokens, batches, windows
from benchmarks.tokens.program import OutOfTimeError, TokenProgram
from examples.llama.optimizers.sage import damper_arguments
from examples.llama.training.step import StepRecord
from examples.llama.training.step_statistics import damper_statistics, update_statistics
from layout_optax import resolve_layout

GROUPS = 4
"""Groups of the table's rows by how often their tokens occur, with as many rows each."""


def trace_run(
    program: TokenProgram,
    tokens: Tokens,
    rate: float,
    ratio: float = 1.0,
    *,
    seed: int = 0,
    points: int = 20,
    left: Callable[[], float] = lambda: float("inf"),
) -> dict[str, Any]:
    """One run with statistics of every step, averaged over `points` stretches of it.

    Args:
        program: The optimizer's.
        tokens: What to train on.
        rate: Peak rate.
        ratio: The tables' rate over it.
        seed: Of parameters and order.
        points: Stretches of the run.
        left: Seconds that are left.

    Returns:
        `points`: for each stretch `tokens` at its end, the mean training `loss`, and the means of
        `update/ROLE/rms`, `damper/ROLE/mean` (SAGE only), `cosine/ROLE` (of successive updates),
        `spectrum/gradient` and `spectrum/update` (mean over the matrices of the squared norm over the squared
        spectral norm, their stable rank), `common/update` and `common/moved` (the part of the table's update,
        and of its distance from the start at the end of the stretch, that all rows share, of its squared norm),
        `rows/GROUP/update` and `rows/GROUP/moved` (rms of a row group's update and of that distance), groups
        from the rarest, 0, to the most frequent;
        `group_share`: the share of the training tokens that each group is.

    Raises:
        OutOfTimeError: No seconds are left.
    """
    settings = program.settings
    groups, share = row_groups(tokens.train, settings.model.vocab_size)
    start = program.program.init(seed)
    state, table = start, _table(start.params).copy()
    previous = jax.tree.map(jnp.zeros_like, state.params)
    step = jax.jit(_step(program, jnp.asarray(groups)), donate_argnums=(0, 2))
    every = max(1, settings.steps // points)
    operands = (np.float32(rate), np.float32(ratio))
    sums: dict[str, list[float]] = defaultdict(list)
    found = []
    fed = batches(
        windows(tokens.train, settings.seq_len), settings.batch_size, settings.steps, seed
    )
    for number, batch in enumerate(fed, start=1):
        state, previous, numbers = step(state, batch, previous, table, *operands)
        for name, value in jax.device_get(numbers).items():
            if number > 1 or not name.startswith("cosine/"):  # the first update has no last one
                sums[name].append(float(value))
        if number % every == 0 or number == settings.steps:
            moved = {name: values[-1] for name, values in sums.items() if name.endswith("/moved")}
            means = {name: float(np.mean(values)) for name, values in sums.items()}
            rounded = {n: float(f"{value:.5g}") for n, value in {**means, **moved}.items()}
            found.append({"tokens": number * settings.tokens_per_step, **rounded})
            sums.clear()
            if left() <= 0:
                raise OutOfTimeError
    return {"points": found, "group_share": [round(float(part), 5) for part in share]}


def row_groups(train: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The group of every token, 0 the rarest, and each group's share of the occurrences.

    >>> groups, share = row_groups(np.array([0, 0, 0, 1, 1, 2]), 4)
    >>> groups.tolist(), share.round(2).tolist()
    ([3, 2, 1, 0], [0.0, 0.17, 0.33, 0.5])
    """
    counts = np.bincount(train, minlength=vocab_size)
    order = np.argsort(counts, kind="stable")
    groups = np.empty(vocab_size, np.int32)
    groups[order] = np.arange(vocab_size) * GROUPS // vocab_size
    share = np.bincount(groups, weights=counts, minlength=GROUPS) / counts.sum()
    return groups, share


def trace(
    worker: Any, variant: str, rate: float, table_rate: float | None = None
) -> dict[str, Any]:
    """A trace with what it is of, for the store; without a rate of the tables both are the same."""
    program = worker.program_of(variant)
    table_rate = rate if table_rate is None else table_rate
    found = trace_run(program, worker.tokens, rate, table_rate / rate, left=worker.left)
    rates = {"learning_rate": rate, "table_rate": table_rate}
    return {**worker.shared(), "variant": variant, **rates, **found}


def _step(program: TokenProgram, groups: jax.Array) -> Callable[..., Any]:
    settings = program.settings

    def step(state: Any, tokens: Any, previous: Any, table: Any, rate: Any, ratio: Any) -> Any:
        def statistics(record: StepRecord) -> dict[str, Any]:
            numbers: dict[str, Any] = {
                name: value
                for name, value in update_statistics(record.params, record.updates).items()
                if name.endswith("/rms")
            }
            damper = damper_statistics(
                record.gradients,
                record.old_state,
                record.new_state,
                **damper_arguments(settings.options),
            )
            numbers |= {name: value for name, value in damper.items() if name.endswith("/mean")}
            numbers |= _cosines(record.updates, previous)
            numbers["spectrum/gradient"] = stable_rank(record.gradients)
            numbers["spectrum/update"] = stable_rank(record.updates)
            update = _table(record.updates)
            moved = _table(record.params) + update - table
            for what, rows in (("update", update), ("moved", moved)):
                squares = jnp.mean(jnp.square(rows), axis=1)
                shared = jnp.mean(jnp.square(jnp.mean(rows, axis=0)))
                numbers[f"common/{what}"] = shared / jnp.maximum(jnp.mean(squares), 1e-30)
                mean = jax.ops.segment_sum(squares, groups, GROUPS) / jnp.bincount(
                    groups, length=GROUPS
                )
                numbers |= {f"rows/{n}/{what}": jnp.sqrt(mean[n]) for n in range(GROUPS)}
            return {"numbers": numbers, "updates": record.updates}

        state, loss, found = program.train_step(state, tokens, rate, ratio, statistics)
        return state, found["updates"], {"loss": loss, **found["numbers"]}

    return step


def _cosines(updates: Any, previous: Any) -> dict[str, jax.Array]:
    """The cosine of two updates by role."""
    sums: dict[str, list[jax.Array]] = {}
    layouts = jax.tree.leaves(resolve_layout(None, updates))
    leaves = zip(layouts, jax.tree.leaves(updates), jax.tree.leaves(previous), strict=True)
    for layout, new, old in leaves:
        three = jnp.stack([jnp.vdot(new, old), jnp.vdot(new, new), jnp.vdot(old, old)])
        sums.setdefault(layout.role, []).append(three)
    found = {}
    for role, parts in sums.items():
        dot, new, old = sum(parts[1:], parts[0])
        found[f"cosine/{role}"] = dot / jnp.maximum(jnp.sqrt(new * old), 1e-30)
    return found


def stable_rank(tree: Any) -> jax.Array:
    """The mean over the model's matrices of their squared norm over their squared spectral norm.

    >>> kernel = jnp.stack([jnp.eye(4), jnp.ones((4, 4))])
    >>> round(float(stable_rank({"layers": {"up_proj": {"kernel": kernel}}})), 3)
    2.5
    """
    layouts = jax.tree.leaves(resolve_layout(None, tree))
    matrices = [
        leaf.reshape(-1, *leaf.shape[-2:])  # the model stacks its layers on leading axes
        for layout, leaf in zip(layouts, jax.tree.leaves(tree), strict=True)
        if layout.role == "matrix"
    ]
    ranks = []
    for stack in matrices:
        largest = jnp.max(jnp.abs(stack), axis=(1, 2), keepdims=True)
        stack = stack / jnp.where(largest > 0, largest, 1.0)
        squares = jnp.sum(jnp.square(stack), axis=(1, 2))
        ranks.append(squares / jnp.maximum(jnp.square(jnp.linalg.norm(stack, 2, (1, 2))), 1e-30))
    return jnp.mean(jnp.concatenate(ranks))


def _table(params: Any) -> jax.Array:
    """The embedding, a row a token."""
    layouts = jax.tree.leaves(resolve_layout(None, params))
    return next(
        leaf
        for layout, leaf in zip(layouts, jax.tree.leaves(params), strict=True)
        if layout.role == "embedding"
    )
