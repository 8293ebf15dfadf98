"""Training on a carried file of tokens: searches, claims, going on after a kill, traces, the file itself."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.peers import register_peers
from benchmarks.steps.programs import trainer_settings
from benchmarks.tokens import __main__ as command
from benchmarks.tokens import issue, shapes
from benchmarks.tokens import searches as lists
from benchmarks.tokens.file import batches, load_tokens, save_tokens
from benchmarks.tokens.issue import crossings
from benchmarks.tokens.make import main as make
from benchmarks.tokens.make import make_tokens
from benchmarks.tokens.page import summarize
from benchmarks.tokens.program import OutOfTimeError, TokenProgram
from benchmarks.tokens.rules import MATRICES, RANKS, TABLES, crossing, register_crossing
from benchmarks.tokens.searches import Search, search
from benchmarks.tokens.shapes import token_settings
from benchmarks.tokens.store import SharedStore, claim
from benchmarks.tokens.worker import Protocol, Worker
from examples.llama.optimizers.registry import OPTIMIZERS, make_optimizer
from examples.llama.optimizers.variants import parse_variant
from examples.llama.training.config import TrainConfig, resolve
from examples.llama.training.program import Program
from lorapre_optax import RECOMMENDED_MUON, lorapre_muon
from sage_optax import RECOMMENDED_SINKGD, sinkgd_hybrid
from tests.llama import tiny
from tests.llama.random_params import random_params

STEPS, BATCH, LENGTH = 12, 8, 16
BUDGET = STEPS * BATCH * LENGTH


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny.MODEL)
    monkeypatch.setattr("examples.llama.optimizers.registry.OPTIMIZERS", dict(OPTIMIZERS))


@pytest.fixture
def tokens(tmp_path):
    found = tiny.dataset()
    return save_tokens(tmp_path / "tokens.npz", found.train_tokens, found.heldout_tokens, {})


@pytest.fixture
def arguments(tokens, tmp_path):
    given = [str(tmp_path / "tokens.npz"), "--out", str(tmp_path), "--shape", "tiny"]
    given += ["--tokens", str(BUDGET), "--batch-size", str(BATCH), "--seq-len", str(LENGTH)]
    return [*given, "--dtype", "float32", "--ratios", "1"]


def protocol(**fields):
    return Protocol("tiny", BUDGET, BATCH, LENGTH, **fields)


def stored(folder):
    return json.loads((folder / "recipes.json").read_text())


def test_searched_rows_learn_and_are_kept(arguments, tmp_path, monkeypatch, capsys):
    arguments += ["--optimizers", "adamw=1e-2,sage+muon=1e-2"]
    command.main(arguments)
    content = stored(tmp_path)
    assert {cell["variant"] for cell in content["cells"]} == {"adamw", "sage+muon"}
    assert {item["name"] for item in content["searches"]} == {"adamw@both", "sage+muon@both"}
    for cell in content["cells"]:
        assert cell["tokens"] == BUDGET
        assert cell["train_curve"][0][1] > cell["heldout_loss"] > 0
        assert cell["table_rate"] == cell["learning_rate"]
    assert "/" not in content["circumstances"]["command"]
    best = summarize(content["cells"])[0]["best"]
    page = (tmp_path / "recipes_cells.md").read_text()
    assert f"| {best['heldout_perplexity']:.2f} |" in page
    assert "both" not in page

    def never(*args, **kwargs):
        raise AssertionError("a finished row was trained again")

    monkeypatch.setattr(TokenProgram, "run", never)
    command.main(arguments)
    assert "0 runs" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="trained again"):
        command.main([*arguments, "--tokens", str(2 * BUDGET)])


def test_one_compile_serves_all_rates_and_gives_the_trainers_numbers(tokens):
    settings = token_settings(
        "tiny", "adamw", tokens=3 * BATCH * LENGTH, batch_size=BATCH, seq_len=LENGTH
    )
    program, trainer = TokenProgram(settings), Program(settings)
    program.compile()
    compiled = program._compiled
    losses = [program.run(tokens, rate)["train_curve"] for rate in (1e-2, 2e-2)]
    assert program._compiled is compiled
    assert losses[0] != losses[1]
    state = trainer.init(0)
    found = lists_of_batches(tokens, settings)
    curve = []
    for batch in found:
        state, metrics, _ = trainer.step(state, {"tokens": batch}, 1e-2)
        curve.append(round(float(metrics.loss), 4))
    assert [loss for _, loss in losses[0]] == pytest.approx(curve, abs=2e-4)


def lists_of_batches(tokens, settings):
    from benchmarks.tokens.file import windows

    return batches(windows(tokens.train, LENGTH), BATCH, settings.steps, 0)


def test_the_tables_rate_is_the_roles_rate(tokens):
    """A ratio as an operand gives what a multiplier of the roles gives in the optimizer."""
    plain, own = (
        TokenProgram(
            token_settings("tiny", key, tokens=3 * BATCH * LENGTH, batch_size=BATCH, seq_len=LENGTH)
        )
        for key in ("sage_hybrid", "sage_hybrid:embedding_rate=0.3")
    )
    ours = plain.run(tokens, 1e-2, 0.3)["heldout_loss"]
    assert ours == pytest.approx(own.run(tokens, 1e-2)["heldout_loss"], abs=1e-5)
    assert ours != pytest.approx(plain.run(tokens, 1e-2)["heldout_loss"], abs=1e-4)


def test_a_run_without_time_is_given_up_and_one_without_hope_is_a_divergence(tokens):
    program = TokenProgram(
        token_settings("tiny", "adamw", tokens=BUDGET, batch_size=BATCH, seq_len=LENGTH)
    )
    with pytest.raises(OutOfTimeError):
        program.run(tokens, 1e-2, left=lambda: 0.0)
    lost = program.run(tokens, 50.0)
    assert lost["heldout_loss"] is lost["heldout_perplexity"] is None
    assert lost["tokens"] < BUDGET
    wide = save_tokens(pathlib.Path(os.devnull), np.arange(9000), np.arange(900), {})
    with pytest.raises(ValueError, match="token 8999 is outside the vocabulary of 64"):
        program.run(wide, 1e-2)


@pytest.mark.extended
def test_single_rules_keep_the_rate_that_the_base_found(tokens, tmp_path):
    worker = Worker(protocol(), tokens, SharedStore(tmp_path / "a.json"), {}, ratios=(1.0, 0.3))
    waiting = Search("adamw+orthogonal", 1e-2, "matrices")
    (line,) = worker.work([waiting], tmp_path / "claims")
    assert "run the list `base` first" in line
    work = [waiting, Search("lion+muon", 5e-3, "tables"), Search("adamw+muon", 1e-2)]
    lines = list(worker.work(work, tmp_path / "claims"))
    assert [line.partition(":")[0] for line in lines] == [
        "adamw+muon@both",
        "adamw+orthogonal@matrices",
        "lion+muon@tables",
    ]
    base = worker.base()
    assert base is not None
    kept = {
        variant: {
            (cell["learning_rate"], cell["table_rate"])[side]
            for cell in worker.store.cells
            if cell["variant"] == variant
        }
        for variant, side in (("adamw+orthogonal", 1), ("lion+muon", 0))
    }
    assert kept == {"adamw+orthogonal": {base[1]}, "lion+muon": {base[0]}}


def test_a_search_ends_with_the_best_inside_and_stops_at_a_ratio_that_does_not_help():
    tried = []

    def run(rate, table_rate):
        tried.append((rate, table_rate))
        return abs(np.log(rate / 8e-3)) + abs(np.log(table_rate / rate))

    assert search(run, Search("adamw", 1e-3)) == (8e-3, 8e-3)
    assert max(rate for rate, _ in tried) == 1.6e-2
    assert {round(table / rate, 2) for rate, table in tried} == {1.0, 0.3, 3.0}
    tried.clear()
    assert search(run, Search("adamw", 1e-3), ratios=(1.0,)) == (8e-3, 8e-3)
    assert {table / rate for rate, table in tried} == {1.0}


def test_a_ratio_above_one_is_found_where_tables_want_the_higher_rate():
    def run(rate, table_rate):
        return abs(np.log(rate / 8e-3)) + abs(np.log(table_rate / 3.2e-2))

    assert search(run, Search("adamw", 8e-3)) == (8e-3, 2.4e-2)


def test_rates_that_move_in_turn_end_where_neither_helps_and_both_ranges_are_shown():
    tried = {}

    def run(rate, table_rate):
        # The best matrices' rate grows with the tables': one sweep does not find it.
        follows, table = np.log2(rate / np.sqrt(2e-3 * table_rate)), np.log2(table_rate / 8e-3)
        tried[rate, table_rate] = follows**2 + table**2
        return tried[rate, table_rate]

    best = search(run, Search("adamw", 1e-3, "each", table_start=2e-3))
    assert best == (4e-3, 8e-3)
    neighbours = [(2e-3, 8e-3), (8e-3, 8e-3), (4e-3, 4e-3), (4e-3, 1.6e-2)]
    assert all(tried[pair] > tried[best] for pair in neighbours)

    cells = [
        cell("adamw", loss, rate) | {"label": "AdamW", "table_rate": table}
        for (rate, table), loss in tried.items()
    ]
    (row,) = summarize(cells)
    assert not row["edge"]
    rates, tables = (sorted(part) for part in zip(*tried, strict=True))
    shown = f"{rates[0]:g} to {rates[-1]:g}, tables {tables[0]:g} to {tables[-1]:g}"
    assert row["searched"] == f"matrices {shown}"


SLOW = """
import sys, time
from benchmarks.tokens import shapes, __main__ as command
from benchmarks.tokens.program import TokenProgram
from tests.llama import tiny
shapes.SHAPES["tiny"] = tiny.MODEL
run = TokenProgram.run
def slow(self, *args, **kwargs):
    found = run(self, *args, **kwargs)
    print("RAN", flush=True)
    if "--stop" in sys.argv:
        time.sleep(600)
    return found
