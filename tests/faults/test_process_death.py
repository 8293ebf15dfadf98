"""One of two processes dies or freezes: the other ends with an error within a minute."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from examples.llama.launch import free_port
from examples.llama.metrics import METRICS, SUMMARY, read_metrics

DEADLINE = 60.0


def start(tmp_path, steps):
    """Two processes of two devices that train together."""
    port, found = free_port(), []
    for i in range(2):
        log = (tmp_path / f"{i}.log").open("w")
        found.append(
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.llama.distributed_worker"),
                    *(f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process-id={i}"),
                    *("--simulate-devices=2", f"--steps={steps}", f"--eval-every={steps}"),
                    f"--out={tmp_path / 'run'}",
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


@pytest.mark.parametrize(
    ("victim", "how"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_the_other_process_ends_with_an_error(tmp_path, victim, how):
    processes = start(tmp_path, steps=1_000_000)
    survivor = processes[1 - victim]
    try:
        until = time.monotonic() + 240
        while steps_taken(tmp_path) < 3:
            for i, process in enumerate(processes):
                assert process.poll() is None, (tmp_path / f"{i}.log").read_text()
            assert time.monotonic() < until, "the run did not start"
            time.sleep(0.2)
        assert survivor.poll() is None
        processes[victim].send_signal(how)
        struck = time.monotonic()
        code = survivor.wait(timeout=DEADLINE)
        assert time.monotonic() - struck < DEADLINE
        assert code != 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    log = (tmp_path / f"{1 - victim}.log").read_text(errors="replace")
    assert "error" in log.lower()
    # What was written before is whole, and nothing says that the run was finished.
    lines = read_metrics(tmp_path / "run", "train")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert not (tmp_path / "run" / SUMMARY).exists()
