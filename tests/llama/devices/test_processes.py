"""Several processes: options, shares of a batch, launches that leave nothing behind, one run in two."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest

from benchmarks.meshes import two_processes
from benchmarks.meshes.launch import Command, LaunchError, free_port, run_together
from benchmarks.meshes.two_processes import DemoConfig, compare_losses
from examples.llama.devices.processes import ClusterConfig, share_of_batch, start_devices
from examples.llama.reporting.files import CONFIG, SUMMARY, read_json
from examples.llama.reporting.metrics import MetricsWriter, read_metrics
from examples.llama.training.run import train
from tests.llama import tiny

MESH = "data=2,fsdp=2,tensor=2"
QUIET = {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "error"}


def workers(tmp_path, *options, each=((), ())):
    """The commands of a run in two processes of four devices each."""
    port = free_port()
    return [
        Command(
            f"process {i}",
            [
                *(sys.executable, "-m", "tests.llama.devices.distributed_worker"),
                *(f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process-id={i}"),
                *("--simulate-devices=4", f"--mesh={MESH}", f"--out={tmp_path / 'run'}"),
                *options,
                *each[i],
            ],
            tmp_path / f"{i}.log",
        )
        for i in range(2)
    ]


@pytest.mark.extended
def test_two_processes_train_as_one_and_one_of_them_writes(tmp_path):
    commands = workers(tmp_path)
    run_together(commands, time_limit=600, environment=QUIET)
    alone = tiny.config(tmp_path / "alone", mesh=MESH, log_every=1, eval_every=8)
    train(alone, model=tiny.MODEL, dataset=tiny.dataset(), console=tiny.quiet_console())
    steps = compare_losses(tmp_path / "alone", tmp_path / "run", 8)
    assert max(step.difference for step in steps) <= 1e-5
    assert steps[-1].one < steps[0].one - 0.1
    heldout = [read_metrics(tmp_path / run, "heldout") for run in ("alone", "run")]
    assert heldout[1][0]["loss"] == pytest.approx(heldout[0][0]["loss"], rel=1e-5)
    mesh = read_json(tmp_path / "run" / CONFIG)["mesh"]
    assert (mesh["processes"], mesh["devices"]) == (2, 8)
    summaries = [read_json(tmp_path / run / SUMMARY) for run in ("alone", "run")]
    for name in ("status", "tokens", "optimizer_state_bytes", "device_state_bytes"):
        assert summaries[0][name] == summaries[1][name]
    outputs = [command.log.read_text() for command in commands]
    assert "held-out perplexity" in outputs[0]
    assert "adamw" not in outputs[1]


@pytest.mark.extended
def test_processes_with_other_settings_do_not_start(tmp_path):
    with pytest.raises(LaunchError, match=r"process \d exited with 2"):
        run_together(workers(tmp_path, each=((), ("--seed=1",))), time_limit=600, environment=QUIET)
    logs = [(tmp_path / f"{i}.log").read_text() for i in range(2)]
    assert any("process 1 has other settings or other data than process 0" in log for log in logs)
    assert not (tmp_path / "run" / CONFIG).exists()


class FakeDevice:
    def __init__(self, process_index):
        self.process_index = process_index


class FakeSharding:
    """Where rows are: a process and a range of rows for each device."""

    def __init__(self, *devices):
        self.devices = devices

    def devices_indices_map(self, shape):
        return {FakeDevice(process): (slice(*rows), slice(None)) for process, rows in self.devices}


def test_a_process_reads_the_share_that_its_devices_hold(monkeypatch):
    split = FakeSharding((0, (0, 2)), (0, (2, 4)), (1, (4, 6)), (1, (6, 8)))
    tensors = FakeSharding((0, (0, 4)), (0, (4, 8)), (1, (0, 4)), (1, (4, 8)))
    pairs = FakeSharding((0, (4, 8)), (1, (4, 8)), (2, (0, 4)), (3, (0, 4)))
    crossed = FakeSharding((0, (0, 4)), (0, (4, 6)), (1, (4, 6)), (1, (6, 8)))
    expected = {0: [(0, 2), (0, 1), (1, 2)], 1: [(1, 2), (0, 1), (1, 2)]}
    for process, shares in expected.items():
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        assert [share_of_batch(each, 8) for each in (split, tensors, pairs)] == shares
    monkeypatch.setattr("jax.process_index", lambda: 3)
    assert share_of_batch(pairs, 8) == (0, 2)
    with pytest.raises(ValueError, match="overlap; let data x fsdp be a multiple"):
        share_of_batch(crossed, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distributed": "auto", "processes": 2}, "not both"),
        ({"processes": 2, "process_id": 0}, "go together; give all three"),
        ({"coordinator": "a:1", "processes": 2, "process_id": 2}, r"process_id must be in 0\.\.1"),
        ({"coordinator": "a", "processes": 2, "process_id": 0}, "must be HOST:PORT, got 'a'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        start_devices(ClusterConfig(**fields))


@pytest.mark.extended
def test_a_process_that_fails_or_is_late_takes_the_others_with_it(tmp_path):
    def python(name, code):
        return Command(name, [sys.executable, "-c", code], tmp_path / f"{name}.log")

    sleeper = python("sleeper", "import time; print('asleep', flush=True); time.sleep(600)")
    started = time.monotonic()
    broken = python("broken", "import sys; print('the reason'); sys.exit(3)")
    with pytest.raises(LaunchError, match=r"(?s)broken exited with 3\. The end of .*the reason"):
        run_together([sleeper, broken], time_limit=300)
    with pytest.raises(LaunchError, match=r"(?s)sleeper: not done after 5 s\. .*asleep"):
        run_together([sleeper, python("done", "print(1)")], time_limit=5)
    assert time.monotonic() - started < 120
    run_together([python("done", "print(1)"), python("too", "print(2)")], time_limit=300)
    assert (tmp_path / "too.log").read_text() == "2\n"


@pytest.mark.parametrize("apart", [0.0, 1e-3])
def test_the_demo_fails_when_the_losses_are_apart(tmp_path, monkeypatch, capsys, apart):
    def fake_train(config, console, out, processes, devices):
        with MetricsWriter(out, tensorboard=False) as writer:
            for step in range(1, config.steps + 1):
                loss = 5.0 / step * (1 + (apart if processes > 1 and step == 3 else 0))
                writer.write("train", step, {"loss_last": loss})
        summary = {"heldout_loss": 1.0, "steps": config.steps, "tokens_per_second": 10.0}
        (out / SUMMARY).write_text(json.dumps(summary))
        versions = {"jax": "1", "python": "3"}
        (out / CONFIG).write_text(json.dumps({"mesh": {}, "versions": versions}))

    monkeypatch.setattr(two_processes, "_train", fake_train)
    code = two_processes.main([f"--out={tmp_path}", "--steps=4", "--compared-steps=4"])
    assert code == (1 if apart else 0)
    stored = read_json(tmp_path / "comparison.json")
    assert stored["agree"] == (not apart)
    np.testing.assert_allclose(stored["largest_difference"], apart, rtol=1e-6)
    page = (tmp_path / "comparison.md").read_text()
    assert ("The losses agree:" in page) == (not apart)
    assert "| 2 | 2.5000000 | 2.5000000 | 0.0e+00 |" in page
    assert ("DO NOT agree" in capsys.readouterr().out) == bool(apart)
    assert two_processes.main([f"--out={tmp_path}", "--steps=4"]) == 1
    assert "compared_steps must be in 1..4" in capsys.readouterr().err
    with pytest.raises(ValueError, match="does not hold the losses of steps 1 to 5"):
        compare_losses(tmp_path / "one", tmp_path / "several", 5)


@pytest.mark.extended
def test_the_demo_names_a_process_that_fails(tmp_path, capsys):
    config = [f"--out={tmp_path}", "--optimizer=adam", "--steps=4", "--compared-steps=4"]
    assert two_processes.main(config) == 1
    error = capsys.readouterr().err
    assert "process 0 exited with 2" in error
    assert "unknown optimizer 'adam'" in error
    assert DemoConfig().tolerance == 1e-5
