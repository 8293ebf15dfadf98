"""Every command shows its options under its own name."""

from __future__ import annotations

import dataclasses
import importlib
import re
import typing

import pytest

from examples.llama.comparing.comparison import CompareConfig
from examples.llama.comparing.plan import PlanConfig
from examples.llama.export import ExportConfig
from examples.llama.finetuning.evaluation import EvaluateConfig
from examples.llama.finetuning.run import FinetuneConfig
from examples.llama.generate import GenerateConfig
from examples.llama.reporting.command import explain, flags_named, parse
from examples.llama.reporting.files import jsonable, written
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
    flags = [written(field).replace("_", "-") for field in dataclasses.fields(kind)]
    assert sorted(starts) == sorted(f"--{flag}" for flag in flags)
    assert "{None}" not in said
    assert "default: None" not in said
    main = re.split(r"(?m)^\W*[a-z]+ options", said)[1]
    first = re.findall(r"^[│| ] ?--([a-z][a-z-]+)", main, re.MULTILINE)
    assert [name.replace("-", "_") for name in first] == grouped(kind)["main"]
    assert max(map(len, said.splitlines()[3:])) <= 80


def test_the_five_options_of_train_and_finetune():
    assert grouped(TrainConfig)["main"] == ["preset", "optimizer", "data", "learning_rate", "out"]
    assert grouped(FinetuneConfig)["main"] == ["model", "method", "data", "learning_rate", "out"]


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_a_flag_has_the_name_that_files_have(kind):
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        given = [one for one in getattr(hints[field.name], "__metadata__", ()) if one.name]
        assert [one.name for one in given] == [written(field)] * (field.name != written(field))


def test_the_option_set_is_called_options_outside():
    for kind in (TrainConfig, FinetuneConfig):
        config = parse(kind, ["--options", "recommended"], prog="x")
        assert config.option_set == "recommended"
        stored = jsonable(config)
        assert stored["options"] == "recommended"
        assert "option_set" not in stored
        assert explain(kind, ["--options", "x"]) == (
            "--options wants one of paper, recommended, got 'x'"
        )
        assert flags_named("option_set is odd", kind) == "--options is odd"
    assert "options that are not given" in descriptions(TrainConfig)["option_set"]


def test_descriptions_are_joined():
    text = descriptions(TrainConfig)["checkpoint_every"]
    assert "\n" not in text
    assert text.startswith("Steps between checkpoints, written to the folder")
    assert descriptions(TrainConfig)["simulate_devices"].startswith("Number of devices")
