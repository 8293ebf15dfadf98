"""Weights & Biases beside TensorBoard: what a stand-in of the package is told, and the error without it."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from examples.llama import train
from examples.llama.reporting.metrics import MetricsWriter, read_metrics
from examples.llama.reporting.wandb_run import PROJECT, check_wandb
from examples.llama.training.run import train as run_train
from tests.llama import tiny
from tests.llama.tiny import quiet_console


class StandIn(ModuleType):
    """What of the package is used, written down."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
        self.started, self.lines, self.metrics, self.finished = [], [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def define_metric(self, *names, **options):
        self.metrics.append((*names, *options.values()))

    def log(self, line):
        self.lines.append(line)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    found = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", found)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return found


def test_a_run_is_logged_offline(wandb, tmp_path):
    run_train(
        tiny.config(tmp_path / "run", steps=2, eval_every=2, log_every=1, wandb="offline"),
        model=tiny.MODEL,
        dataset=tiny.dataset(),
        console=quiet_console(),
    )
    (options,) = wandb.started
    assert (options["mode"], options["project"], options["name"]) == ("offline", PROJECT, "run")
    assert options["config"]["settings"]["steps"] == 2
    assert ("*", "step") in wandb.metrics
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in wandb.lines] == [line["step"] for line in lines]
    losses = [line["train/loss"] for line in wandb.lines if "train/loss" in line]
    assert losses == [line["loss"] for line in lines if line["kind"] == "train"]
    assert wandb.finished == 1


def test_a_resumed_run_goes_on_under_its_identity(wandb, tmp_path):
    for keep_until in (None, 1, None):
        with MetricsWriter(
            tmp_path, tensorboard=False, wandb="offline", keep_until=keep_until
        ) as w:
            w.write("train", 1 if keep_until is None else 2, {"loss": 1.0})
    first, resumed, anew = (options["id"] for options in wandb.started)
    assert first == resumed != anew
    assert {options["resume"] for options in wandb.started} == {"allow"}


def test_the_project_is_the_environments(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    MetricsWriter(tmp_path, tensorboard=False, wandb="online").close()
    assert wandb.started[0]["project"] == "mine"


def test_only_one_process_logs(wandb, tmp_path):
    MetricsWriter(tmp_path, tensorboard=False, wandb="online", active=False).close()
    assert not wandb.started


def test_without_the_package_there_is_one_line(monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a)
    )
    check_wandb(None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[wandb\]'"):
        check_wandb("offline")
    out = str(tmp_path / "run")
    assert train.main(["--wandb", "offline", "--data", "synthetic:0:20", "--out", out]) == 2
    assert capsys.readouterr().err.startswith(
        "error: --wandb needs the package of that name; pip install"
    )


def test_the_package_is_imported_only_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    MetricsWriter(tmp_path, tensorboard=False).close()