TokenProgram.run = slow
command.main([one for one in sys.argv[1:] if one != "--stop"])
"""


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, text=True
    )


def test_a_killed_workers_claim_is_taken_over_and_its_cells_are_kept(arguments, tmp_path):
    arguments += ["--optimizers", "adamw=1e-2"]
    first = start([*arguments, "--stop"])
    assert first.stdout is not None
    assert first.stdout.readline() == "RAN\n"
    (claims,) = (tmp_path / ".recipes_claims").iterdir()
    assert claim(claims, "adamw@both") is None  # it lives
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (claims / "adamw@both" / "run.lock").exists()
    command.main(arguments)  # it had stored nothing: its run was not over
    cells = stored(tmp_path)["cells"]
    rates = [cell["learning_rate"] for cell in cells]
    assert sorted(rates)[:3] == [5e-3, 1e-2, 2e-2][: len(rates)]
    assert len(set(rates)) == len(rates)


@pytest.mark.extended
def test_two_workers_share_the_searches_and_lose_no_cell(arguments, tmp_path):
    arguments += ["--optimizers", "adamw=1e-2,lion=5e-3"]
    workers = [start(arguments) for _ in range(2)]
    output = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    cells = stored(tmp_path)["cells"]
    assert sum(text.count("RAN") for text in output) == len(cells)
    assert {cell["variant"] for cell in cells} == {"adamw", "lion"}
    assert len(stored(tmp_path)["searches"]) == 2


def test_the_list_of_everything_names_every_rule_once():
    register_peers()
    searches = command.listed("issue")
    assert len({one.name for one in searches}) == len(searches)
    for one in searches:
        register_crossing(one.variant)
        assert parse_variant(one.variant).key == one.variant
    keys = {one.variant for one in searches}
    assert {f"adamw+{name}" for name in MATRICES} | {f"{name}+muon" for name in TABLES} <= keys
    with pytest.raises(ValueError, match="unknown list 'tabels'"):
        command.listed("tabels")
    with pytest.raises(ValueError, match="no list of base has 'lion'"):
        command.listed("base", "lion")
    with pytest.raises(ValueError, match="unknown rule 'sgd'"):
        register_crossing("sgd+muon")


@pytest.mark.parametrize(
    ("key", "recommended"),
    [
        ("factored+sinkgd", functools.partial(sinkgd_hybrid, **RECOMMENDED_SINKGD)),
        ("factored+lorapre_muon_r4", functools.partial(lorapre_muon, **RECOMMENDED_MUON)),
    ],
)
def test_the_pair_that_was_run_is_the_recommended_call(key, recommended):
    """At one rate, over steps; the runs' embedding is optax's rule, the call's our own."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (40, 36), "up": {"kernel": (36, 48)}, "norm": {"scale": (36,)}}

    def draw():
        return jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    params, gradients = draw(), [draw() for _ in range(3)]
    register_crossing(key)
    made = (
        make_optimizer(key, 1e-2),
        recommended(1e-2, weight_decay=0.0, learning_rate_multipliers={}),
    )
    states = [tx.init(params) for tx in made]
    for g in gradients:
        found = [tx.update(g, state, params) for tx, state in zip(made, states, strict=True)]
        states = [state for _, state in found]
        chex.assert_trees_all_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-7)


