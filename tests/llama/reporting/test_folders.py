"""Which folders a command may write into."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from examples.llama.reporting.folders import (
    FolderError,
    check_apart,
    check_file,
    check_output,
    kind_of,
)


def write(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def run_in(folder: Path) -> Path:
    write(folder / "config.json", json.dumps({"settings": {}, "command": "x"}))
    write(folder / "summary.json", json.dumps({"status": "finished", "planned_steps": 3}))
    (folder / "checkpoints" / "3").mkdir(parents=True)
    return folder


def model_in(folder: Path) -> Path:
    write(folder / "config.json", json.dumps({"model_type": "llama"}))
    write(folder / "model.safetensors", "x")
    return folder


def evaluation_in(folder: Path) -> Path:
    write(folder / "items.jsonl", "")
    write(folder / "summary.json", json.dumps({"problems": 3}))
    return folder


def comparison_in(folder: Path) -> Path:
    run_in(folder / "runs" / "adamw")
    return folder


MAKERS = {
    "run": run_in,
    "model": model_in,
    "evaluation": evaluation_in,
    "comparison": comparison_in,
    "something else": lambda folder: write(folder / "config.json", '{"mine": 1}').parent,
    "nothing": lambda folder: write(folder / "train.log", "logs do not count").parent,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_each_kind_is_told_by_its_files(tmp_path, kind):
    assert kind_of(MAKERS[kind](tmp_path)) == kind


@pytest.mark.parametrize("wanted", ["run", "model", "evaluation", "comparison"])
@pytest.mark.parametrize("held", MAKERS)
def test_output_goes_into_an_empty_folder_or_one_of_its_kind(tmp_path, wanted, held):
    out = MAKERS[held](tmp_path / "out")
    if held in (wanted, "nothing"):
        check_output(out, wanted, {})
    else:
        with pytest.raises(FolderError, match=r"--out .* holds .*; give a new folder"):
            check_output(out, wanted, {})


@pytest.mark.parametrize("config", ["", "{", '{"settings": {}, "command": "x"'])
def test_a_run_with_a_damaged_config_is_still_a_run(tmp_path, config):
    out = run_in(tmp_path)
    (out / "config.json").write_text(config)
    check_output(out, "run", {})


def test_output_is_never_the_input_nor_around_it_nor_in_it(tmp_path):
    model = model_in(tmp_path / "models" / "llama")
    (tmp_path / "link").symlink_to(tmp_path / "models")
    inputs = {"--model": model}
    for out in (model, tmp_path / "link" / "llama", tmp_path / "models" / "x" / ".." / "llama"):
        with pytest.raises(FolderError, match="is also --model"):
            check_output(out, "model", inputs)
    for out in (tmp_path, tmp_path / "link"):
        with pytest.raises(FolderError, match="holds --model"):
            check_output(out, "run", inputs)
    for out in (model / "run", tmp_path / "link" / "llama" / "run"):
        with pytest.raises(FolderError, match="lies in --model"):
            check_output(out, "run", inputs)
    check_output(tmp_path / "models" / "llama-2", "run", inputs)


def test_an_evaluation_may_lie_in_its_run_but_not_in_the_checkpoints(tmp_path):
    inputs = {"--model": run_in(tmp_path / "run")}
    check_output(tmp_path / "run" / "gsm8k", "evaluation", inputs, may_be_inside=True)
    for out in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "e"):
        with pytest.raises(FolderError):
            check_output(out, "evaluation", inputs, may_be_inside=True)


def test_inputs_that_are_no_paths_are_passed_over(tmp_path):
    for data in (None, "", "stdlib", "synthetic:0", "hf:a/b", "x" * 5000):
        check_apart(tmp_path, "--data", data)


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    file = write(tmp_path / "file")
    for out in (file, file / "below" / "it"):
        with pytest.raises(FolderError, match=f"cannot be written: {file} is a file"):
            check_output(out, "run", {})
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if not os.access(closed, os.W_OK):  # the superuser may write there
        with pytest.raises(FolderError, match="is read-only"):
            check_output(closed / "run", "run", {})
    assert not (tmp_path / "below").exists()


def test_a_file_to_write_is_no_file_of_another_kind(tmp_path):
    keys = frozenset({"rows"})
    mine, plan = write(tmp_path / "mine.json"), write(tmp_path / "plan.json", '{\n"rows": []}')
    check_file(plan, {}, keys, flag="--json")
    check_file(tmp_path / "new.json", {}, keys, flag="--json")
    with pytest.raises(FolderError, match="another file of yours"):
        check_file(mine, {}, keys, flag="--json")
    with pytest.raises(FolderError, match=r"--json .* is also --hf-config"):
        check_file(plan, {"--hf-config": plan}, keys, flag="--json")
    with pytest.raises(FolderError, match="is a folder"):
        check_file(tmp_path, {}, keys, flag="--json")
