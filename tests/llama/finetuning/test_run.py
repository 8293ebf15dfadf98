"""Fine-tuning: what is trained and what is not, checkpoints and resuming, meshes, loading the result."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from examples.llama.devices.stop_signals import StopSignals
from examples.llama.finetune import main
from examples.llama.finetuning.loading import load_model
from examples.llama.finetuning.program import FromModel, Tuned
from examples.llama.finetuning.run import check, finetune, prepare_finetuning
from examples.llama.model.hf_write import save_folder
from examples.llama.reporting.files import jsonable, read_json
from examples.llama.reporting.metrics import read_metrics
from examples.llama.training.config import resolve
from tests.llama import finetune_case
from tests.llama.tiny import config as tiny_config
from tests.llama.tiny import quiet_console


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return finetune_case.write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture
def config(model, tmp_path):
    return lambda **fields: finetune_case.config(model, **{"out": tmp_path / "run", **fields})


def train(config):
    return finetune(config, console=quiet_console())


def leaves(params):
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(x) for k, x in flat}


def trained_leaves(before, after):
    return {path for path in before if not np.array_equal(before[path], after[path])}


@pytest.mark.parametrize(
    "method",
    [
        "lorapre_adamw",
        *(
            pytest.param(m, marks=pytest.mark.extended)
            for m in ("lorapre_muon", "galore", "rslora")
        ),
        "dora",
    ],
)
def test_methods_train_the_matrices_and_nothing_else(method, config, model):
    asked = config(method=method, checkpoint_every=6)
    summary = train(asked)
    assert summary.status == "finished"
    losses = [m["loss"] for m in read_metrics(asked.out) if m["kind"] == "heldout"]
    assert losses[-1] < losses[0]
    before, after = leaves(load_model(model).params), leaves(load_model(asked.out).params)
    assert trained_leaves(before, after) == {
        f"layers/{part}/{name}_proj/kernel"
        for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for name in names
    }
    fields = read_json(asked.out / "config.json")
    assert fields["config"]["data"] == "arithmetic:0:80:1"
    assert fields["data"]["learned_tokens"] > 0
    section = fields["finetune"]
    kernels = sum(
        x.size for path, x in before.items() if path.startswith("layers/") and x.ndim == 3
    )
    assert section["model_parameters"] == sum(x.size for x in before.values())
    if method in ("rslora", "dora"):
        assert section["trained_parameters"] < 0.4 * kernels
    else:
        assert section["trained_parameters"] == kernels


def test_state_is_of_the_trained_parameters_alone(config):
    run = prepare_finetuning(config(method="adamw"), console=quiet_console())
    trained = run.program.parameter_count()
    # And two counts.
    assert run.program.state_bytes() == 8 * trained + 8
    assert (
        prepare_finetuning(
            config(method="sage_hybrid"), console=quiet_console()
        ).program.state_bytes()
        < 64
    )
    assert isinstance(run.program.source, FromModel)
    assert run.program.source.model_parameter_count(run.settings) - trained == 300 * 32 + 5 * 32


def test_no_gradient_of_what_is_frozen(config):
    """Nowhere in the step is there an array of a frozen table's shape but the table itself."""
    untied = prepare_finetuning(config(method="adamw"), console=quiet_console()).program
    text = untied.lower().as_text()
    table = "tensor<300x32xf32>"
    made = [line for line in text.splitlines() if f"-> {table}" in line and "func" not in line]
    assert not made, made[:3]
    everything = prepare_finetuning(
        config(method="adamw", trainable="all"), console=quiet_console()
    ).program.lower()
    assert f"-> {table}" in everything.as_text()


def test_subset_by_path(config, model):
    asked = config(
        method="adamw", trainable="layers/self_attn/q_proj/*, norm/scale", checkpoint_every=6
    )
    train(asked)
    before, after = leaves(load_model(model).params), leaves(load_model(asked.out).params)
    assert trained_leaves(before, after) == {"layers/self_attn/q_proj/kernel", "norm/scale"}


