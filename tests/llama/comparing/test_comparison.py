"""The comparison: same start and batches, own rates, continuation, search, budget, table and picture."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pathlib

import numpy as np
import pytest
from rich.console import Console

from benchmarks.peers import PEERS
from examples.llama.compare import main
from examples.llama.comparing import comparison as comparison_module
from examples.llama.comparing.comparison import CompareConfig, Comparison
from examples.llama.comparing.plots import plot_comparison
from examples.llama.comparing.rows import Row, markdown_table, rich_table
from examples.llama.comparing.timing import paired_step_times
from examples.llama.optimizers.rates import TUNED_RATES
from examples.llama.optimizers.variants import parse_variant, parse_variants
from examples.llama.reporting.files import jsonable, read_json, write_json
from examples.llama.reporting.metrics import read_metrics
from examples.llama.training.program import Program
from examples.llama.training.run import Run
from tests.llama import tiny

DEMO = pathlib.Path(__file__).parents[3] / "docs" / "results" / "demo"

RATES = "adamw=1e-2,lion=3e-3"


@pytest.fixture(autouse=True)
def shared_programs(monkeypatch):
    """Programs compiled by one test serve the others: the tests are about what runs, not compiling."""

    def shared(settings):
        for program in PROGRAMS:
            if program.serves(settings):
                return program
        PROGRAMS.append(Program(settings))
        return PROGRAMS[-1]

    monkeypatch.setattr("examples.llama.training.run.Program", shared)
    monkeypatch.setattr(comparison_module, "Program", shared)


PROGRAMS: list[Program] = []


def comparison(out, **fields):
    defaults = {
        "optimizers": "adamw,lion",
        "rates": RATES,
        "steps": 8,
        "batch_size": 8,
        "seq_len": 16,
        "eval_every": 4,
        "eval_batches": 2,
        "log_every": 2,
        "timing_rounds": 2,
    }
    config = CompareConfig(out=out, **{**defaults, **fields})
    console = tiny.quiet_console()
    return Comparison(config, model=tiny.MODEL, dataset=tiny.dataset(), console=console)


def text_of(found):
    return found.console.file.getvalue()


def count_runs(monkeypatch):
    """A list that gets the optimizer and rate of every run from now on."""
    started, train = [], Run.train

    def counted(self):
        started.append((self.settings.optimizer, self.settings.learning_rate, self.settings.steps))
        return train(self)

    monkeypatch.setattr(Run, "train", counted)
    return started


def test_a_comparison_writes_table_picture_and_json(tmp_path):
    found = comparison(tmp_path)
    rows = found.run()
    assert [row.optimizer for row in rows] == ["adamw", "lion"]
    assert [row.summary.learning_rate for row in rows] == [1e-2, 3e-3]
    assert [row.summary.state_ratio for row in rows] == [1.0, pytest.approx(0.5, abs=1e-3)]
    assert rows[0].step_time_ratio == 1.0
    assert rows[1].step_time_ratio is not None
    assert rows[1].step_time_ratio > 0
    # The first interval's training loss is that of the same parameters on the same batches.
    assert rows[0].train_curve[0][1] == pytest.approx(rows[1].train_curve[0][1], rel=0.02)

    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["heldout_loss"] for row in stored["rows"]] == [row.heldout_loss for row in rows]
    assert stored["rows"][0]["heldout_curve"][-1] == [1024, rows[0].heldout_loss]
    assert stored["data"]["corpus_sha256"] == tiny.dataset().corpus_sha256
    assert stored["command"].startswith("python -m examples.llama.compare")
    table = (tmp_path / "table.md").read_text()
    assert f"| Lion | {rows[1].heldout_perplexity:.2f} |" in table
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "ranks.png").exists()
    text = text_of(found)
    assert "Peak rates: adamw 0.01 (given), lion 0.003 (given)" in text
    assert "tokens, steps of 8 x 16" in " ".join(text.split())
    assert text.strip().endswith(f"Picture: {tmp_path / 'comparison.png'}")


def test_all_start_from_the_same_parameters_and_see_the_same_batches(tmp_path, monkeypatch):
    seen, step = {}, Program.step

    def watched(self, state, batch, peak, **options):
        name = self.settings.optimizer
        first = np.asarray(state.params["embed_tokens"]["embedding"])[:2, :2].tobytes()
        seen.setdefault(name, []).append(
            (batch["tokens"].tobytes(), None if seen.get(name) else first)
        )
        return step(self, state, batch, peak, **options)

    monkeypatch.setattr(Program, "step", watched)
    comparison(tmp_path, timing_rounds=0).run()
    assert len(seen["adamw"]) == 8
    assert seen["adamw"] == seen["lion"]


def test_an_interrupted_comparison_continues_without_repeating(tmp_path, monkeypatch):
    started, step = count_runs(monkeypatch), Program.step

    def interrupted(self, *arguments, **options):
        if self.settings.optimizer == "lion":
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    first = comparison(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Program, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            first.run()
    assert [name for name, *_ in started] == ["adamw", "lion"]
    kept = (tmp_path / "runs" / "adamw" / "summary.json").read_bytes()

    started.clear()
    rows = comparison(tmp_path).run()
    assert [name for name, *_ in started] == ["lion"]
    assert (tmp_path / "runs" / "adamw" / "summary.json").read_bytes() == kept
    assert all(row.finished for row in rows)

    # A third call repeats nothing, not even the timing; without --resume all is made again.
    started.clear()
    with monkeypatch.context() as patch:
        patch.setattr(comparison_module, "paired_step_times", None)
        again = comparison(tmp_path).run()
    assert started == []
    assert again == rows
    comparison(tmp_path, resume=False, timing_rounds=0).run()
    assert len(started) == 2


def test_a_finished_run_under_other_settings_is_not_taken_for_this_one(tmp_path, monkeypatch):
    comparison(tmp_path, timing_rounds=0).run()
    started = count_runs(monkeypatch)
    comparison(tmp_path, timing_rounds=0, rates="adamw=1e-2,lion=1e-3").run()
    assert started == [("lion", 1e-3, 8)]
    other = dataclasses.replace(tiny.dataset(), corpus_sha256="9" * 64)
    changed = comparison(tmp_path, timing_rounds=0)
    changed.dataset = other
    started.clear()
    changed.run()
    assert len(started) == 2


def test_a_run_that_diverges_is_a_row_of_its_own(tmp_path):
    rows = comparison(tmp_path, rates="adamw=1e30,lion=3e-3", timing_rounds=0).run()
    assert [row.summary.status for row in rows] == ["non_finite", "finished"]
    assert rows[0].heldout_perplexity == math.inf
    assert "diverged (" in (tmp_path / "table.md").read_text()
    assert read_json(tmp_path / "comparison.json")["rows"][0]["heldout_loss"] == "Infinity"


def test_tuning_searches_short_runs_and_uses_and_writes_what_it_finds(tmp_path, monkeypatch):
    started = count_runs(monkeypatch)
    fields = {
        "tune": True,
        "rates": "lion=3e-3",
        "tune_factor": 10.0,
        "tune_fraction": 0.5,
        "timing_rounds": 0,
    }
    found = comparison(tmp_path, **fields)
    rows = found.run()
    trials = [rate for name, rate, steps in started if name == "adamw" and steps == 4]
    assert len(trials) >= 3
    assert [rate for name, rate, steps in started if name == "lion"] == [3e-3]
    best = read_json(tmp_path / "tuned_rates.json")["demo"]["adamw"]
    assert best in trials
    assert min(trials) < best < max(trials)
    assert rows[0].summary.learning_rate == best
    assert rows[0].summary.rate_source == "searched"
    assert "lion" not in read_json(tmp_path / "tuned_rates.json")["demo"]
    assert f"adamw: best rate {best:g} of" in text_of(found)

    started.clear()
    comparison(tmp_path, **fields).run()
    assert started == []


def test_a_time_budget_that_is_too_small_shortens_the_runs_and_says_so(tmp_path):
    found = comparison(tmp_path, steps=400, eval_every=400, timing_rounds=0, time_budget=1e-6)
    found._fit_time_budget()
    assert found.config.steps == 20
    assert "20 steps instead (--time-budget 1e-06)" in text_of(found)
    # The number is remembered, so that a continued comparison has the same one.
    write_json(tmp_path / "plan.json", {**read_json(tmp_path / "plan.json"), "steps": 33})
    again = comparison(tmp_path, steps=400, eval_every=400, timing_rounds=0, time_budget=1e-6)
    again._fit_time_budget()
    assert again.config.steps == 33


def test_a_time_budget_that_suffices_changes_nothing(tmp_path):
    found = comparison(tmp_path, time_budget=60.0)
    found._fit_time_budget()
    assert found.config.steps == 8
    assert "instead" not in text_of(found)


def test_paired_times_take_turns_on_the_same_batches(tmp_path):
    comparison(tmp_path, timing_rounds=0).run()
    calls = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def init(self, seed):
            return 0

        def step(self, state, tokens, peak):
            calls.append((self.name, int(tokens)))
            return state, None, {}

    times = paired_step_times(Fake("a"), Fake("b"), [np.int32(7), np.int32(8)], 3)  # type: ignore[arg-type]
    assert len(times.seconds) == len(times.reference_seconds) == 3
    assert calls == [
        *(("b", 7), ("a", 7)),
        *(("a", 8), ("b", 8)),
        *(("b", 7), ("a", 7)),
        *(("a", 8), ("b", 8)),
    ]


def row(index, **fields):
    names = ("adamw", "lion_hybrid", "sage_hybrid", "sage_hybrid_int8", "sinkgd")
    curve = [(1000.0 * k, 8.0 / k + 0.1 * index) for k in range(1, 9)]
    defaults = {
        "optimizer": names[index],
        "label": names[index].title(),
        "status": "finished",
        "learning_rate": 1e-3,
        "rate_source": "given",
        "heldout_loss": 3.0 + 0.1 * index,
        "train_loss": 2.5,
        "steps": 8,
        "tokens": 8000,
        "parameters": 10,
        "optimizer_state_bytes": (2**24, 2**22, 2**22 + 999, 2**20, 0)[index],
        "state_ratio": (1.0, 0.25, 0.25, 0.06, 0.0)[index],
        "tokens_per_second": 1e3,
        "median_step_seconds": 0.1,
        "heldout_curve": curve,
        "train_curve": curve,
    }
    return Row.from_dict({**defaults, **fields})


def test_a_row_of_version_0_2_is_read_and_written_as_it_was():
    stored = read_json(DEMO / "comparison.json")["rows"][0]
    found = Row.from_dict(stored)
    assert found.summary.adamw_state_bytes == found.summary.optimizer_state_bytes
    assert found.summary.rate_source == "searched over 150 steps"
    again = jsonable(found.to_dict())
    assert {"variant": again.pop("variant"), "rank": again.pop("rank")} == {
        "variant": "",
        "rank": None,
    }
    assert again.pop("options") == {}
    assert again == stored
    diverged = jsonable(row(1, status="non_finite").to_dict())
    assert diverged["heldout_loss"] == diverged["heldout_perplexity"] == "Infinity"
    assert jsonable(Row.from_dict(diverged).to_dict()) == diverged


def test_tables_show_every_row_and_mark_the_best():
    rows = [row(0), row(1, step_time_ratio=1.234), row(2, status="non_finite")]
    text = markdown_table(rows)
    lines = text.splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "1.23" in lines[3]
    assert "diverged (8)" in lines[4]
    assert lines[-1] == "Rates: Adamw given; Lion_Hybrid given; Sage_Hybrid given."
    console = Console(file=io.StringIO(), width=80)
    console.print(rich_table([row(i, step_time_ratio=1.0) for i in range(5)], "title"))
    shown = console.file.getvalue()
    assert "20.09" in shown
    assert "\u2026" not in shown  # nothing is cut at 80 columns
    console.print(rich_table([row(0, label="LoRA-Pre Adam r=16 recommended")], "title"))
    assert "recommended" in console.file.getvalue()
    assert "\u2026" not in console.file.getvalue()


def test_pictures_can_be_drawn_of_any_rows(tmp_path):
    everything = [row(i) for i in range(5)]
    diverged = [row(0, status="non_finite", heldout_curve=[], train_curve=[])]
    for name, rows in (("all", everything), ("none", diverged)):
        path = tmp_path / name / "picture.png"
        plot_comparison(rows, path, "title", "python -m x " + "--long-option value " * 30)
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizers": "adamw,sgd"}, "unknown optimizer 'sgd'; the optimizers are adamw"),
        ({"optimizers": "adamw,adamw"}, "an optimizer is named twice"),
        ({"optimizers": " , "}, "name at least one optimizer"),
        ({"rates": "adam=1"}, "unknown optimizer 'adam' in 'adam=1'"),
        ({"batch_size": 4000}, "The training text is too short"),
        ({"accumulate": 3}, "does not divide into 3 accumulation steps"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path, **fields)


def test_every_optimizer_of_the_demo_has_a_tuned_rate():
    from examples.llama.optimizers.registry import OPTIMIZERS

    # LoRA-Pre's rates are entered as they are measured.
    wanted = {name for name in OPTIMIZERS if not name.startswith("lorapre_")} - set(PEERS)
    assert wanted <= {parse_variant(key).optimizer for key in TUNED_RATES["demo"]}
    assert all(rate > 0 and source for rate, source in TUNED_RATES["demo"].values())


def test_the_command_line_reports_errors_in_one_line(tmp_path, capsys):
    assert main(["--optimizers", "sgd", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown optimizer 'sgd'")
    assert error.count("\n") == 1
    assert [variant.key for variant in parse_variants("adamw,sage")] == ["adamw", "sage"]


def test_runs_write_no_statistics_that_the_comparison_does_not_show(tmp_path):
    comparison(tmp_path, timing_rounds=0).run()
    assert not read_metrics(tmp_path / "runs" / "adamw", "statistics")


VARIANTS = "adamw,adamw:matrix_rate=0.25,lorapre_adamw:options=recommended:rank=2"


def test_variants_are_rows_with_runs_rates_and_times_of_their_own(tmp_path, monkeypatch):
    rates = "adamw=1e-2,adamw:matrix_rate=0.25=2e-2,lorapre_adamw:rank=2:options=recommended=5e-3"
    found = comparison(tmp_path, optimizers=VARIANTS, rates=rates)
    rows = found.run()
    keys = ["adamw", "adamw:matrix_rate=0.25", "lorapre_adamw:rank=2:options=recommended"]
    assert [row.variant for row in rows] == keys
    assert [row.optimizer for row in rows] == ["adamw", "adamw", "lorapre_adamw"]
    assert [row.label for row in rows] == [
        *("AdamW", "AdamW matrix x0.25"),
        "LoRA-Pre Adam r=2 recommended",
    ]
    assert [row.rank for row in rows] == [None, None, 2]
    assert rows[2].options == {"rank": 2, "options": "recommended"}
    assert [row.summary.learning_rate for row in rows] == [1e-2, 2e-2, 5e-3]
    assert len({row.heldout_loss for row in rows}) == 3
    assert rows[2].summary.state_ratio < rows[1].summary.state_ratio == pytest.approx(1.0, abs=1e-3)
    assert set(read_json(tmp_path / "timing.json")) == set(keys[1:])
    assert all(row.step_time_ratio is not None for row in rows)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        *("adamw", "adamw__matrix_rate=0.25"),
        "lorapre_adamw__rank=2__options=recommended",
    ]
    stored = read_json(tmp_path / "comparison.json")["rows"]
    assert [(row["variant"], row["rank"], row["options"]) for row in stored] == [
        (row.variant, row.rank, row.options) for row in rows
    ]
    # Started again, in another order and with options in another order, it repeats nothing.
    started = count_runs(monkeypatch)
    again = "lorapre_adamw:rank=2:options=recommended,adamw,adamw:matrix_rate=0.25"
    assert comparison(tmp_path, optimizers=again, rates=rates).run() == [rows[2], *rows[:2]]
    assert started == []


def test_a_variant_is_searched_from_the_rate_of_the_plain_optimizer(tmp_path, monkeypatch):
    started = count_runs(monkeypatch)
    rates = "adamw=1e-2"
    fields = {"optimizers": "adamw,adamw:matrix_rate=0.25", "tune": True, "tune_trials": 3}
    found = comparison(tmp_path, rates=rates, tune_fraction=0.5, timing_rounds=0, **fields)
    start = TUNED_RATES["demo"]["adamw"][0]
    assert found.rates["adamw:matrix_rate=0.25"] == (start, "start of the search")
    rows = found.run()
    trials = [rate for _, rate, steps in started if steps == 4]
    assert trials == [start, 2 * start, start / 2]
    assert rows[1].summary.rate_source == "searched"
    tuned = read_json(tmp_path / "tuned_rates.json")["demo"]
    assert tuned == {"adamw:matrix_rate=0.25": rows[1].summary.learning_rate}
    assert (tmp_path / "tuning" / "adamw__matrix_rate=0.25.json").exists()
    # Without a search there is no rate to take.
    with pytest.raises(ValueError, match=r"no tuned rate of 'adamw:matrix_rate=0\.25' for preset"):
        comparison(tmp_path, rates=rates, optimizers=fields["optimizers"])


def test_a_variant_that_cannot_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'sage:b1=1\.5': .*b1 must be"):
        comparison(tmp_path, optimizers="adamw,sage:b1=1.5", rates="adamw=1e-2,sage:b1=1.5=1e-3")


def test_a_run_from_before_an_option_existed_is_kept(tmp_path, monkeypatch):
    comparison(tmp_path, timing_rounds=0).run()
    config = tmp_path / "runs" / "adamw" / "config.json"
    stored = read_json(config)
    del stored["settings"]["options"]["residual"]
    write_json(config, stored)
    started = count_runs(monkeypatch)
    comparison(tmp_path, timing_rounds=0).run()
    assert started == []


def test_two_ranks_give_a_picture_of_ranks(tmp_path):
    found = comparison(tmp_path)
    galore = [
        row(rank % 3, optimizer="galore", variant=f"galore:rank={rank}", rank=rank)
        for rank in (4, 8)
    ]
    found._publish([row(0), *galore])
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert f"Ranks: {tmp_path / 'ranks.png'}" in text_of(found)
