"""Every command shows its options under its own name."""

from __future__ import annotations

import dataclasses
import importlib
import re

import pytest

from examples.llama.comparing.comparison import CompareConfig
from examples.llama.comparing.plan import PlanConfig
from examples.llama.export import ExportConfig
from examples.llama.finetuning.evaluation import EvaluateConfig
from examples.llama.finetuning.run import FinetuneConfig
from examples.llama.generate import GenerateConfig
from examples.llama.reporting.command import parse
from examples.llama.reporting.help import descriptions, grouped
from examples.llama.training.config import TrainConfig

CONFIGS = (
    *(TrainConfig, FinetuneConfig, CompareConfig, PlanConfig),
    *(ExportConfig, GenerateConfig, EvaluateConfig),
)

COMMANDS = (
    *("train", "finetune", "generate", "evaluate", "export", "compare", "plan"),
    "data.arithmetic",
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_command(name, capsys):
    command = importlib.import_module(f"examples.llama.{name}")
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    assert f"usage: python -m examples.llama.{name} [-h]" in capsys.readouterr().out


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_help_has_every_option_once_and_the_main_ones_first(kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(kind, ["--help"], prog="command")
    said = capsys.readouterr().out
    names = [field.name for field in dataclasses.fields(kind)]
    assert sorted(name for group in grouped(kind).values() for name in group) == sorted(names)
    starts = re.findall(r"^[│| ] ?(--[a-z][a-z0-9-]+)", said, re.MULTILINE)
    assert sorted(starts) == sorted(f"--{name.replace('_', '-')}" for name in names)
    assert "{None}" not in said
    assert "default: None" not in said
    main = re.split(r"(?m)^\W*[a-z]+ options", said)[1]
    first = re.findall(r"^[│| ] ?--([a-z][a-z-]+)", main, re.MULTILINE)
    assert [name.replace("-", "_") for name in first] == grouped(kind)["main"]
    assert max(map(len, said.splitlines()[3:])) <= 80


def test_the_five_options_of_train_and_finetune():
    assert grouped(TrainConfig)["main"] == ["preset", "optimizer", "data", "learning_rate", "out"]
    assert grouped(FinetuneConfig)["main"] == ["model", "method", "data", "learning_rate", "out"]


def test_descriptions_are_joined():
    text = descriptions(TrainConfig)["checkpoint_every"]
    assert "\n" not in text
    assert text.startswith("Steps between checkpoints, written to the folder")
    assert descriptions(TrainConfig)["simulate_devices"].startswith("Number of devices")