def test_everything_can_be_trained(config, model):
    asked = config(method="sage_hybrid", trainable="all", learning_rate=1e-3, checkpoint_every=6)
    train(asked)
    before, after = leaves(load_model(model).params), leaves(load_model(asked.out).params)
    assert trained_leaves(before, after) == set(before)


@pytest.mark.parametrize(
    "method", ["lorapre_adamw", pytest.param("dora", marks=pytest.mark.extended)]
)
def test_resumed_run_equals_one_that_went_through(method, config, tmp_path, monkeypatch):
    whole = config(method=method, checkpoint_every=2, out=tmp_path / "whole")
    train(whole)
    halves = dataclasses.replace(whole, out=tmp_path / "halves")
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "should_stop", lambda self, step: step == 4)
        stopped = train(halves)
    assert (stopped.status, stopped.steps) == ("interrupted", 4)
    resumed = train(dataclasses.replace(halves, resume=True))
    assert (resumed.status, resumed.steps) == ("finished", 6)
    one, two = (leaves(load_model(c.out).params) for c in (whole, halves))
    assert not trained_leaves(one, two)


def test_another_method_or_base_is_another_run(config, tmp_path, model):
    asked = config(method="lora", checkpoint_every=3, steps=3)
    train(asked)
    other = finetune_case.write_model(tmp_path / "other")
    for change in ({"alpha": 8.0}, {"model": str(other)}):
        with pytest.raises(ValueError, match="holds another run"):
            train(dataclasses.replace(asked, resume=True, **change))
    with pytest.raises(FileExistsError, match="finished run"):
        train(asked)


@pytest.mark.parametrize(
    ("method", "mode"),
    [("lorapre_adamw", "explicit"), pytest.param("dora", "auto", marks=pytest.mark.extended)],
)
def test_mesh_equals_one_device(method, mode, config, tmp_path):
    fields = {"method": method, "steps": 2, "eval_every": 2, "batch_size": 8}
    one = train(config(**fields, out=tmp_path / "one"))
    spread = train(
        config(**fields, out=tmp_path / "mesh", mesh="data=2,fsdp=2,tensor=2", mesh_mode=mode)
    )
    np.testing.assert_allclose(spread.heldout_loss, one.heldout_loss, rtol=1e-5)
    assert spread.heldout_tokens == one.heldout_tokens


def test_packed_rows_compute_what_their_documents_do(config):
    """The summed loss of the same held-out examples, packed or padded."""
    losses = []
    for packing in (True, False):
        run = prepare_finetuning(
            config(packing=packing, eval_batches=50, batch_size=2, seq_len=159),
            console=quiet_console(),
        )
        params = run.program.init(0).params
        losses.append(run.program.evaluate(params, run.heldout))
        if packing:
            assert max(batch["documents"].max() for batch in run.heldout) > 1
    assert losses[0][1] == losses[1][1]
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-5)


def test_accumulation_equals_the_whole_batch(config, tmp_path):
    fields = {"method": "adamw", "steps": 3, "eval_every": 3, "packing": False}
    whole = train(config(**fields, out=tmp_path / "whole"))
    parts = train(config(**fields, out=tmp_path / "parts", accumulate=2))
    # Parts hold unequal numbers of learned tokens.
    np.testing.assert_allclose(parts.train_loss, whole.train_loss, rtol=1e-5)


def test_epochs_count_the_rows(config):
    run = prepare_finetuning(config(steps=None, epochs=2.0, packing=False), console=quiet_console())
    assert run.settings.steps == math.ceil(2 * len(run.data.train) / 4)


