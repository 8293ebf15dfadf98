"""The records of a run: log lines, evaluations, failed steps, and the summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from examples.llama.reporting.clock import StepClock
from examples.llama.reporting.metrics import MetricsWriter
from examples.llama.reporting.progress import Progress
from examples.llama.reporting.summary import RunSummary, perplexity
from examples.llama.training.settings import Settings
from examples.llama.training.step import StepMetrics


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient was NaN or infinite for too many steps in a row."""

    def __init__(self, step: int, in_row: int, metrics: StepMetrics, settings: Settings):
        skipped = "its update" if in_row == 1 else f"the updates of {in_row} steps in a row"
        super().__init__(
            f"Step {step}: the loss is {float(metrics.loss):.4g} and the gradient's norm "
            f"{float(metrics.grad_norm):.4g} at learning rate {float(metrics.learning_rate):.3g} "
            f"(peak {settings.learning_rate:g}); {skipped} had to be skipped. Stopped; a lower "
            "--learning-rate or a longer --warmup-fraction may help."
        )


class Recorder:
    """Takes the steps' metrics, which may still be in computation, and writes them at log intervals.

    Attributes:
        summary: The summary so far.
        clock: The time of its steps.
        skipped_in_row: Number of consecutive skipped steps up to now.

    Args:
        summary: A new summary.
        settings: The run's settings.
        max_skipped: Number of consecutive skipped steps that stops the run.
        writer: The writer of the lines.
        progress: The display.
        name: The run's name in the display.
    """

    def __init__(
        self,
        summary: RunSummary,
        settings: Settings,
        max_skipped: int,
        writer: MetricsWriter,
        progress: Progress,
        name: str,
    ):
        self.summary, self.settings = summary, settings
        self.clock = StepClock()
        self.skipped_in_row = 0
        self._max_skipped = max_skipped
        self._writer, self._progress, self._name = writer, progress, name
        self._running: list[StepMetrics] = []
        self._fetched: list[StepMetrics] = []

    def add(self, metrics: StepMetrics) -> None:
        """Takes a step's metrics without waiting for them."""
        self._running.append(metrics)
        self.clock.count()

    def split(self) -> None:
        """Starts a new stretch of the clock, so that later steps are timed separately."""
        if self._running:
            jax.block_until_ready(self._running[-1])
            self.clock.stop(ordinary=True)
            self.clock.start()

    def fetch(self, step: int, *, ordinary: bool = True) -> None:
        """Waits for the device, ends the clock's stretch, and checks the metrics.

        Args:
            step: The last step taken.
            ordinary: Whether the stretch had only plain steps.

        Raises:
            NonFiniteLossError: Too many steps in a row were skipped.
        """
        came: Sequence[StepMetrics] = jax.device_get(self._running)
        self._running = []
        self.clock.stop(ordinary=ordinary)
        summary = self.summary
        for number, metrics in enumerate(came, step - len(came) + 1):
            summary.steps, summary.tokens = number, number * self.settings.tokens_per_step
            self._fetched.append(metrics)
            if not metrics.skipped:
                self.skipped_in_row = 0
                continue
            self.skipped_in_row += 1
            summary.skipped += 1
            values = {key: float(value) for key, value in metrics._asdict().items()}
            values["skipped"] = summary.skipped
            self._writer.write("non_finite", number, values)
            if self.skipped_in_row >= self._max_skipped:
                raise NonFiniteLossError(number, self.skipped_in_row, metrics, self.settings)
            self._progress.note(
                f"{self._name} step {number}: loss {metrics.loss:.4g}, gradient norm "
                f"{metrics.grad_norm:.4g}; update skipped ({self.skipped_in_row} in a row)"
            )

    def write(self, numbers: Mapping[str, Any]) -> None:
        """Writes a log line of the metrics since the last one, and of further numbers."""
        summary, settings, clock = self.summary, self.settings, self.clock
        seconds, steps = clock.interval()
        summary.train_loss = _mean([metrics.loss for metrics in self._fetched])
        summary.tokens_per_second = summary.tokens / clock.seconds
        summary.median_step_seconds = clock.median()
        last = self._fetched[-1]
        self._fetched = []
        line = {
            "loss": summary.train_loss,
            "loss_last": float(last.loss),
            "grad_norm": float(last.grad_norm),
            "learning_rate": float(last.learning_rate),
            "tokens": summary.tokens,
            "tokens_per_second": settings.tokens_per_step * steps / seconds,
            "seconds": clock.seconds,
        }
        if summary.skipped:
            line["skipped"] = summary.skipped
        self._writer.write("train", summary.steps, line)
        if numbers:
            found = jax.device_get(dict(numbers))
            self._writer.write(
                "statistics", summary.steps, {key: float(value) for key, value in found.items()}
            )
        self._progress.update(
            summary.steps,
            loss=line["loss"],
            tokens_per_second=line["tokens_per_second"],
            rate=line["learning_rate"],
            remaining=(settings.steps - summary.steps) * clock.seconds / clock.steps,
        )

    def evaluated(self, loss: float, tokens: int) -> None:
        """Writes the result of an evaluation after the last fetched step."""
        summary = self.summary
        summary.heldout_loss, summary.heldout_tokens = loss, tokens
        summary.heldout_step = summary.steps
        line = {"loss": loss, "perplexity": perplexity(loss), "tokens": summary.tokens}
        self._writer.write("heldout", summary.steps, line)
        self._progress.note(
            f"{self._name} step {summary.steps}: held-out loss {loss:.4f}, "
            f"perplexity {line['perplexity']:.3f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs to write the same lines, as JSON."""
        return {
            "summary": self.summary.to_dict(),
            "clock": self.clock.to_dict(),
            "skipped_in_row": self.skipped_in_row,
            "since_last_line": [list(metrics) for metrics in self._fetched],
        }

    def go_on_from(self, stored: Mapping[str, Any]) -> None:
        """Restores the state from `to_dict`; the run's constants (optimizer, bytes, planned steps) stay."""
        saved = RunSummary.from_dict(stored["summary"])
        for name in _REACHED:
            value = getattr(saved, name)
            # Strict JSON has no NaN; see `files.jsonable`.
            setattr(self.summary, name, float(value) if isinstance(value, str) else value)
        self.clock = StepClock.from_dict(stored["clock"])
        self.skipped_in_row = stored["skipped_in_row"]
        self._fetched = [_metrics(*row) for row in stored["since_last_line"]]


_REACHED = (
    *("steps", "skipped", "tokens", "train_loss", "heldout_loss", "heldout_tokens", "heldout_step"),
    *("tokens_per_second", "median_step_seconds", "compile_seconds", "total_seconds"),
)
"""The fields of a summary that show the progress of a run."""


def _metrics(loss: Any, grad_norm: Any, learning_rate: Any, skipped: bool) -> StepMetrics:
    """Metrics from JSON: float32 again, and NaN where JSON has its name."""
    numbers: Any = [np.float32(float(value)) for value in (loss, grad_norm, learning_rate)]
    return StepMetrics(numbers[0], numbers[1], numbers[2], np.bool_(skipped))  # pyright: ignore[reportArgumentType]


def _mean(losses: Sequence[Any]) -> float:
    """The mean of the finite numbers, NaN if there are none."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return float(np.mean(finite)) if finite else math.nan