@pytest.mark.extended
@pytest.mark.parametrize("side", ["tables", "matrices"])
def test_every_rule_updates_its_parameters_and_no_other(side):
    params = random_params(tiny.MODEL)
    for name in TABLES if side == "tables" else MATRICES:
        if any(f"_r{rank}" in name for rank in RANKS[1:]):
            continue  # as r4
        key = f"{name}+muon" if side == "tables" else f"adamw+{name}"
        register_crossing(key)
        tx = make_optimizer(key, 1e-2)
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        for leaf in jax.tree.leaves(updates):
            assert np.isfinite(leaf).all(), key
            assert (np.asarray(leaf) != 0).any(), key
    assert crossing("sage", "sinkgd") is crossing("sage", "sinkgd")


@pytest.mark.extended
def test_a_trace_follows_updates_damper_and_rows(arguments, tmp_path):
    command.main([*arguments, "--trace", "sage_hybrid=1e-2/2e-2"])
    (found,) = stored(tmp_path)["traces"]
    point = found["points"][-1]
    assert point["tokens"] == BUDGET
    for role in ("embedding", "matrix", "vector"):
        assert point[f"update/{role}/rms"] > 0
        assert -1 <= point[f"cosine/{role}"] <= 1
    assert 0 < point["damper/embedding/mean"] <= 1
    assert point["update/embedding/rms"] > 1.5 * point["update/vector/rms"]  # twice the rate
    for what in ("gradient", "update"):
        assert 1 <= point[f"spectrum/{what}"] <= tiny.MODEL.hidden_size
    for what in ("update", "moved"):
        assert 0 < point[f"common/{what}"] < 1
    assert sum(found["group_share"]) == pytest.approx(1, abs=1e-3)
    assert found["group_share"] == sorted(found["group_share"])
    moved = [point[f"rows/{group}/moved"] for group in range(4)]
    assert all(distance > 0 for distance in moved)
    assert found["points"][0]["rows/3/moved"] < moved[3]
    assert (
        "### sage_hybrid at 0.01, tables 0.02, over the run"
        in (tmp_path / "recipes_cells.md").read_text()
    )
    store = SharedStore(tmp_path / "recipes.json")
    store.trace({**found, "points": []}, {})
    assert [one["points"] for one in store.content["traces"]] == [[]]


