"""One of two processes dies or freezes: the other ends with an error within a minute, and both go on later."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.meshes.launch import free_port
from examples.llama.reporting.files import METRICS, SUMMARY, read_json
from examples.llama.reporting.metrics import read_metrics

DEADLINE = 60.0


def start(tmp_path, steps, *options):
    """Two processes of two devices that train together."""
    port, found = free_port(), []
    for i in range(2):
        log = (tmp_path / f"{i}.log").open("w")
        found.append(
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.llama.devices.distributed_worker"),
                    *(f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process-id={i}"),
                    *("--simulate-devices=2", f"--steps={steps}", f"--eval-every={steps}"),
                    f"--out={tmp_path / 'run'}",
                    *options,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )
        log.close()
    return found


def steps_taken(tmp_path):
    if not (tmp_path / "run" / METRICS).exists():
        return 0
    return max((line["step"] for line in read_metrics(tmp_path / "run", "train")), default=0)


def wait_for_steps(tmp_path, processes, count):
    """Returns when so many steps have been taken; fails if a process ends before."""
    until = time.monotonic() + 480
    while steps_taken(tmp_path) < count:
        for i, process in enumerate(processes):
            assert process.poll() is None, (tmp_path / f"{i}.log").read_text()
        assert time.monotonic() < until, "the run did not start"
        time.sleep(0.1)


def strike(processes, victim, how):
    """Sends a signal to one process and returns how the other ended, in time."""
    survivor = processes[1 - victim]
    assert survivor.poll() is None
    processes[victim].send_signal(how)
    return survivor.wait(timeout=DEADLINE)


def end(processes):
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.extended
@pytest.mark.parametrize(
    ("victim", "how"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_the_other_process_ends_with_an_error(tmp_path, victim, how):
    processes = start(tmp_path, 1_000_000, "--checkpoint-every=0")
    try:
        wait_for_steps(tmp_path, processes, 3)
        assert strike(processes, victim, how) != 0
    finally:
        end(processes)
    log = (tmp_path / f"{1 - victim}.log").read_text(errors="replace")
    assert "error" in log.lower()
    # What was written before is whole, and nothing says that the run was finished.
    lines = read_metrics(tmp_path / "run", "train")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert not (tmp_path / "run" / SUMMARY).exists()


@pytest.mark.extended
def test_both_go_on_from_the_last_checkpoint(tmp_path):
    options = (120, "--checkpoint-every=5")
    processes = start(tmp_path, *options)
    try:
        wait_for_steps(tmp_path, processes, 12)
        assert strike(processes, 1, signal.SIGKILL) != 0
    finally:
        end(processes)
    reached = steps_taken(tmp_path)
    assert 12 <= reached < 120
    assert not (tmp_path / "run" / SUMMARY).exists()
    processes = start(tmp_path, *options, "--resume")
    try:
        codes = [process.wait(timeout=480) for process in processes]
    finally:
        end(processes)
    output = (tmp_path / "0.log").read_text()
    assert codes == [0, 0], output
    found = re.search(r"resumed from step (\d+)", output)
    assert found
    assert 5 <= int(found[1]) <= reached
    assert [line["step"] for line in read_metrics(tmp_path / "run", "train")] == list(range(1, 121))
    assert read_json(tmp_path / "run" / SUMMARY)["status"] == "finished"
