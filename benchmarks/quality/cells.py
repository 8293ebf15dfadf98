"""Runs of the demo Llama as cells of a table: each is trained once, its result kept in a JSON file at once."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from examples.llama.comparing.rows import Row, make_row
from examples.llama.data.dataset import Dataset, prepare_data
from examples.llama.model.config import LlamaConfig
from examples.llama.optimizers.variants import Variant, parse_variant
from examples.llama.reporting.files import jsonable, read_json, write_json
from examples.llama.reporting.metrics import read_metrics
from examples.llama.training.config import TrainConfig, data_config, resolve
from examples.llama.training.program import Program
from examples.llama.training.run import prepare_run

_ANY_RATE = 1e-2
"""The rate of the configuration that says which data is meant."""
_QUIET = {"preset": "demo", "statistics_every": 0, "tensorboard": False, "checkpoint_every": 0}


class Cells:
    """The results of runs, kept in a file. A cell is a variant, a peak rate, a number of steps and a seed.

    Args:
        path: The JSON file.
        also: Files of other benchmarks whose cells count too; they are not written.
        model: A shape to use instead of the preset's.
        dataset: Prepared data to use instead of reading it.
        common: Fields of `TrainConfig` that all runs share.
        read_only: Whether cells are only read: the data of a new run is then not prepared, and the files may
            hold runs on data that this machine does not have.

    Attributes:
        steps_run: Steps of the cells that were run rather than found.

    Raises:
        ValueError: A file holds runs on other data than this machine's.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        also: Sequence[pathlib.Path] = (),
        model: LlamaConfig | None = None,
        dataset: Dataset | None = None,
        common: Mapping[str, Any] | None = None,
        read_only: bool = False,
    ):
        self.path, self.model, self.common = path, model, dict(common or {})
        if dataset is None and not read_only:
            config = self._config("adamw", _ANY_RATE, 1, 0)
            dataset = prepare_data(data_config(config, resolve(config, model)))
        self.dataset = dataset
        self.stored = self._read(path)
        self._others = [cell for other in also for cell in self._read(other)["cells"]]
        self._programs: dict[tuple[str, int], Program] = {}
        self.steps_run = 0

    def find(self, key: str, rate: float, steps: int, seed: int = 0) -> dict[str, Any] | None:
        """A cell, or None if it has not been run."""
        wanted = (key, rate, steps, seed)
        return next((cell for cell in self._cells() if _identity(cell) == wanted), None)

    def loss(self, key: str, rate: float, steps: int, seed: int = 0) -> float:
        """The held-out loss of a cell, which is run if it is missing; infinite if it diverged."""
        cell = self.find(key, rate, steps, seed)
        if cell is None:
            cell = self._run(key, rate, steps, seed)
            self.steps_run += steps
            self.stored["cells"].append(cell)
            write_json(self.path, self.stored)
        return float(cell["heldout_loss"]) if cell["status"] == "finished" else math.inf

    def select(self, key: str, steps: int, seed: int = 0) -> list[dict[str, Any]]:
        """The cells of a variant and length, by rate; those that diverged too."""
        found = [
            cell
            for cell in self._cells()
            if (cell["variant"], cell["steps"], cell["seed"]) == (key, steps, seed)
        ]
        return sorted(found, key=lambda cell: cell["learning_rate"])

    def best(self, key: str, steps: int, seed: int = 0) -> dict[str, Any] | None:
        """The cell of a variant with the lowest loss."""
        found = [cell for cell in self.select(key, steps, seed) if cell["status"] == "finished"]
        return min(found, key=lambda cell: cell["heldout_loss"], default=None)

    def rates(self, key: str, steps: int) -> list[float]:
        """The rates of a variant's cells, ascending."""
        return [cell["learning_rate"] for cell in self.select(key, steps)]

    def _cells(self) -> list[dict[str, Any]]:
        return [*self.stored["cells"], *self._others]

    def _read(self, path: pathlib.Path) -> dict[str, Any]:
        data = None if self.dataset is None else jsonable(self.dataset.describe())
        stored = read_json(path) or {"data": data, "cells": []}
        if data is not None and stored["data"] != data:
            raise ValueError(f"{path} holds runs on other data; move it away to start anew.")
        return stored

    def _config(
        self, key: str, rate: float, steps: int, seed: int, out: str = "unused"
    ) -> TrainConfig:
        return TrainConfig(
            **{**_QUIET, **self.common},
            **parse_variant(key).fields(),
            steps=steps,
            eval_every=-(-steps // 3),  # an evaluation costs as much as five steps
            learning_rate=rate,
            seed=seed,
            out=pathlib.Path(out),
        )

    @property
    def corpus(self) -> str:
        """The first digits of the hash of the text."""
        return (self.stored["data"] or {}).get("corpus_sha256", "")[:12]

    def _run(self, key: str, rate: float, steps: int, seed: int) -> dict[str, Any]:
        if self.dataset is None:
            raise ValueError(f"{self.path} was opened to read; no run is started.")
        with tempfile.TemporaryDirectory() as out:
            run = prepare_run(
                self._config(key, rate, steps, seed, out),
                model=self.model,
                dataset=self.dataset,
                program=self._programs.get((key, steps)),
                console=Console(quiet=True),
            )
            self._programs = {(key, steps): run.program}
            summary = run.train()
            if summary.status == "interrupted":
                raise KeyboardInterrupt
            row = make_row(summary, "searched", read_metrics(pathlib.Path(out)))
        found = parse_variant(key)
        row = dataclasses.replace(
            row,
            variant=key,
            label=found.label,
            rank=found.options.get("rank"),
            options=dict(found.options),
            train_curve=[],
        )
        print(
            f"{key} at {rate:g}, {steps} steps, seed {seed}: {row.heldout_perplexity:.2f}",
            flush=True,
        )
        return jsonable({**row.to_dict(), "steps": steps, "seed": seed})


def as_row(cell: Mapping[str, Any], named: Variant) -> Row:
    """A cell as a row of a comparison, under a variant's label and options."""
    return Row.from_dict({**cell, "label": named.label, "options": dict(named.options)})


def perplexity_text(cell: Mapping[str, Any] | None) -> str:
    """A cell's held-out perplexity for a table.

    >>> perplexity_text({"heldout_perplexity": 52.84}), perplexity_text(None)
    ('52.8', 'missing')
    >>> perplexity_text({"heldout_perplexity": "Infinity"})
    'diverged'
    """
    if cell is None:
        return "missing"
    perplexity = float(cell["heldout_perplexity"])
    return f"{perplexity:.1f}" if math.isfinite(perplexity) else "diverged"


def _identity(cell: Mapping[str, Any]) -> tuple[str, float, int, int]:
    return cell["variant"], cell["learning_rate"], cell["steps"], cell["seed"]
