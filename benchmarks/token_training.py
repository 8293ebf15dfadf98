"""Trains optimizers on a file of tokens, the same for each; needs JAX, optax and Flax only.

    python -m benchmarks.token_training --write tokens.npz --vocab-size 32000
    python -m benchmarks.token_training --tokens tokens.npz --preset galore_60m --steps 1000 \
        --optimizers adamw=1e-3,sage_hybrid=1e-3 --dtypes bfloat16

The first command needs the trainer's packages and makes the file from the standard library's text (or
`--data`); the second needs the file alone. Every optimizer takes its own rate after an `=`. Finished rows are
kept in token_training.json and not trained again.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import pathlib
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.common import circumstances, describe_circumstances, table
from benchmarks.peers import register_peers
from benchmarks.steps.programs import trainer_settings
from benchmarks.steps.updates import Store, device_name
from examples.llama.devices.host_memory import keep_freed_memory
from examples.llama.optimizers.variants import parse_variant, parse_variant_rates
from examples.llama.training.program import Program

KEYS = (
    "preset",
    "dtype",
    "variant",
    "learning_rate",
    "steps",
    "batch_size",
    "seq_len",
    "seed",
    "tokens_sha256",
    "device",
)
HELDOUT_BATCHES = 16


def write_tokens(path: pathlib.Path, data: str, vocab_size: int) -> None:
    """Tokenizes a corpus as the trainer does and stores both sides of its split, compressed."""
    from examples.llama.data.dataset import DataConfig, prepare_data

    found = prepare_data(DataConfig(data=data, vocab_size=vocab_size))
    np.savez_compressed(path, train=found.train_tokens, heldout=found.heldout_tokens)
    print(f"{path}: {len(found.train_tokens):,} tokens, {len(found.heldout_tokens):,} held out")


def windows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """All windows of `seq_len` predicted tokens; neighbours share a token.

    >>> windows(np.arange(10), 4).tolist()
    [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    """
    count = (len(tokens) - 1) // seq_len
    starts = seq_len * np.arange(count)[:, None]
    return tokens[starts + np.arange(seq_len + 1)].astype(np.int32)


def batches(found: np.ndarray, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of windows in a seeded order, another one in each epoch; none is filled across epochs.

    Raises:
        ValueError: There are fewer windows than a batch takes.
    """
    if len(found) < batch_size:
        raise ValueError(f"{len(found)} windows do not fill a batch of {batch_size}")
    rng, taken = np.random.default_rng(seed), 0
    while taken < steps:
        order = rng.permutation(len(found))
        for start in range(0, len(found) - batch_size + 1, batch_size):
            if taken == steps:
                return
            taken += 1
            yield found[order[start : start + batch_size]]


def train(
    program: Program,
    peak: float,
    train_windows: np.ndarray,
    heldout: Sequence[np.ndarray],
    seed: int,
) -> dict[str, Any]:
    """One run: the losses on the way, the held-out loss at the end, and the pace.

    The device is waited for at every twentieth of the run, where the loss is read.
    """
    settings = program.settings
    every = max(1, settings.steps // 20)
    program.compile()
    state, curve, began = program.init(seed), [], 0.0
    for number, tokens in enumerate(
        batches(train_windows, settings.batch_size, settings.steps, seed), start=1
    ):
        state, metrics, _ = program.step(state, {"tokens": tokens}, peak)
        if number == 1:
            jax.block_until_ready(state)
            began = time.perf_counter()  # the first step warms up
        if number % every == 0 or number == settings.steps:
            curve.append([number * settings.tokens_per_step, float(metrics.loss)])
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began
    loss, count = program.evaluate(state.params, [{"tokens": rows} for rows in heldout])
    finite = math.isfinite(loss)
    return {
        "heldout_loss": loss if finite else None,
        "heldout_perplexity": math.exp(loss) if finite else None,
        "heldout_tokens": count,
        "train_curve": curve,
        "tokens": settings.steps * settings.tokens_per_step,
        "tokens_per_second": (settings.steps - 1) * settings.tokens_per_step / seconds
        if settings.steps > 1
        else None,
        "optimizer_state_bytes": program.state_bytes(),
        "state_ratio": program.state_bytes() / program.adamw_state_bytes(),
        "parameters": program.parameter_count(),
    }


def page(content: dict[str, Any]) -> str:
    """The results as Markdown."""
    parts = [
        f"""# Training on a file of tokens

Every row saw the same batches at the rate that it names; none was searched here. Held-out perplexity after the
last step; tokens a second without the first step; state in MiB and as a share of AdamW's.

{describe_circumstances(content["circumstances"])}
"""
    ]
    groups = dict.fromkeys(_group(cell) for cell in content["cells"])
    for group in groups:
        cells = [cell for cell in content["cells"] if _group(cell) == group]
        cells.sort(key=lambda cell: cell["heldout_loss"] or math.inf)
        best = cells[0]["tokens_per_second"]
        preset, dtype, steps, batch_size, seq_len, device, sha256 = group
        rows = [
            [
                cell["label"],
                f"{cell['learning_rate']:g}",
                "diverged"
                if cell["heldout_perplexity"] is None
                else f"{cell['heldout_perplexity']:.2f}",
                f"{cell['optimizer_state_bytes'] / 2**20:.2f}",
                f"{100 * cell['state_ratio']:.2f} %",
                "-" if best is None else f"{cell['tokens_per_second']:,.0f}",
            ]
            for cell in cells
        ]
        header = ["optimizer", "rate", "perplexity", "state, MiB", "of AdamW's", "tokens/s"]
        title = f"{preset}, {dtype}, {steps} steps of {batch_size} x {seq_len} tokens, {device}"
        parts.append(f"## {title}\n\nTokens {sha256[:12]}.\n\n{table(header, rows)}\n")
    return "\n".join(parts)


def _group(cell: dict[str, Any]) -> tuple[Any, ...]:
    names = ("preset", "dtype", "steps", "batch_size", "seq_len", "device", "tokens_sha256")
    return tuple(cell[name] for name in names)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the tokens, or trains what is missing and writes token_training.json and .md.

    Args:
        arguments: command line, without the program's name.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=pathlib.Path, help="make this file of tokens and stop")
    parser.add_argument(
        "--data", default="stdlib", help="what to tokenize, as the trainer's --data"
    )
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--tokens", type=pathlib.Path, help="the file of tokens to train on")
    parser.add_argument("--preset", default="galore_60m")
    parser.add_argument("--dtypes", default="bfloat16", help="of the matrix products")
    parser.add_argument("--optimizers", default="adamw=1e-3,sage_hybrid=1e-3")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--seq-len", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/results"))
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    if options.write is not None:
        write_tokens(options.write, options.data, options.vocab_size)
        return
    if options.tokens is None:
        parser.error("give --tokens, or --write to make such a file")
    keep_freed_memory()
    register_peers()
    with np.load(options.tokens) as file:
        sides = {name: file[name] for name in ("train", "heldout")}
    sha256 = hashlib.sha256(sides["train"].tobytes() + sides["heldout"].tobytes()).hexdigest()
    store = Store(options.out / "token_training.json", KEYS)
    for dtype in options.dtypes.split(","):
        for key, rate in parse_variant_rates(options.optimizers).items():
            settings = trainer_settings(
                options.preset,
                key,
                compute_dtype=dtype,
                learning_rate=rate,
                steps=options.steps,
                batch_size=options.batch_size,
                seq_len=options.seq_len,
            )
            largest = max(int(side.max()) for side in sides.values())
            if largest >= settings.model.vocab_size:
                parser.error(
                    f"token {largest} is outside {options.preset}'s vocabulary of "
                    f"{settings.model.vocab_size}; make the file with a smaller --vocab-size"
                )
            names = (options.preset, dtype, key, rate, settings.steps, settings.batch_size)
            names += (settings.seq_len, options.seed, sha256, device_name())
            fields = dict(zip(KEYS, names, strict=True))
            if store.find(**fields) is not None:
                continue
            heldout = windows(sides["heldout"], settings.seq_len)
            count = min(HELDOUT_BATCHES, len(heldout) // settings.batch_size)
            if count == 0:
                parser.error(f"{len(heldout)} held-out windows do not fill a batch")
            cell = train(
                Program(settings),
                rate,
                windows(sides["train"], settings.seq_len),
                np.split(heldout[: count * settings.batch_size], count),
                options.seed,
            )
            cell = {**fields, "label": parse_variant(key).label, **cell}
            store.put(
                cell,
                circumstances(shlex.join(["python", "-m", "benchmarks.token_training", *given])),
            )
            print(f"{key} at {rate:g}: {cell['heldout_perplexity']}", flush=True)
    (options.out / "token_training.md").write_text(page(store.content))


if __name__ == "__main__":
    main()