def cell(variant, loss, rate=1e-2, seed=0):
    return {"variant": variant, "heldout_loss": loss, "learning_rate": rate, "seed": seed}


def test_the_best_rules_are_crossed():
    found = crossings(
        [
            cell("adamw+muon", 4.0),
            cell("sage+muon", 3.9),
            cell("lion+muon", 4.3),
            cell("factored+muon", 4.1),
            cell("sage+muon", None),
            cell("adamw+sinkgd", 4.2, 2e-3),
            cell("adamw+sinkgd", 4.5, 4e-3),
            cell("adamw+orthogonal", 4.1, 3e-3),
            cell("adamw+adamw", 4.15, seed=1),
        ]
    )
    assert [(one.variant, one.start) for one in found] == [
        ("sage+orthogonal", 3e-3),
        ("sage+sinkgd", 2e-3),
        ("factored+orthogonal", 3e-3),
        ("factored+sinkgd", 2e-3),
    ]


@pytest.mark.extended
def test_the_whole_list_goes_through_its_stages(arguments, tmp_path, monkeypatch, capsys):
    """Every stage leaves its cells: single rules, crossings, composites, trace, hypotheses."""
    few = {
        "base": [Search("adamw+muon", 1e-2)],
        "matrices": [Search("adamw+orthogonal", 1e-2, "matrices")],
        "tables": [Search("lion+muon", 5e-3, "tables")],
        "methods": [Search("sage_hybrid", 1e-2)],
        "composites": [Search("factored+orthogonal", 1e-2)],
    }
    monkeypatch.setattr(issue, "LISTS", {name: lambda own=own: own for name, own in few.items()})
    monkeypatch.setattr(issue, "HYPOTHESES", (Search("lion", 5e-3),))
    monkeypatch.setattr(issue, "BIG_BATCH", 2)
    monkeypatch.setattr("benchmarks.tokens.searches.MOST_TRIALS", 3)
    monkeypatch.setitem(
        shapes.SHAPES, "tiny_untied", dataclasses.replace(tiny.MODEL, tie_embeddings=False)
    )
    command.main([*arguments, "--list", "issue"])
    content = stored(tmp_path)
    asked = {one.variant for own in few.values() for one in own} | {"lion", "lion+orthogonal"}
    assert {one["variant"] for one in content["cells"]} == asked
    changed = {
        (one["shape"], one["accumulate"], one["final_rate_fraction"])
        for one in content["cells"]
        if one["variant"] == "lion"
    }
    assert changed == {("tiny", 2, None), ("tiny_untied", 1, None), ("tiny", 1, 1.0)}
    assert [one["variant"] for one in content["traces"]] == ["sage_hybrid"]
    count = len(content["cells"])
    capsys.readouterr()
    command.main([*arguments, "--list", "issue"])
    assert len(stored(tmp_path)["cells"]) == count
    out = capsys.readouterr().out
    assert out.count(" 0 runs") == out.count("runs in") == 9


