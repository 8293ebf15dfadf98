"""Training on a carried file of tokens: the trainer's own step, each row once, bad files refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import token_training
from benchmarks.steps.programs import trainer_settings
from examples.llama.model import config as presets
from examples.llama.optimizers.registry import OPTIMIZERS
from examples.llama.training.config import TrainConfig, resolve
from tests.llama import tiny


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", tiny.MODEL)
    monkeypatch.setattr("examples.llama.optimizers.registry.OPTIMIZERS", dict(OPTIMIZERS))


@pytest.fixture
def arguments(tmp_path):
    found = tiny.dataset()
    np.savez(tmp_path / "tokens.npz", train=found.train_tokens, heldout=found.heldout_tokens)
    given = ["--tokens", str(tmp_path / "tokens.npz"), "--out", str(tmp_path), "--preset", "tiny"]
    given += ["--steps", "30", "--batch-size", "8", "--seq-len", "16", "--dtypes", "float32"]
    return given


def test_rows_learn_are_kept_and_can_be_compared(arguments, tmp_path, monkeypatch):
    arguments += ["--optimizers", "adamw=1e-2,sage_hybrid=1e-2"]
    token_training.main(arguments)
    cells = json.loads((tmp_path / "token_training.json").read_text())["cells"]
    assert [cell["variant"] for cell in cells] == ["adamw", "sage_hybrid"]
    for cell in cells:
        assert cell["tokens"] == 30 * 8 * 16
        assert cell["train_curve"][0][1] > cell["heldout_loss"] > 0
        assert cell["tokens_per_second"] > 0
    assert cells[1]["state_ratio"] < cells[0]["state_ratio"] == 1
    page = (tmp_path / "token_training.md").read_text()
    assert f"| {cells[0]['heldout_perplexity']:.2f} |" in page

    def never(*args):
        raise AssertionError("a finished row was trained again")

    monkeypatch.setattr(token_training, "train", never)
    token_training.main(arguments)
    with pytest.raises(AssertionError, match="trained again"):
        token_training.main([*arguments, "--seed", "1"])


def test_tokens_outside_the_vocabulary_are_refused(arguments, tmp_path, capsys):
    np.savez(tmp_path / "tokens.npz", train=np.arange(9000), heldout=np.arange(900))
    with pytest.raises(SystemExit):
        token_training.main(arguments)
    assert "token 8999 is outside tiny's vocabulary of 64" in capsys.readouterr().err


def test_a_file_is_written_from_a_corpus(tmp_path, capsys):
    path = tmp_path / "made.npz"
    token_training.main(["--write", str(path), "--data", "synthetic:0:40", "--vocab-size", "300"])
    with np.load(path) as made:
        assert made["train"].size > made["heldout"].size > 0
        assert max(made["train"].max(), made["heldout"].max()) < 300
    assert "held out" in capsys.readouterr().out


def test_batches_are_an_epoch_each_window_once_and_then_another_order():
    found = np.arange(20).reshape(10, 2)
    seen = list(token_training.batches(found, 3, 6, seed=0))
    first, second = np.concatenate(seen[:3])[:, 0], np.concatenate(seen[3:])[:, 0]
    assert len(set(first)) == len(set(second)) == 9
    assert list(first) != list(second)
    with pytest.raises(ValueError, match="10 windows do not fill a batch of 11"):
        next(token_training.batches(found, 11, 1, seed=0))


def test_settings_are_those_of_the_trainer():
    for key in ("adamw", "galore:rank=8", "sage_hybrid:damper=ema"):
        ours = trainer_settings("demo", key, steps=50, learning_rate=1e-3)
        name, *options = key.split(":")
        fields = dict(option.split("=") for option in options)
        fields = {k: int(v) if v.isdigit() else v for k, v in fields.items()}
        config = TrainConfig(optimizer=name, steps=50, learning_rate=1e-3, **fields)
        theirs = resolve(config)
        differing = ("log_every", "statistics_every", "eval_every")
        assert {k: v for k, v in vars(ours).items() if k not in differing} == {
            k: v for k, v in vars(theirs).items() if k not in differing
        }
