"""The accelerator's command on tiny sizes: rows kept at once, gone on with, a page; and the trainer's MFU."""

from __future__ import annotations

import json

import pytest

from benchmarks import accelerator, mfu
from benchmarks.accelerators import parts
from examples.llama.model import config as presets
from examples.llama.optimizers.registry import OPTIMIZERS
from tests.llama import tiny


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "demo", tiny.MODEL)
    monkeypatch.setattr("examples.llama.optimizers.registry.OPTIMIZERS", dict(OPTIMIZERS))


def wanted(sizes):
    names = list(parts.parts(sizes.shapes))
    return [
        accelerator.Job("update", "demo", "bfloat16", "sage_hybrid"),
        accelerator.Job("update", "demo", "bfloat16", "lion"),
        accelerator.Job("mfu", "demo", "bfloat16", "adamw"),
        accelerator.Job("part", "", "", names[1]),
        accelerator.Job("part", "", "", names[-1]),
    ]


def run(tmp_path, *more):
    given = ["--sizes", "small", "--threads", "1", "--pairs", "2", "--repeats", "1"]
    accelerator.main([*given, "--out", str(tmp_path), "--peak-tflops", "0.1", *more])
    path = tmp_path / "accelerator" / "measured.json"
    return json.loads(path.read_text())["cells"] if path.exists() else []


def test_rows_are_kept_and_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "jobs", wanted)
    cells = run(tmp_path, "--budget", "300")
    assert [cell["kind"] for cell in cells] == ["update", "update", "mfu", "part", "part"]
    assert cells[0]["time"]["pairs"] == 2
    for cell in cells[:2]:
        assert cell["ratio"] > 0
        assert cell["compile_ratio"] > 0
    assert 0 < cells[2]["mfu"] < 1
    assert all(cell["milliseconds"] > 0 for cell in cells[3:])
    page = (tmp_path / "accelerator.md").read_text()
    assert "### Update and apply" in page
    assert f"| {cells[0]['ratio']:.2f} |" in page
    assert not list((tmp_path / "accelerator").glob("measured.json.*"))

    def never(self, job):
        raise AssertionError("a measured row was measured again")

    monkeypatch.setattr(accelerator.Session, "measure", never)
    assert run(tmp_path) == cells
    capsys.readouterr()


def test_a_spent_budget_leaves_the_rest_and_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "jobs", wanted)
    assert run(tmp_path, "--budget", "0") == []
    assert "the budget is spent; 5 rows are left" in capsys.readouterr().out
    assert "all targets are unverified" in (tmp_path / "accelerator.md").read_text()


def test_a_row_that_fails_is_named_and_the_next_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "jobs", lambda sizes: wanted(sizes)[3:])
    milliseconds = parts.milliseconds
    calls = []

    def first_fails(part, repeats):
        calls.append(part)
        if len(calls) == 1:
            raise ValueError("no such operation here")
        return milliseconds(part, repeats)

    monkeypatch.setattr(parts, "milliseconds", first_fails)
    assert len(run(tmp_path, "--budget", "300")) == 1
    assert "left out, no such operation here" in capsys.readouterr().out


def test_the_most_wanted_rows_come_first():
    found = accelerator.jobs(accelerator.SIZES["full"])
    assert found[0] == accelerator.Job("update", "galore_350m", "bfloat16", "sage_hybrid")
    kinds = [job.kind for job in found]
    assert kinds.index("update") < kinds.index("mfu") < kinds.index("part")
    assert len(set(found)) == len(found)


def test_every_part_runs():
    for name, part in parts.parts(parts.SMALL).items():
        assert parts.milliseconds(part, repeats=1) > 0, name


def test_the_page_holds_the_earlier_figures(tmp_path):
    accelerator.main(["--report", "--out", str(tmp_path)])
    page = (tmp_path / "accelerator.md").read_text()
    assert "One NVIDIA H200, JAX 0.11.2, optax 0.2.8, 2026-11-27, commit 7ebf1c9" in page
    assert "| LoRA-Pre Adam, to products alone | galore_350m | float32 | 1.5 | 2.79 |" in page
    assert "| SAGE-Hybrid, 5 iterations, to AdamW | sage_1.3b | float32 | 1.6 | - |" in page
    assert "| `muon` | 9.68 | 0.006 | 10.0 | 10.9 | 65.3 % |" in page


def test_mfu_rows_are_kept(tmp_path, capsys):
    given = ["--presets", "demo", "--optimizers", "adamw", "--batch-size", "2", "--seq-len", "16"]
    given += ["--steps", "1", "--peak-tflops", "0.1", "--out", str(tmp_path)]
    mfu.main([*given, "--profile", str(tmp_path / "profile")])
    (cell,) = json.loads((tmp_path / "mfu.json").read_text())["cells"]
    expected = cell["step_flops"] / cell["step_seconds"] / 1e11
    assert cell["mfu"] == pytest.approx(expected)
    assert cell["update_share"] == cell["update_seconds"] / cell["step_seconds"]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "profile").rglob("perfetto_trace.json.gz"))
    assert "| demo | bfloat16 | AdamW | 2 x 16 |" in capsys.readouterr().out


def test_an_unknown_device_asks_for_its_peak(tmp_path, capsys):
    with pytest.raises(SystemExit):
        mfu.main(["--out", str(tmp_path)])
    assert "no peak is known for the device 'cpu'; give --peak-tflops" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peaks(device, peak):
    assert mfu.peak_tflops(device) == peak