def test_the_whole_list_ends_with_its_time(arguments, tmp_path):
    command.main([*arguments, "--list", "issue", "--minutes", "0"])
    assert not (tmp_path / "recipes.json").exists()


@pytest.mark.extended
def test_one_command_starts_several_workers(tmp_path):
    rng = np.random.default_rng(0)
    save_tokens(tmp_path / "t.npz", rng.integers(0, 4096, 4000), rng.integers(0, 4096, 400), {})
    given = ["--out", str(tmp_path), "--shape", "core", "--tokens", "256", "--batch-size", "2"]
    given += ["--seq-len", "64", "--dtype", "float32", "--ratios", "1", "--workers", "2"]
    command.main([str(tmp_path / "t.npz"), *given, "--optimizers", "adamw=1e-2,lion=1e-3"])
    assert len(stored(tmp_path)["searches"]) == 2
    with pytest.raises(SystemExit, match="workers ended with"):
        command.main([str(tmp_path / "none.npz"), *given, "--optimizers", "adamw=1e-2"])


def test_a_file_is_made_of_each_text_once_and_carries_its_hash(tmp_path, capsys):
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    for number in range(30):
        (folder / f"{number}.py").write_text(f"def number_{number}(x):\n    return x + {number}\n")
    (folder / "deep" / "copy.py").write_text((folder / "0.py").read_text())
    (folder / "latin.txt").write_bytes(b"\xff\xfe\xe4")
    path = tmp_path / "made.npz"
    wanted = ["--vocab-size", "300", "--tokens", "400", "--heldout", "100", "--folder", str(folder)]
    make([str(path), *wanted])
    assert "held out" in capsys.readouterr().out
    found = load_tokens(path)
    assert found.largest < 300
    assert len(found.heldout) >= 100
    assert len(found.train) >= 400 or found.about["documents"] == 30
    again = make_tokens(tmp_path / "again.npz", [folder], vocab_size=300, tokens=400, heldout=100)
    assert again.sha256 == found.sha256
    other = make_tokens(
        tmp_path / "other.npz", [folder], vocab_size=300, tokens=400, heldout=100, seed=1
    )
    assert other.sha256 != found.sha256
    with pytest.raises(ValueError, match="too few to hold out"):
        make_tokens(path, [folder], vocab_size=300, tokens=10, heldout=10**6)
    np.savez(path, train=found.train[::-1], heldout=found.heldout, sha256=found.sha256)
    with pytest.raises(ValueError, match="do not have the stored hash"):
        load_tokens(path)
    np.savez(path, heldout=found.heldout)
    with pytest.raises(ValueError, match="no tokens under 'train'"):
        load_tokens(path)


