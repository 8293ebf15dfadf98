"""A comparison: one run per optimizer at its own learning rate, and the resulting rows and files."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from examples.llama.comparing.plots import plot_comparison
from examples.llama.comparing.rank_plot import has_ranks, plot_ranks
from examples.llama.comparing.rows import Row, make_row, markdown_table, rich_table, with_times
from examples.llama.comparing.timing import paired_step_times
from examples.llama.comparing.tuning import SearchResult, TrialStore, search_rate
from examples.llama.data.batches import train_iterator
from examples.llama.data.dataset import Dataset, prepare_data
from examples.llama.devices.processes import is_main
from examples.llama.model.config import LlamaConfig
from examples.llama.optimizers.rates import TUNED_RATES, tuned_rate
from examples.llama.optimizers.registry import OPTIMIZERS
from examples.llama.optimizers.variants import (
    nearest_rate,
    parse_variant,
    parse_variant_rates,
    parse_variants,
)
from examples.llama.reporting.files import (
    CONFIG,
    METRICS,
    SUMMARY,
    command_line,
    jsonable,
    read_json,
    same_json,
    versions,
    write_json,
)
from examples.llama.reporting.folders import check_output
from examples.llama.reporting.locks import FolderLock
from examples.llama.reporting.metrics import read_metrics
from examples.llama.reporting.progress import duration, say
from examples.llama.reporting.summary import RunSummary
from examples.llama.training.config import JobConfig, TrainConfig, data_config, resolve
from examples.llama.training.program import Program
from examples.llama.training.run import prepare_run
from examples.llama.training.settings import Settings

REFERENCE = "adamw"
"""The reference optimizer for state and step time."""

ENDED = ("finished", "non_finite")
"""Statuses of runs that will not be repeated: they finished, or cannot continue."""

UNTUNED_START = 1e-3
"""Start of a search if the table has no learning rate."""


@dataclass(frozen=True)
class CompareConfig(JobConfig):
    """Trains one model with several optimizers, each at its own tuned learning rate, and compares them."""

    optimizers: Annotated[
        str,
        tyro.conf.arg(
            help=f"Names, separated by commas: {', '.join(OPTIMIZERS)}; each may carry options: "
            "name:option=value:matrix_rate=0.25."
        ),
    ] = "adamw,lion_hybrid,sage_hybrid,sage_hybrid_int8"
    out: Path = Path("runs/compare")
    """Folder for the table, the picture and the runs."""
    rates: str | None = None
    """Peak learning rates to use instead of the tuned ones: adamw=1e-3,galore:rank=16=1e-2."""
    tune: bool = False
    """Search each optimizer's learning rate first, except those given by --rates."""
    tune_fraction: float = 0.25
    """Length of a search's runs, as a share of the steps."""
    tune_factor: float = 2.0
    """Ratio of neighbouring learning rates in the search."""
    tune_trials: int = 8
    """Largest number of runs per search."""
    timing_rounds: int = 10
    """Steps of each optimizer to time in turns with AdamW's at the end; 0 for none."""
    time_budget: float | None = None
    """Minutes that runs and timing may take on this machine; if necessary the runs take fewer steps."""
    resume: bool = True
    """Keep the results of an earlier call with the same settings."""


