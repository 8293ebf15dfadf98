"""The old run stays until the new one has begun."""

from __future__ import annotations

import pytest

from examples.llama.reporting.folders import REPLACED
from examples.llama.training.replacement import Replacement, recover

NAMES = (
    "config.json",
    "summary.json",
    "metrics.jsonl",
    "checkpoints/5/state",
    "tensorboard/events",
)


def write(folder, text):
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def content(folder):
    return {name: (folder / name).read_text() for name in NAMES if (folder / name).is_file()}


def test_an_error_before_the_beginning_brings_the_old_run_back(tmp_path):
    write(tmp_path, "old")

    def begin():
        with Replacement(tmp_path, replace=True):
            assert set(content(tmp_path)) == {"metrics.jsonl"}
            write(tmp_path, "new")
            raise ValueError("bad weights")

    with pytest.raises(ValueError, match="bad weights"):
        begin()
    assert content(tmp_path) == dict.fromkeys(NAMES, "old")
    assert not (tmp_path / REPLACED).exists()


def test_commit_removes_the_old_run(tmp_path):
    write(tmp_path, "old")

    def begin():
        with Replacement(tmp_path, replace=True) as replacement:
            write(tmp_path, "new")
            replacement.commit()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    assert content(tmp_path) == dict.fromkeys(NAMES, "new")
    assert {path.name.split("/")[0] for path in tmp_path.iterdir()} == {
        n.split("/")[0] for n in NAMES
    }


def test_the_run_of_a_process_that_died_on_the_way_is_recovered(tmp_path):
    write(tmp_path, "old")
    Replacement(tmp_path, replace=True).__enter__()  # and then it died
    write(tmp_path, "new")
    recover(tmp_path)
    assert content(tmp_path) == dict.fromkeys(NAMES, "old")


@pytest.mark.parametrize("options", [{"replace": False}, {"replace": True, "active": False}])
def test_nothing_moves_unless_asked(tmp_path, options):
    write(tmp_path, "old")
    with Replacement(tmp_path, **options):
        assert content(tmp_path) == dict.fromkeys(NAMES, "old")
