"""The estimate of activations against XLA's analysis of the compiled step."""

from __future__ import annotations

import dataclasses

import pytest

from examples.llama.comparing.activations import activations
from examples.llama.comparing.plan import PlanConfig, make_plan
from examples.llama.model.config import preset
from examples.llama.training.config import TrainConfig, resolve
from examples.llama.training.program import Program

FOR_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def temporaries(settings):
    """Temporaries of the compiled step, in the better of XLA:CPU's two orders of operations.

    Its default order runs as much as possible at once; the other one needs little memory, as on accelerators,
    but now and then more than the default.
    """
    lowered = Program(settings).lower()
    return min(
        lowered.compile(options).memory_analysis().temp_size_in_bytes
        for options in ({}, FOR_MEMORY)
    )


@pytest.mark.full_codegen
@pytest.mark.parametrize(
    ("name", "batch", "remat", "accumulate"),
    [
        ("demo", 16, False, 1),
        ("demo", 16, True, 1),
        ("demo", 32, False, 2),
        ("galore_60m", 16, False, 1),
        ("galore_60m", 16, True, 1),
    ],
)
def test_within_15_per_cent_of_the_compiled_step(name, batch, remat, accumulate):
    fields = {"preset": name, "batch_size": batch, "remat": remat, "accumulate": accumulate}
    (row,) = make_plan(PlanConfig(**fields, optimizers="adamw")).rows
    settings = resolve(TrainConfig(**fields, optimizer="adamw", learning_rate=1e-3))
    measured = temporaries(settings) - row.gradients  # the plan counts them by themselves
    assert row.activations == pytest.approx(measured, rel=0.15)


def test_sizes_grow_as_they_should():
    model = dataclasses.replace(preset("demo"), max_seq_len=4096)

    def kept(**fields):
        return activations(model, **{"rows": 4, "length": 512} | fields).kept

    assert kept(rows=8) - kept() == pytest.approx(kept(rows=12) - kept(rows=8))
    scores = kept() - kept(flash=True)
    assert (
        scores > 4 * 4 * model.num_heads * 512**2 * model.num_layers
    )  # float32, and more than once
    assert kept(length=1024) - kept(length=1024, flash=True) == pytest.approx(4 * scores, rel=0.01)
    assert kept(remat=True) < kept(flash=True) / 5
    assert kept(compute_dtype="bfloat16") < kept()
    assert kept(tensor=2) < kept()


def test_the_trace_of_the_whole_batch_is_the_formula():
    """Extrapolated from tiny traces, the bytes are those of a trace of the size that is asked for."""
    from examples.llama.comparing.activations import _kept, _residual_bytes

    model = dataclasses.replace(preset("demo"), num_layers=3)
    for remat in (False, True):
        whole = _residual_bytes(model, 5, 100, "float32", remat)
        shape = {"rows": 5, "length": 100, "dtype": "float32", "flash": False, "fsdp": 1}
        one, two = (_kept(model, layers=n, remat=remat, **shape) for n in (1, 2))
        assert one + 2 * (two - one) == whole


@pytest.mark.parametrize("name", ["rows", "length", "tensor", "fsdp"])
def test_numbers_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        activations(preset("demo"), **{"rows": 1, "length": 8, name: 0})