def test_a_run_can_start_from_a_run_and_be_exported(config, tmp_path, model):
    first = config(method="lora", steps=3, checkpoint_every=3)
    train(first)
    second = dataclasses.replace(first, model=str(first.out), method="adamw", out=tmp_path / "two")
    train(second)
    tuned = load_model(second.out)
    assert tuned.hub_folder == model
    assert tuned.stop_ids == load_model(model).stop_ids
    save_folder(tmp_path / "export", tuned.config, tuned.params, base=model, tokenizer=second.out)
    again = load_model(tmp_path / "export")
    assert not trained_leaves(leaves(tuned.params), leaves(again.params))
    assert again.stop_ids == tuned.stop_ids
    assert again.encode("Ana has 3") == tuned.encode("Ana has 3")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ""}, "give --model"),
        ({"method": "adam"}, "unknown method 'adam'; the methods are lora, rslora, dora, adamw"),
        ({"method": "lora", "trainable": "all"}, "trainable is for methods without adapters"),
        ({"targets": ("q_proj",)}, "targets is for adapters"),
        ({"method": "dora", "statistics_every": 3}, "no statistics of adapters"),
        ({"heldout_fraction": 0.0}, "heldout_fraction must be positive"),
        ({"steps": None, "epochs": 0.0}, "epochs must be positive"),
    ],
)
def test_configurations_are_checked(fields, message, tmp_path):
    asked = {"model": "a", "data": "b", **fields}
    with pytest.raises(ValueError, match=message):
        check(finetune_case.config(asked.pop("model"), tmp_path, **asked))


def test_command_line_reports_errors_in_a_line(tmp_path, capsys):
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    assert main(["--model", model, "--data", "arithmetic:0", "--out", out]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_the_model_survives_a_run_that_would_write_over_it(tmp_path, capsys):
    model = finetune_case.write_model(tmp_path / "hf")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for out in (model, model / "run", tmp_path):
        asked = ["--model", str(model), "--data", "arithmetic:0", "--out", str(out)]
        for options in ([], ["--overwrite"], ["--resume"]):
            assert main(asked + options) == 2
            assert "--out" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_run_that_starts_from_itself_is_an_error_of_one_line(tmp_path):
    model = finetune_case.write_model(tmp_path / "hf")
    shape = resolve(tiny_config(tmp_path / "x"), finetune_case.MODEL)
    for name, base in (("a", "b"), ("b", "a"), ("c", "c")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
        section = {"base": str(tmp_path / base), "tuned": {"patterns": ["*"], "adapter": None}}
        fields = {"settings": jsonable(shape), "command": "", "finetune": section}
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    for name in "abc":
        with pytest.raises(ValueError, match="starts from the run itself"):
            load_model(tmp_path / name)


def test_parameters_or_an_adapter():
    with pytest.raises(ValueError, match="not both"):
        Tuned()


def test_a_program_is_reused_for_another_rate(config, tmp_path):
    first = prepare_finetuning(config(method="lora"), console=quiet_console())
    other = dataclasses.replace(config(method="lora"), learning_rate=1e-4, out=tmp_path / "b")
    program = first.program
    assert isinstance(program.source, FromModel)
    again = prepare_finetuning(other, program=program, console=quiet_console())
    assert again.program is program
    changed = prepare_finetuning(
        dataclasses.replace(other, alpha=4.0), program=program, console=quiet_console()
    )
    assert changed.program is not program


def test_a_rank_beyond_the_kernel_is_refused_before_anything_is_read(config):
    with pytest.raises(ValueError, match=r"--rank 33 is more than q_proj has.*at most 32"):
        prepare_finetuning(
            config(method="lora", rank=33, targets=("q_proj",)), console=quiet_console()
        )
    with pytest.raises(ValueError, match=r"k_proj has.*at most 16"):
        prepare_finetuning(config(method="dora", rank=17), console=quiet_console())


def test_a_default_rate_is_that_of_the_method_or_asked_for(config):
    run = prepare_finetuning(config(method="lora", learning_rate=None), console=quiet_console())
    assert run.summary.learning_rate == 2e-5
    assert run.summary.rate_source == "default: the LoRA-Pre paper's"
    given = prepare_finetuning(config(method="lora", learning_rate=1e-3), console=quiet_console())
    assert given.summary.rate_source == "given"
    with pytest.raises(ValueError, match=r"sage_hybrid has no default rate.*--learning-rate"):
        check(config(method="sage_hybrid", learning_rate=None))


def test_no_steps_are_not_an_epoch(config):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        prepare_finetuning(config(steps=0), console=quiet_console())