class Comparison:
    """A comparison, checked and ready to start.

    Args:
        config: The configuration.
        model: A shape to use instead of the preset's.
        dataset: Prepared data to use instead of reading it.
        console: Where to show progress; by default standard output.

    Raises:
        ValueError: The configuration, the data or the batch cannot be used.
    """

    def __init__(
        self,
        config: CompareConfig,
        *,
        model: LlamaConfig | None = None,
        dataset: Dataset | None = None,
        console: Console | None = None,
    ):
        check_output(config.out, "comparison", {"--data": config.data})
        self.config, self.model = config, model
        self.console = console or Console()
        self.names = [variant.key for variant in parse_variants(config.optimizers)]
        self.rates = self._start_rates()
        self._programs: dict[str, Program] = {}
        settings = [self._checked(name) for name in self.names]
        if dataset is None:
            dataset = prepare_data(data_config(self._train_config(self.names[0]), settings[0]))
        self.dataset = dataset
        # Refuse everything that can be refused now, not after the first run.
        prepare_run(
            self._train_config(self.names[0]), model=model, dataset=dataset, console=self.console
        )

    def run(self) -> list[Row]:
        """Searches learning rates on request, trains, times, writes and shows; returns the rows.

        Raises:
            KeyboardInterrupt: From the keyboard, after the results of the running part are on disk.
        """
        with FolderLock(self.config.out, active=is_main()):
            return self._run()

    def _run(self) -> list[Row]:
        self._fit_time_budget()
        if self.config.tune:
            self._tune()
        rates = ", ".join(f"{name} {rate:g} ({why})" for name, (rate, why) in self.rates.items())
        self._say(f"Peak rates: {rates}")
        rows = [self._trained_row(name) for name in self.names]
        rows = self._timed(rows)
        return self._publish(rows)

    def _publish(self, rows: list[Row]) -> list[Row]:
        config, out = self.config, self.config.out
        command = command_line("examples.llama.compare")
        picture = out / "comparison.png"
        result = {
            "rows": [row.to_dict() for row in rows],
            "config": config,
            "steps": rows[0].summary.steps,
            "data": self.dataset.describe(),
            "versions": versions(),
            "command": command,
        }
        write_json(out / "comparison.json", result)
        (out / "table.md").write_text(markdown_table(rows), encoding="utf-8")
        # The more tokens a step has, the less the time of an update counts: state the step with the table.
        settings = resolve(self._train_config(self.names[0]), self.model)
        title = (
            f"{config.preset}: held-out text after {max(row.summary.tokens for row in rows):,} tokens, "
            f"steps of {settings.batch_size} x {settings.seq_len}"
        )
        plot_comparison(rows, picture, title, f"{command}   corpus {self._corpus()}")
        if has_ranks(rows):
            plot_ranks(rows, out / "ranks.png", title, f"{command}   corpus {self._corpus()}")
            self._say(f"Ranks: {out / 'ranks.png'}")
        self.console.print(rich_table(rows, title))
        self._say(f"Corpus {self._corpus()}, seed {config.seed}. Table: {out / 'table.md'}")
        self._say(f"Picture: {picture}")
        return rows

    def _trained_row(self, name: str) -> Row:
        """The row of a finished run, or of a new one."""
        config = self._train_config(name)
        settings = resolve(config, self.model)
        summary = self._stored(config.out, settings) if self.config.resume else None
        if summary is None:
            summary = self._train(name, config)
        else:
            self._say(f"{name}: kept the run in {config.out}")
        row = make_row(summary, self.rates[name][1], read_metrics(config.out))
        variant = parse_variant(name)
        return dataclasses.replace(
            row,
            variant=name,
            label=variant.label,
            rank=settings.options.rank,
            options=dict(variant.options),
        )

    def _train(self, name: str, config: TrainConfig) -> RunSummary:
        run = prepare_run(
            config,
            model=self.model,
            dataset=self.dataset,
            program=self._programs.get(name),
            console=self.console,
            name=name,
        )
        self._programs[name] = run.program
        summary = run.train()
        if summary.status not in ENDED:
            raise KeyboardInterrupt
        if summary.message:
            self._say(f"{name}: {summary.message}")
        return summary

    def _stored(self, folder: Path, settings: Settings) -> RunSummary | None:
        """The summary of a run in a folder, if it finished with the same settings."""
        summary, found = read_json(folder / SUMMARY), read_json(folder / CONFIG)
        if summary is None or found is None or not (folder / METRICS).exists():
            return None
        same = same_json(found, {**found, **self._identity(settings)})
        if summary["status"] not in ENDED or not same:
            return None
        return RunSummary.from_dict(summary)

    def _identity(self, settings: Settings) -> dict[str, Any]:
        """The settings that two runs of the same experiment share, as JSON."""
        return jsonable(
            {"settings": settings, "data": self.dataset.describe(), "versions": versions()}
        )

    def _tune(self) -> None:
        """Searches the missing learning rates, and writes the results."""
        config, found = self.config, {}
        for name, (start, source) in self.rates.items():
            if source == "given":
                continue
            result = self._search(name, start)
            trials = ", ".join(f"{trial.rate:g}: {trial.loss:.4f}" for trial in result.trials)
            edge = "; the best is at the edge, --tune-trials was reached" if result.at_edge else ""
            self._say(f"{name}: best rate {result.best.rate:g} of {trials}{edge}")
            found[name] = result.best.rate
            self.rates[name] = (result.best.rate, "searched")
        write_json(config.out / "tuned_rates.json", {config.preset: found})
        self._say(f"Rates found, as JSON: {config.out / 'tuned_rates.json'}")

    def _search(self, name: str, start: float) -> SearchResult:
        config = self.config
        full = resolve(self._train_config(name), self.model)
        steps = max(1, round(config.tune_fraction * full.steps))
        trial_config = dataclasses.replace(
            self._train_config(name),
            steps=steps,
            eval_every=steps,
            out=config.out / "tuning" / parse_variant(name).folder,
            overwrite=True,
        )
        settings = dataclasses.replace(resolve(trial_config, self.model), learning_rate=1.0)
        settings = dataclasses.replace(settings, rate_source="")

        def run(rate: float) -> float:
            summary = self._train(name, dataclasses.replace(trial_config, learning_rate=rate))
            finished = summary.status == "finished" and summary.heldout_loss is not None
            return summary.heldout_loss if finished and summary.heldout_loss else float("inf")

        store = TrialStore(
            config.out / "tuning" / f"{parse_variant(name).folder}.json",
            self._identity(settings),
            keep=config.resume,
        )
        return search_rate(
            store.remember(run), start, factor=config.tune_factor, max_trials=config.tune_trials
        )

    def _timed(self, rows: list[Row]) -> list[Row]:
        """Adds step times to the rows, since the runs' own times come from different minutes of the machine."""
        rounds = self.config.timing_rounds
        if not rounds:
            return rows
        store = self.config.out / "timing.json"
        stored = read_json(store) if self.config.resume else None
        times: dict[str, Any] = stored or {}
        others = [row.variant for row in rows if row.variant != REFERENCE]
        for name in others:
            identity = [self._program_identity(REFERENCE), self._program_identity(name)]
            if name in times and same_json(times[name]["programs"], identity):
                continue
            self._say(f"{name}: timing {rounds} steps in turns with {REFERENCE}")
            program = self._program(name)
            settings = program.settings
            batches = train_iterator(self.dataset, settings.batch_size, settings.seq_len)
            some = [next(batches) for _ in range(4)]
            found = paired_step_times(program, self._program(REFERENCE), some, rounds)
            times[name] = {
                "programs": identity,
                "ratio": found.ratio,
                "seconds": found.median,
                "reference_seconds": found.reference_median,
            }
            write_json(store, times)
        if others:
            reference = statistics.median(times[name]["reference_seconds"] for name in others)
            times[REFERENCE] = {"ratio": 1.0, "seconds": reference}
        return [
            with_times(row, times[row.variant]["ratio"], times[row.variant]["seconds"])
            if row.variant in times
            else row
            for row in rows
        ]

    def _program(self, name: str) -> Program:
        """The compiled program of an optimizer's run."""
        settings = resolve(self._train_config(name), self.model)
        program = self._programs.get(name)
        if program is None or not program.serves(settings):
            program = self._programs[name] = Program(settings)
        program.compile()
        return program

    def _program_identity(self, name: str) -> Any:
        settings = resolve(self._train_config(name), self.model)
        return self._identity(dataclasses.replace(settings, learning_rate=1.0, rate_source=""))

    def _fit_time_budget(self) -> None:
        """Takes fewer steps if the planned ones exceed the time budget on this machine."""
        config = self.config
        if config.time_budget is None:
            return
        plan = config.out / "plan.json"
        wanted = jsonable(dataclasses.replace(config, resume=True))
        stored = read_json(plan)
        if config.resume and stored is not None and stored["config"] == wanted:
            steps = stored["steps"]
        else:
            steps = self._steps_in_budget(60.0 * config.time_budget)
            write_json(plan, {"config": wanted, "steps": steps})
        self.config = dataclasses.replace(config, steps=steps)

    def _steps_in_budget(self, budget: float) -> int:
        started = time.perf_counter()
        program = self._program(REFERENCE)
        settings = program.settings
        batches = train_iterator(self.dataset, settings.batch_size, settings.seq_len)
        some = [next(batches) for _ in range(4)]
        step = paired_step_times(program, program, some, 2).median
        spent = time.perf_counter() - started
        # Fixed costs: a compilation for each run, ten evaluations at about a third of a step per batch, and the
        # timing at the end.
        count = len(self.names)
        fixed = spent + count * (
            2 * program.compile_seconds
            + 10 * settings.eval_batches * step / 3
            + 2 * self.config.timing_rounds * step
        )
        affordable = int((budget - fixed) / (count * 1.1 * step))
        steps = max(min(settings.steps, affordable), min(settings.steps, 20))
        if steps < settings.steps:
            need = fixed + count * 1.1 * step * settings.steps
            self._say(
                f"A step of AdamW takes {step:.2f} s here, so {settings.steps} steps of {count} "
                f"optimizers would take about {duration(need)}: {steps} steps instead "
                f"(--time-budget {self.config.time_budget:g})."
            )
        return steps

    def _checked(self, name: str) -> Settings:
        """The settings of a variant's run; errors carry its name."""
        try:
            return resolve(self._train_config(name), self.model)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}" if ":" in name else str(error)) from None

    def _train_config(self, name: str) -> TrainConfig:
        variant = parse_variant(name)
        shared = {
            field.name: getattr(self.config, field.name) for field in dataclasses.fields(JobConfig)
        }
        return TrainConfig(
            # Variants may have different weight decay.
            **{**shared, **variant.fields()},
            learning_rate=self.rates[name][0] if name in self.rates else UNTUNED_START,
            out=self.config.out / "runs" / variant.folder,
            overwrite=True,
            statistics_every=0,
            tensorboard=False,
            checkpoint_every=0,
        )

    def _start_rates(self) -> dict[str, tuple[float, str]]:
        """Each variant's peak learning rate and its source: given, the table, or a start to search from."""
        config = self.config
        given = parse_variant_rates(config.rates)
        rates = {}
        for name in self.names:
            if name in given:
                rates[name] = (given[name], "given")
            elif config.tune and name not in TUNED_RATES.get(config.preset, {}):
                near = nearest_rate(config.preset, parse_variant(name))
                rates[name] = (near[1] if near else UNTUNED_START, "start of the search")
            else:
                rates[name] = tuned_rate(config.preset, name)
        return rates

    def _corpus(self) -> str:
        return self.dataset.corpus_sha256[:12]

    def _say(self, text: str) -> None:
        say(self.console, text)