def test_batches_are_an_epoch_each_window_once_and_then_another_order():
    found = np.arange(20).reshape(10, 2)
    seen = list(batches(found, 3, 6, seed=0))
    first, second = np.concatenate(seen[:3])[:, 0], np.concatenate(seen[3:])[:, 0]
    assert len(set(first)) == len(set(second)) == 9
    assert list(first) != list(second)
    with pytest.raises(ValueError, match="10 windows do not fill a batch of 11"):
        next(batches(found, 11, 1, seed=0))


def test_mistakes_on_the_command_line_are_named(arguments, capsys):
    for given, message in (
        (["--shape", "huge"], "unknown shape 'huge'"),
        (["--tokens", "7"], "less than a step of 8 x 16"),
        (["--list", "nothing"], "unknown list 'nothing'"),
        (["--optimizers", "adamw@rows=1e-2"], "moves 'rows'; use one of matrices, tables"),
        (["--optimizers", "adamw@tables=1e-2/1e-2"], "moves one rate and names two"),
    ):
        with pytest.raises(SystemExit):
            command.main([*arguments, "--optimizers", "adamw=1e-2", *given])
        assert message in capsys.readouterr().err


def test_lists_begin_with_the_base():
    assert next(iter(lists.LISTS)) == "base"


def test_settings_are_those_of_the_trainer():
    for key in ("adamw", "galore:rank=8", "sage_hybrid:damper=ema"):
        ours = trainer_settings("demo", key, steps=50, learning_rate=1e-3)
        name, *options = key.split(":")
        fields = dict(option.split("=") for option in options)
        fields = {k: int(v) if v.isdigit() else v for k, v in fields.items()}
        theirs = resolve(TrainConfig(optimizer=name, steps=50, learning_rate=1e-3, **fields))
        differing = ("log_every", "statistics_every", "eval_every")
        assert {k: v for k, v in vars(ours).items() if k not in differing} == {
            k: v for k, v in vars(theirs).items() if k not in differing
        }
