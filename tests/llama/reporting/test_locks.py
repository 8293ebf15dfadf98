"""One writer a folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from examples.llama.reporting.folders import LOCK, FolderError
from examples.llama.reporting.locks import FolderLock

HOLD = """
import sys, time
from pathlib import Path
from examples.llama.reporting.locks import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_process_is_told_who_writes(tmp_path, holder):
    message = f"process {holder.pid} on {socket.gethostname()} is writing to {tmp_path}"
    for force in (False, True):
        with pytest.raises(FolderError, match=message), FolderLock(tmp_path, force=force):
            pass


def test_the_lock_dies_with_its_process(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_of_another_host_is_believed_until_force_unlock(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({"process": 1, "host": "elsewhere"}))
    with pytest.raises(FolderError, match=r"process 1 on elsewhere.*--force-unlock"):
        FolderLock(tmp_path).__enter__()
    with FolderLock(tmp_path, force=True):
        pass


def test_without_flock_a_living_process_of_this_host_is_believed(tmp_path, holder, monkeypatch):
    def no_locks(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(FolderError, match=f"process {holder.pid} .* is writing"):
        FolderLock(tmp_path, force=True).__enter__()
    holder.kill()
    holder.wait()
    with FolderLock(tmp_path):
        pass


def test_an_inactive_lock_touches_nothing(tmp_path):
    with FolderLock(tmp_path / "x", active=False):
        assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=r"--out .* cannot be written"):
        FolderLock(tmp_path / "file" / "run").__enter__()
