"""How a command ends on a user's mistake: one line that names the flag or the file, and status 2."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from examples.llama import compare, evaluate, export, finetune, generate, plan, train
from examples.llama.reporting.command import command, message

COMMANDS = (train, finetune, export, evaluate, generate, plan, compare)


def failing(module, *arguments, capsys):
    """The only line that a command prints, which ends it with 2."""
    try:
        status = module.main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("module", "arguments", "line"),
    [
        (train, ["--steps", "ten"], "--steps wants an integer, got 'ten'"),
        (train, ["--steps"], "--steps wants an integer, got no value"),
        (train, ["--learning-rate=x"], "--learning-rate wants a number, got 'x'"),
        (train, ["--lr", "1"], "there is no option --lr; did you mean --learning-rate?"),
        (train, ["--batch-sise", "1"], "did you mean --batch-size?"),
        (train, ["--compute-dtype", "bf16"], "one of float32, bfloat16, got 'bf16'"),
        (train, ["--optimizer", "sage_hybird"], "did you mean 'sage_hybrid'? The optimizers are"),
        (train, ["--preset", "deno"], "did you mean 'demo'? The presets are"),
        (train, ["--protocol", "demmo"], "did you mean 'demo'? The protocols are"),
        (train, ["--batch-size", "0", "--learning-rate", "1"], "--batch-size must be at least 1"),
        (train, ["--steps", "0", "--learning-rate", "1"], "--steps must be at least 1"),
        (train, ["--heldout-fraction", "1.5"], "--heldout-fraction must be"),
        (train, ["--data", ""], "--data is empty"),
        (train, ["--data", "/dev/null"], "is neither a file nor a folder"),
        (finetune, ["--model", "a", "--data", "b", "--method", "lroa"], "did you mean 'lora'?"),
        (finetune, ["--model", "meta-llama/L", "--data", "b"], "hf download meta-llama/L"),
        (
            generate,
            ["--model", "a", "--prompt", "b", "--compute-dtype", "float8"],
            "--compute-dtype",
        ),
        (generate, ["--model", "a"], "--prompt is required"),
        (export, ["--model", "a", "--out", "b", "--max-file-gb", "-1"], "--max-file-gb must be"),
        (evaluate, ["--model", "a", "--out", "b", "--task", "gsm8"], "did you mean 'gsm8k'?"),
        (plan, ["--preset", "demo", "--device-gb", "0"], "--device-gb must be positive"),
    ],
)
def test_mistakes_are_one_line(module, arguments, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert line in failing(module, *arguments, capsys=capsys)


def test_a_path_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        said = failing(train, "--out", out, "--data", "synthetic:0:40", capsys=capsys)
        assert "is a file" in said
        said = failing(export, "--model", "x", "--out", out, capsys=capsys)
        assert "is a file" in said
        asked = ("--model", "x", "--data", "arithmetic:0", "--out", out)
        assert "is a file" in failing(evaluate, *asked, capsys=capsys)


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path = Path("x")


def test_a_full_disk_is_one_line_and_a_bug_is_a_traceback(capsys):
    def full(config):
        raise OSError(28, "No space left on device", "runs/x/metrics.jsonl")

    def bug(config):
        raise TypeError("a bug")

    assert command(Config, full, [], prog="x") == 2
    assert capsys.readouterr().err == "error: runs/x/metrics.jsonl: No space left on device\n"
    with pytest.raises(TypeError, match="a bug"):
        command(Config, bug, [], prog="x")


@pytest.mark.parametrize("module", COMMANDS)
def test_help_ends_well(module, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    assert "--" in capsys.readouterr().out


def test_names_far_from_all_others_get_no_guess():
    text = "unknown optimizer 'zzz'; the optimizers are adamw, lion"
    assert message(ValueError(text)) == text


def test_brackets_in_a_message_are_left_alone(capsys):
    def act(config):
        raise ValueError("runs/x[/bold] is bad")

    assert command(Config, act, [], prog="x") == 2
    assert capsys.readouterr().err == "error: runs/x[/bold] is bad\n"
