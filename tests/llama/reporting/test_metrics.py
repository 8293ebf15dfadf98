"""What a run writes: strict JSON lines that survive a crash, whole files, TensorBoard events."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama.reporting.files import METRICS, jsonable, read_json, versions, write_json
from examples.llama.reporting.metrics import MetricsWriter, read_metrics
from examples.llama.reporting.summary import RunSummary, perplexity, size, summary_table
from tests.llama import tiny


def test_every_line_is_on_disk_before_the_writer_closes(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write("train", 1, {"loss": np.float32(2.5), "tokens": 16})
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1, "loss": 2.5, "tokens": 16}]
    writer.close()


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write("train", 1, {"loss": 1.0})
        writer.write("heldout", 1, {"loss": 2.0})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "train", "st')
    assert [line["kind"] for line in read_metrics(tmp_path)] == ["train", "heldout"]
    assert read_metrics(tmp_path, "heldout")[0]["loss"] == 2.0


def test_lines_are_strict_json_even_where_numbers_are_not_finite(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write("train", 1, {"a": math.nan, "b": -math.inf, "c": jnp.float32(jnp.inf)})

    def refuse(constant):
        raise AssertionError(constant)

    line = json.loads((tmp_path / METRICS).read_text(), parse_constant=refuse)
    assert (line["a"], line["b"], line["c"]) == ("NaN", "-Infinity", "Infinity")


def test_an_earlier_run_keeps_its_lines_beside_the_new_ones(tmp_path):
    for step in (1, 2):
        with MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.write("train", step, {})
    assert [line["step"] for line in read_metrics(tmp_path)] == [2]
    assert json.loads((tmp_path / (METRICS + ".old")).read_text())["step"] == 1


def test_tensorboard_gets_the_same_numbers_and_no_earlier_run(tmp_path):
    for value in (1.5, 2.5):
        with MetricsWriter(tmp_path) as writer:
            writer.write("train", 3, {"loss": value})
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/loss" in content
    assert np.float32(2.5).tobytes() in content
    assert np.float32(1.5).tobytes() not in content


def test_json_files_are_replaced_in_one_piece(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "summary.json"
    write_json(path, {"step": 1})

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("examples.llama.reporting.files.os.replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"step": 2})
    assert read_json(path) == {"step": 1}
    path.write_text('{"step":')
    assert read_json(path) is None
    assert read_json(tmp_path / "missing.json") is None


def test_jsonable_reads_what_runs_hold():
    config = tiny.config(Path("out"))
    value = jsonable({"config": config, "list": (1, np.int64(2)), "array": jnp.float32(0.5)})
    assert value["config"]["out"] == "out"
    assert (value["list"], value["array"]) == ([1, 2], 0.5)
    json.dumps(value, allow_nan=False)


def test_versions_name_what_decides_the_numbers():
    found = versions()
    assert {"python", "jax", "optax", "flax", "numpy", "device"} <= set(found)
    assert all(found.values())


def test_summary_of_a_run_that_reached_nothing_can_be_written_and_shown(tmp_path):
    summary = RunSummary(
        status="interrupted",
        preset="demo",
        optimizer="adamw",
        learning_rate=1e-3,
        rate_source="given",
        seed=0,
        planned_steps=5,
        parameters=10,
        optimizer_state_bytes=20,
        adamw_state_bytes=80,
        corpus_sha256="ab" * 32,
    )
    assert summary.heldout_perplexity is None
    assert summary.state_ratio == 0.25
    write_json(tmp_path / "summary.json", summary.to_dict())
    console = tiny.quiet_console()
    console.print(summary_table(summary))
    assert "0.250 of AdamW's" in console.file.getvalue()
    assert (size(3 * 2**40), perplexity(0.0)) == ("3.00 TiB", 1.0)


def test_bytes_that_are_no_text_end_the_lines_that_count(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write("train", 1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "step": 2, "loss": \xff\xfe')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    with MetricsWriter(tmp_path, tensorboard=False, keep_until=1) as writer:
        writer.write("train", 2, {"loss": 2.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_numbers_that_are_not_finite_go_to_the_lines_alone(tmp_path, caplog):
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, {"loss": float("nan"), "grad_norm": 1.0})
    assert read_metrics(tmp_path)[0]["loss"] == "NaN"
    assert not caplog.records
