"""Runs as Hugging Face folders, and prompts completed from either on the command line."""

import json
import os

import jax
import numpy as np
import pytest

from examples.llama.evaluate import main as evaluate
from examples.llama.export import main as export
from examples.llama.finetuning.loading import load_model
from examples.llama.finetuning.run import finetune
from examples.llama.generate import main as generate
from examples.llama.model.hf_write import save_folder
from examples.llama.training.run import train
from examples.llama.training.settings import settings_from_json
from tests.llama import finetune_case, tiny
from tests.llama.tiny import quiet_console


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return finetune_case.write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def tuned(hub, tmp_path_factory):
    config = finetune_case.config(
        hub, tmp_path_factory.mktemp("run"), method="lora", steps=2, checkpoint_every=2
    )
    finetune(config, console=quiet_console())
    return config.out


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_adapters_are_merged(tuned, hub, tmp_path, capsys):
    assert export(["--model", str(tuned), "--out", str(tmp_path), "--max-file-gb", "1e-4"]) == 0
    assert "model.safetensors.index.json" in capsys.readouterr().out
    assert_same(load_model(tmp_path).params, load_model(tuned).params)
    kernel = load_model(hub).params["layers"]["mlp"]["up_proj"]["kernel"]
    assert not np.array_equal(
        load_model(tmp_path).params["layers"]["mlp"]["up_proj"]["kernel"], kernel
    )
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["eos_token_id"] == load_model(hub).stop_ids[0]
    assert (tmp_path / "generation_config.json").is_file()
    assert export(["--model", str(tuned), "--out", str(tmp_path)]) == 2
    assert "holds a model" in capsys.readouterr().err


def test_a_pretraining_run_has_its_tokenizer_and_stop_token(tmp_path):
    config = tiny.config(
        tmp_path / "run",
        data="synthetic:0:60",
        vocab_size=300,
        preset="demo",
        cache_dir=str(tmp_path / "cache"),
        steps=1,
        eval_every=1,
        checkpoint_every=1,
    )
    small = finetune_case.MODEL
    train(config, model=small, console=quiet_console())
    assert export(["--model", str(config.out), "--out", str(tmp_path / "hf")]) == 0
    model, exported = load_model(config.out), load_model(tmp_path / "hf")
    assert_same(model.params, exported.params)
    assert exported.stop_ids == model.stop_ids == (model.tokenizer.token_to_id("<eos>"),)
    assert exported.config == model.config == small
    begin, end = (model.tokenizer.token_to_id(name) for name in ("<bos>", "<eos>"))
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (begin, end)
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": begin, "eos_token_id": end}
    described = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (described["bos_token"], described["eos_token"]) == ("<bos>", "<eos>")
    assert described["model_max_length"] == small.max_seq_len
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()}
    assert set(modes.values()) == {0o666 & ~mask()}, modes


@pytest.mark.parametrize("which", ["hub", "tuned"])
def test_prompts_are_completed(which, request, capsys):
    folder = request.getfixturevalue(which)
    arguments = ["--model", str(folder), "--new-tokens", "4", "--prompt", "Ana has 3", "Ben"]
    assert generate(arguments) == 0
    first = capsys.readouterr().out
    assert "Ana has 3" in first
    assert generate(arguments) == 0
    assert capsys.readouterr().out == first


def test_errors_are_one_line(tmp_path, hub, capsys):
    assert generate(["--model", str(tmp_path), "--prompt", "a"]) == 2
    assert "no config.json" in capsys.readouterr().err
    assert generate(["--model", str(hub), "--prompt", "a", "--stop", "<never>"]) == 2
    assert "has no token '<never>'" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"settings": {"model": {}}}))
    (tmp_path / "tokenizer.json").write_text((hub / "tokenizer.json").read_text())
    assert export(["--model", str(tmp_path), "--out", f"{tmp_path}-x"]) == 2
    assert "of another version of this program" in capsys.readouterr().err


def test_a_run_without_checkpoints_cannot_be_loaded(tuned, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((tuned / name).read_text())
    with pytest.raises(ValueError, match=r"no checkpoint that can be read \(there is none\)"):
        _ = load_model(tmp_path).params


def test_settings_of_an_unknown_version():
    with pytest.raises(ValueError, match="another version"):
        settings_from_json({"model": {"rope_scaling": None}, "options": {}})


def test_nothing_is_written_into_the_model_that_is_read(tuned, hub, tmp_path, capsys):
    before = {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()}
    for out in (tuned, tuned / "exported"):
        assert export(["--model", str(tuned), "--out", str(out), "--overwrite"]) == 2
        assert "--model" in capsys.readouterr().err
    assert export(["--model", str(hub), "--out", str(tuned), "--overwrite"]) == 2
    assert "holds a training run" in capsys.readouterr().err
    for out in (tuned, tuned / "checkpoints" / "e"):
        asked = ["--model", str(tuned), "--data", "arithmetic:0:4", "--out", str(out)]
        assert evaluate(asked) == 2
        assert "--model" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()} == before


def test_an_export_that_fails_leaves_the_old_files(hub, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(["--model", str(hub), "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~mask() for path in out.iterdir())
    broken = tmp_path / "broken"
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 1e5, np.float32), load_model(hub).params)
    save_folder(broken, finetune_case.MODEL, params, tokenizer=hub)
    capsys.readouterr()
    command = ["--model", str(broken), "--out", str(out), "--overwrite", "--dtype", "float16"]
    assert export(command) == 2
    assert "is not finite in float16; nothing was written" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def mask():
    """The mask of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
