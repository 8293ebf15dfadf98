"""Every command shows its options under its own name."""

from __future__ import annotations

import importlib

import pytest

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
