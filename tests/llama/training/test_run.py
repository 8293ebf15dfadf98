"""The main job end to end on a tiny model: learning, accumulation, bf16, files, errors, interrupts."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama.data.batches import train_iterator
from examples.llama.model import config as presets
from examples.llama.model.llama import stack_layers, unstack_layers
from examples.llama.optimizers.registry import OPTIMIZERS
from examples.llama.reporting.files import CONFIG, SUMMARY, read_json
from examples.llama.reporting.locks import FolderLock
from examples.llama.reporting.metrics import read_metrics
from examples.llama.train import main
from examples.llama.training import run as run_module
from examples.llama.training.config import TrainConfig, resolve
from examples.llama.training.notes import rank_notes, rule_notes
from examples.llama.training.program import Program
from examples.llama.training.protocols import default_protocol
from examples.llama.training.run import check_vocabulary, prepare_run, train
from examples.llama.training.step import init_state, make_train_step, warmup_cosine
from tests.llama import tiny

RATES = {"adafactor": 0.3, "sinkgd": 0.2, "lorapre_sgd": 1.0}


def run(config, **arguments):
    arguments = {"model": tiny.MODEL, "dataset": tiny.dataset(), **arguments}
    return train(config, console=tiny.quiet_console(), **arguments)


def losses(folder):
    return [line["loss"] for line in read_metrics(folder, "train")]


@functools.cache
def program(name):
    """The compiled program of an optimizer, shared between tests."""
    return Program(resolve(tiny.config(None, optimizer=name), tiny.MODEL))


@pytest.fixture(scope="module")
def adamw_program():
    """One program for the tests that need no other."""
    return program("adamw")


def bigram_loss(params, tokens):
    """Stands for the model, with a parameter of each kind: far quicker to compile."""
    x = params["embed_tokens"]["embedding"][tokens[:, :-1]] * params["norm"]["scale"]
    layers = params["layers"]
    stack = layers if "mlp" in layers else stack_layers(params)["layers"]
    for kernel in stack["mlp"]["up_proj"]["kernel"]:
        x = x + jnp.tanh(x @ kernel)
    logits = x @ params["lm_head"]["kernel"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses), jnp.asarray(losses.size, jnp.float32)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_falls_with_every_optimizer(name):
    settings = resolve(tiny.config(None, optimizer=name, steps=20), tiny.MODEL)
    random, vocab, width = np.random.default_rng(0), tiny.MODEL.vocab_size, 24

    def normal(*shape):
        return jnp.asarray(0.1 * random.normal(size=shape), jnp.float32)

    params: dict[str, Any] = {
        "embed_tokens": {"embedding": normal(vocab, width)},
        "norm": {"scale": jnp.ones(width)},
        "layers": {"mlp": {"up_proj": {"kernel": normal(2, width, width)}}},
        "lm_head": {"kernel": normal(width, vocab)},
    }
    if not settings.scan_layers:
        params = unstack_layers(params)
    step = jax.jit(
        make_train_step(
            bigram_loss, settings.optimizer_from, warmup_cosine(20, 2, 0.0), clip_norm=1.0
        )
    )
    batches = train_iterator(tiny.dataset(), 16, 16)
    state, found = init_state(params, settings.optimizer_from), []
    for _ in range(20):
        state, metrics, _ = step(state, next(batches)["tokens"], RATES.get(name, 1e-2))
        found.append(float(metrics.loss))
    assert found[0] == pytest.approx(math.log(vocab), rel=0.05)
    assert found[-1] < found[0] - 0.3
    assert int(state.step) == 20


@pytest.mark.parametrize("name", ["sage_hybrid", "galore"])
def test_the_model_learns_from_stacked_and_unstacked_layers(tmp_path, name):
    summary = run(tiny.config(tmp_path, optimizer=name, eval_every=8), program=program(name))
    assert summary.status == "finished"
    assert summary.heldout_loss is not None
    assert summary.heldout_loss < math.log(tiny.MODEL.vocab_size) - 0.05


def test_a_run_writes_what_it_was_what_it_did_and_what_came_of_it(tmp_path, adamw_program):
    summary = run(tiny.config(tmp_path, tensorboard=True), program=adamw_program)
    stored = read_json(tmp_path / CONFIG)
    assert stored["data"]["corpus_sha256"] == tiny.dataset().corpus_sha256
    assert stored["settings"]["model"]["hidden_size"] == tiny.MODEL.hidden_size
    assert stored["config"]["learning_rate"] == 1e-2
    assert stored["versions"]["jax"] == jax.__version__
    assert stored["command"].startswith("python -m examples.llama.train")

    train_lines = read_metrics(tmp_path, "train")
    assert [line["step"] for line in train_lines] == [2, 4, 6, 8]
    assert [line["tokens"] for line in train_lines] == [256, 512, 768, 1024]
    assert all(line["tokens_per_second"] > 0 for line in train_lines)
    assert train_lines[-1]["loss"] < train_lines[0]["loss"] - 0.1
    heldout = read_metrics(tmp_path, "heldout")
    assert [line["step"] for line in heldout] == [4, 8]
    assert heldout[-1]["perplexity"] == pytest.approx(math.exp(heldout[-1]["loss"]))
    assert list((tmp_path / "tensorboard").iterdir())

    written = json.loads((tmp_path / SUMMARY).read_text())
    assert written["heldout_loss"] == summary.heldout_loss == heldout[-1]["loss"]
    assert (written["status"], written["steps"], written["tokens"]) == ("finished", 8, 1024)
    assert written["state_ratio"] == 1.0
    assert written["optimizer_state_bytes"] == 8 * written["parameters"] + 2 * 4
    assert written["median_step_seconds"] > 0


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tmp_path, adamw_program):
    found = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tiny.config(tmp_path / folder, seed=seed), program=adamw_program)
        found.append(losses(tmp_path / folder))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]


def test_the_held_out_loss_is_the_plain_mean_over_tokens(tmp_path, adamw_program):
    job = prepare_run(
        tiny.config(tmp_path), model=tiny.MODEL, dataset=tiny.dataset(), program=adamw_program
    )
    assert job.program is adamw_program
    params = adamw_program.init(0).params
    singles = [adamw_program.evaluate(params, [batch]) for batch in job.heldout]
    loss, count = adamw_program.evaluate(params, job.heldout)
    assert count == sum(tokens for _, tokens in singles) == 2 * 8 * 16
    assert loss == pytest.approx(np.mean([single for single, _ in singles]), rel=1e-5)
    assert loss == pytest.approx(math.log(tiny.MODEL.vocab_size), rel=0.02)


def test_accumulation_trains_as_the_large_batch_does(tmp_path, adamw_program):
    run(tiny.config(tmp_path / "whole"), program=adamw_program)
    run(tiny.config(tmp_path / "parts", accumulate=4))
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-4)
    heldout = [read_metrics(tmp_path / name, "heldout")[-1]["loss"] for name in ("whole", "parts")]
    assert heldout[1] == pytest.approx(heldout[0], rel=1e-3)


def test_bfloat16_compute_learns_with_float32_parameters(tmp_path):
    config = tiny.config(tmp_path, compute_dtype="bfloat16")
    job = prepare_run(
        config, model=tiny.MODEL, dataset=tiny.dataset(), console=tiny.quiet_console()
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(job.program.abstract_params)} == {
        np.dtype("float32")
    }
    summary = job.train()
    assert summary.heldout_loss is not None
    assert summary.heldout_loss < math.log(tiny.MODEL.vocab_size) - 0.05


def test_statistics_are_written_at_their_interval_and_do_not_change_the_run(tmp_path):
    for folder, every in (("with", 4), ("without", 0)):
        config = tiny.config(
            tmp_path / folder, optimizer="sage_hybrid", statistics_every=every, eval_every=8
        )
        run(config, program=program("sage_hybrid"))
    lines = read_metrics(tmp_path / "with", "statistics")
    assert [line["step"] for line in lines] == [4, 8]
    for role in ("embedding", "vector"):
        mean, low = (lines[0][f"damper/{role}/{name}"] for name in ("mean", "min"))
        assert 0 <= low <= mean <= 1
        assert 0 < lines[0][f"damper/{role}/damped_share"] <= 1
        assert lines[0][f"damper/{role}/small_scale_share"] == 0
    for role in ("embedding", "vector", "matrix"):
        rms, largest = (lines[0][f"update/{role}/{name}"] for name in ("rms", "max"))
        assert 0 < rms <= largest
        assert lines[0][f"update/{role}/relative"] > 0
    assert not any(name.startswith("damper/matrix") for name in lines[0])
    # A sign rule moves no entry further than the rate allows.
    rate = read_metrics(tmp_path / "with", "train")[1]["learning_rate"]
    assert lines[0]["update/vector/max"] <= rate * (1 + 0.01 * 1.2) * 1.0001
    assert not read_metrics(tmp_path / "without", "statistics")
    np.testing.assert_allclose(losses(tmp_path / "with"), losses(tmp_path / "without"), rtol=1e-3)


def test_one_compile_serves_the_whole_run_and_another_rate(tmp_path, adamw_program):
    run(tiny.config(tmp_path / "first"), program=adamw_program)
    compiles = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiles.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        config = tiny.config(tmp_path / "second", learning_rate=3e-3)
        state = adamw_program.init(0)
        before = len(compiles)
        for _ in range(3):
            state, _, _ = adamw_program.step(state, {"tokens": np.zeros((8, 17), np.int32)}, 3e-3)
        assert len(compiles) == before
        run(config, program=adamw_program)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert losses(tmp_path / "first")[-1] != losses(tmp_path / "second")[-1]
    with pytest.raises(TypeError, match="int32"):
        adamw_program.step(state, {"tokens": np.zeros((4, 17), np.int32)}, 3e-3)


def test_parameters_and_state_are_donated_to_the_step(adamw_program):
    state = adamw_program.init(0)
    leaf = state.params["embed_tokens"]["embedding"]
    adamw_program.step(state, {"tokens": np.zeros((8, 17), np.int32)}, 1e-3)
    assert leaf.is_deleted()


def test_scanned_and_unscanned_start_from_the_same_parameters_and_losses(tmp_path, adamw_program):
    run(tiny.config(tmp_path / "scanned"), program=adamw_program)
    run(tiny.config(tmp_path / "unscanned", scan_layers=False))
    np.testing.assert_allclose(
        losses(tmp_path / "scanned"), losses(tmp_path / "unscanned"), rtol=1e-3
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path, adamw_program):
    summary = run(tiny.config(tmp_path, learning_rate=1e30), program=adamw_program)
    assert summary.status == "non_finite"
    # The first update, at a huge rate, ruins the parameters; five in a row are then too many.
    assert (summary.steps, summary.skipped) == (6, 5)
    pattern = r"Step 6: the loss is .*(nan|inf) .*1e\+30\); the updates of 5 steps in a row had"
    assert re.match(pattern, summary.message)
    assert json.loads((tmp_path / SUMMARY).read_text())["status"] == "non_finite"
    assert [line["step"] for line in read_metrics(tmp_path, "non_finite")] == [2, 3, 4, 5, 6]


def test_an_interrupt_leaves_a_summary_and_the_folder_can_be_used_again(
    tmp_path, adamw_program, monkeypatch
):
    step, calls = Program.step, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "step", interrupted)
        summary = run(tiny.config(tmp_path), program=adamw_program)
    assert (summary.status, summary.steps) == ("interrupted", 4)
    assert summary.heldout_step == 4
    assert json.loads((tmp_path / SUMMARY).read_text())["message"] == "Interrupted after step 4."
    assert run(tiny.config(tmp_path), program=adamw_program).status == "finished"


def test_a_finished_run_is_not_overwritten_unless_asked(tmp_path, adamw_program):
    run(tiny.config(tmp_path), program=adamw_program)
    with pytest.raises(FileExistsError, match=r"holds a finished run.*--overwrite"):
        run(tiny.config(tmp_path), program=adamw_program)
    assert run(tiny.config(tmp_path, overwrite=True), program=adamw_program).status == "finished"


def test_progress_in_a_log_is_plain_lines_with_what_one_wants_to_know(tmp_path, adamw_program):
    console = tiny.quiet_console()
    config = tiny.config(tmp_path)
    train(config, model=tiny.MODEL, dataset=tiny.dataset(), program=adamw_program, console=console)
    text = console.file.getvalue()
    assert "\x1b" not in text
    assert re.search(r"adamw step 2/8 loss \d\.\d+ [\d,]+ tok/s lr \d\.\d\de-0\d \d+s left", text)
    assert "adamw step 8: held-out loss" in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "demo2"}, "unknown preset 'demo2'; the presets are demo, galore_60m"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; the optimizers are adamw, lion"),
        ({"protocol": "pile"}, "unknown protocol 'pile'; the protocols are galore, sage, demo"),
        ({"accumulate": 3}, "does not divide into 3 accumulation steps"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"seq_len": 64}, "seq_len 64 is more than the model's max_seq_len .32."),
        ({"statistics_every": 3}, "must be 0 or a multiple of log_every"),
        ({"warmup_fraction": 1.0}, "warmup_fraction must be at least 0 and below 1"),
        ({"clip_norm": -1.0}, "clip_norm must not be negative"),
        ({"damper": "ema"}, "adamw takes no damper"),
        ({"optimizer": "lion", "role_rates": "embedding=1e-3"}, "lion takes no role_multipliers"),
        ({"role_rates": "head=1", "role_multipliers": "head=2"}, "not both"),
        (
            {"role_rates": "embed=1e-3"},
            "unknown role 'embed' in 'embed=1e-3'; use one of embedding",
        ),
        ({"role_rates": "head=fast"}, "expected role=rate, got 'head=fast'"),
        ({"optimizer": "galore", "scan_layers": True}, "galore refuses stacked layers"),
        ({"optimizer": "sage", "b1": 1.5}, "b1 must be in"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_loaded(fields, message):
    model = None if "preset" in fields else tiny.MODEL
    with pytest.raises(ValueError, match=message):
        resolve(tiny.config(None, **fields), model)


def test_a_missing_tuned_rate_says_how_to_find_one():
    message = "no tuned rate of 'adafactor' for preset 'llama2_7b'; begin with --learning-rate 0.03"
    with pytest.raises(ValueError, match=message):
        resolve(TrainConfig(preset="llama2_7b", optimizer="adafactor"))


def test_a_vocabulary_that_does_not_fit_says_which_would():
    data = dataclasses.replace(tiny.dataset(), vocab_size=100)
    settings = resolve(tiny.config(None), tiny.MODEL)
    with pytest.raises(ValueError, match=r"has 100 tokens, the model 64; give --vocab-size 100"):
        check_vocabulary(data, settings)


def test_protocols_fill_in_what_is_open_and_yield_to_what_is_given():
    galore = resolve(TrainConfig(preset="galore_60m", optimizer="galore", learning_rate=1e-2))
    assert (galore.seq_len, galore.batch_size, galore.clip_norm) == (256, 512, None)
    assert (galore.options.weight_decay, galore.options.rank) == (0.0, 128)
    assert (galore.warmup_steps, galore.final_rate_fraction) == (1000, 0.1)
    assert galore.scan_layers is False
    sage = resolve(TrainConfig(preset="sage_1.3b", learning_rate=1e-3))
    assert (sage.seq_len, sage.batch_size, sage.steps, sage.clip_norm) == (512, 256, 50_000, 1.0)
    assert (sage.options.weight_decay, sage.final_rate_fraction) == (0.01, 0.0)
    given = resolve(
        TrainConfig(
            protocol="sage",
            clip_norm=0.0,
            weight_decay=0.2,
            batch_size=4,
            steps=100,
            learning_rate=2e-3,
            role_rates="embedding=1e-3",
        )
    )
    assert (given.clip_norm, given.batch_size, given.warmup_steps) == (None, 4, 10)
    assert given.options.weight_decay == 0.2
    assert given.options.role_multipliers == {"embedding": 0.5}
    assert default_protocol("demo") == "demo"


def test_the_command_line_runs_a_job_and_reports_errors_in_one_line(
    tmp_path, monkeypatch, capsys, adamw_program
):
    monkeypatch.setitem(presets.PRESETS, "tiny", tiny.MODEL)
    monkeypatch.setattr(run_module, "prepare_data", lambda config: tiny.dataset())
    monkeypatch.setattr(run_module, "Program", lambda settings: adamw_program)
    options = {
        "preset": "tiny",
        "optimizer": "adamw",
        "learning-rate": "1e-2",
        "steps": "8",
        "batch-size": "8",
        "seq-len": "16",
        "eval-every": "4",
        "eval-batches": "2",
        "log-every": "2",
        "statistics-every": "0",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    arguments += ["--no-tensorboard", "--out"]
    assert main([*arguments, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "held-out perplexity" in out
    assert "1.000 of AdamW's" in out
    assert main([*arguments, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "holds a finished run" in error
    assert error.count("\n") == 1


def test_a_run_whose_every_step_is_skipped_is_not_finished(tmp_path, monkeypatch):
    config = tiny.config(tmp_path, steps=2, learning_rate=1e-3, max_skipped=5)
    program = Program(resolve(config, tiny.MODEL))
    init = program.init
    broken = lambda seed: jax.tree.map(lambda x: x * np.float32("nan"), init(seed).params)  # noqa: E731
    monkeypatch.setattr(program, "init", lambda seed: init(seed)._replace(params=broken(seed)))
    summary = run(config, program=program)
    assert (summary.status, summary.steps, summary.skipped) == ("non_finite", 2, 2)
    assert "None of the 2 steps changed anything" in summary.message


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match="files that are no run's"):
        run(tiny.config(tmp_path, steps=1))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_second_writer_of_a_folder_is_refused(tmp_path):
    config = tiny.config(tmp_path, steps=1)
    second = prepare_run(
        config, model=tiny.MODEL, dataset=tiny.dataset(), console=tiny.quiet_console()
    )
    with FolderLock(tmp_path), pytest.raises(FileExistsError, match="is writing to"):
        second.train()
    assert list(tmp_path.iterdir()) == []


def test_the_old_run_stays_when_the_new_one_cannot_begin(tmp_path, monkeypatch):
    run(tiny.config(tmp_path, steps=2, eval_every=2, checkpoint_every=2))
    before = read_json(tmp_path / SUMMARY)
    config = tiny.config(tmp_path, steps=3, overwrite=True)
    program = Program(resolve(config, tiny.MODEL))

    def fails(seed):
        raise ValueError("bad weights")

    monkeypatch.setattr(program, "init", fails)
    with pytest.raises(ValueError, match="bad weights"):
        run(config, program=program)
    assert read_json(tmp_path / SUMMARY) == before
    assert (tmp_path / "checkpoints" / "2").is_dir()
    summary = run(tiny.config(tmp_path, steps=4, eval_every=2, resume=True, migrate="schedule"))
    assert summary.steps == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": math.inf}, "learning_rate must be a finite number, got inf"),
        ({"clip_norm": math.nan}, "clip_norm must be a finite number"),
        ({"clip_norm": math.inf}, "clip_norm must be a finite number"),
        ({"weight_decay": math.nan}, "weight_decay must be a finite number"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"b1": math.nan}, "b1 must be a finite number"),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"role_rates": "matrix=nan"}, "must be positive, got nan"),
        ({"data": ""}, "--data is empty"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"scale": -1.0}, "scale must be positive, got -1.0"),
        ({"optimizer": "lorapre_adamw", "bound": 0.0}, "bound must be positive"),
        ({"optimizer": "lorapre_adamw", "rank": 0}, "rank must be at least 1, got 0"),
        ({"optimizer": "lorapre_muon", "table_rank": -1}, "table_rank must be at least 1"),
        ({"optimizer": "galore", "update_gap": 0}, "update_gap must be at least 1"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations must be at least 1"),
        ({"loss_chunk": 0}, "loss_chunk must be at least 1"),
        ({"tokenizer": ""}, "tokenizer is empty"),
        ({"cache_dir": ""}, "cache_dir is empty"),
        ({"role_rates": ""}, "role_rates is empty"),
        ({"protocol": ""}, "protocol is empty"),
    ],
)
def test_values_are_checked_before_anything_is_compiled(tmp_path, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(tiny.config(tmp_path, **fields), tiny.MODEL)


@pytest.mark.parametrize("fields", [{"role_rates": "head=1e-3"}, {"head_rule": "adamw"}])
def test_settings_of_a_head_that_is_not_there_are_refused(tmp_path, fields):
    tied, untied = (dataclasses.replace(tiny.MODEL, tie_embeddings=tie) for tie in (True, False))
    config = tiny.config(tmp_path, optimizer="sage_hybrid", **fields)
    resolve(config, untied)
    with pytest.raises(ValueError, match="embedding is tied"):
        resolve(config, tied)


def test_no_rate_names_one_to_begin_with_and_the_page(tmp_path):
    message = r"begin with --learning-rate 0\.002 \(.*sage_1.3b\), read docs/tuning.md"
    config = tiny.config(tmp_path, preset="galore_60m", optimizer="sage_hybrid", learning_rate=None)
    with pytest.raises(ValueError, match=message):
        resolve(config)


@pytest.mark.parametrize(
    ("optimizer", "ranks", "note"),
    [
        (
            "lorapre_adamw",
            {"rank": 1000},
            "rank 1000 saves nothing on 7 of 7 kinds of matrices; they keep full",
        ),
        ("lorapre_adamw", {"rank": 11}, "rank 11 saves nothing on 2 of 7 kinds of matrices"),
        ("lorapre_adamw", {"rank": 10}, None),
        ("galore", {"rank": 32}, "rank 32 saves nothing on 7 of 7"),
        ("lorapre_sinkgd", {"rank": 30}, "rank 30 saves nothing on 1 of 1 tables"),
        ("lorapre_muon", {"rank": 10, "table_rank": 30}, "rank 30 saves nothing on 1 of 1 tables"),
        ("adamw", {}, None),
    ],
)
def test_a_rank_that_saves_nothing_is_said(tmp_path, optimizer, ranks, note):
    config = tiny.config(tmp_path, optimizer=optimizer, **ranks)
    program = Program(resolve(config, tiny.MODEL))
    found = rank_notes(program.settings, program.abstract_params)
    assert len(found) == (note is not None)
    assert note is None or note in found[0]


def test_the_trainer_says_it_in_the_librarys_place(tmp_path):
    """One line among the notes, and no warning beside it."""
    config = tiny.config(tmp_path, optimizer="lorapre_adamw", rank=1000, option_set="paper")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared = prepare_run(config, model=tiny.MODEL, dataset=tiny.dataset())
    (note,) = prepared.notes
    assert "rank 1000 saves nothing on 7 of 7" in note
    assert [each for each in caught if "saves nothing" in str(each.message)] == []


def test_the_papers_rule_is_named_where_another_was_better(tmp_path):
    def notes(**fields):
        return rule_notes(resolve(tiny.config(tmp_path, **fields), tiny.MODEL))

    (note,) = notes(optimizer="lorapre_adamw", rank=4)
    assert "--options recommended" in note
    assert notes(optimizer="lorapre_adamw", rank=4, option_set="paper") == []
    assert notes(optimizer="lorapre_adamw", rank=4, option_set="recommended") == []
    assert notes(optimizer="lorapre_adamw", rank=4, bound=1.0) == []
    assert notes(optimizer="lorapre_muon", rank=4) == []
