"""The step benchmarks measure what they say, keep what they measured, and go on where they stopped."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.peers import register_peers
from benchmarks.steps import memory, step_time
from benchmarks.steps.programs import trainer_settings
from benchmarks.steps.updates import Store, Update, operations, random_tree
from examples.llama.model.config import preset
from examples.llama.optimizers.registry import OPTIMIZERS


def test_an_update_is_the_optimizers():
    update = Update("demo", "adamw")
    params, grads = random_tree(update.params, 0.02), random_tree(update.params, 1e-3, seed=1)
    before = jax.tree.map(np.asarray, params)
    compiled, seconds = update.compile()
    assert seconds > 0
    after, state = compiled(params, update.tx.init(params), grads)
    jax.tree.map(  # Adam's first step is the rate in the gradient's direction; decay is 0.01
        lambda a, b, g: np.testing.assert_allclose(
            a - b, -1e-5 * (g / (np.abs(g) + 1e-8) + 0.01 * b), atol=2e-7
        ),
        after,
        before,
        jax.tree.map(np.asarray, grads),
    )
    assert update.largest_leaf_bytes == 4 * 8192 * 192
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == update.state_bytes


def test_galore_gets_unstacked_layers_and_ranks_are_the_presets():
    assert not Update("galore_60m", "galore").scan_layers
    assert Update("galore_60m", "lorapre_adamw").rank == 128
    assert Update("galore_60m", "lorapre_adamw:rank=4").rank == 4
    assert Update("demo", "lion").rank is None


def test_operations_of_a_compiled_program():
    def function(x):
        return jnp.linalg.cholesky(x @ x.T + jnp.eye(4)) * jnp.exp(x) + 1

    text = jax.jit(function).lower(jnp.ones((4, 4))).compile().as_text()
    found = operations(text)
    assert found["library_calls"] >= 2  # the product and LAPACK
    assert found["fusions"] >= 1
    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda _, x: jnp.sin(x) @ x, x))
    assert operations(looped.lower(jnp.ones((4, 4))).compile().as_text())["loops"] == 1


def test_a_store_keeps_one_cell_of_each_name(tmp_path):
    path = tmp_path / "cells.json"
    store = Store(path, ("preset", "variant"))
    for ratio in (1.0, 2.0):
        store.put({"preset": "demo", "variant": "adamw", "ratio": ratio}, {"command": "x"})
    store.put({"preset": "demo", "variant": "lion", "ratio": 3.0}, {"command": "y"})
    again = Store(path, ("preset", "variant"))
    assert len(again.cells) == 2
    assert again.find(preset="demo", variant="adamw")["ratio"] == 2.0
    assert again.find(preset="demo", variant="muon") is None
    assert again.content["circumstances"] == {"command": "y"}


def test_memory_refuses_what_does_not_fit():
    step_time.check_memory(1024)
    with pytest.raises(MemoryError, match=r"needs 1048576\.0 GiB"):
        step_time.check_memory(2**50)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("examples.llama.optimizers.registry.OPTIMIZERS", dict(OPTIMIZERS))
    register_peers()


@pytest.mark.usefixtures("registry")
def test_the_floor_takes_three_products_a_moment():
    """Two operations an entry and rank each, on the matrices; counted by XLA."""
    update = Update("demo", "products:rank=16")
    flops = update.compile()[0].cost_analysis()["flops"]
    matrices = update.parameter_count - 8192 * 192 - 9 * 192
    assert 12 * 16 * matrices < flops < 12 * 16 * matrices + 40 * update.parameter_count


def test_the_trainers_step_is_timed(monkeypatch):
    def tiny(*args, **options):
        settings = trainer_settings(*args, **options, batch_size=2, seq_len=16)
        small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_layers": 1}
        return dataclasses.replace(settings, model=preset("demo", **small))

    monkeypatch.setattr(step_time, "trainer_settings", tiny)
    cell = step_time.measure_training("demo", "float32", "lorapre_adamw:rank=2", "keep", 2)
    assert cell["rank"] == 2
    assert cell["time"]["pairs"] == 2
    assert cell["tokens_per_second"] * cell["time"]["median_seconds"] == pytest.approx(32)


@pytest.mark.full_codegen
def test_temporaries_are_fewer_when_ordered_for_memory():
    update = Update("demo", "sage_hybrid")
    default = update.compile()[0].memory_analysis().temp_size_in_bytes
    assert memory._scheduled_for_memory(update) < default


@pytest.mark.extended
@pytest.mark.usefixtures("registry")
def test_both_benchmarks_write_their_pages_and_go_on(tmp_path, capsys, monkeypatch):
    arguments = ["--presets", "demo", "--optimizers", "adamw", "--out", str(tmp_path)]
    times = [*arguments, "--train", "", "--pairs", "2", "--compiles", "1"]
    step_time.main(times)
    memory.main(arguments)
    cell = json.loads((tmp_path / "step_time.json").read_text())["cells"][0]
    assert cell["time"]["pairs"] == 2
    assert cell["time"]["ratio"] > 0
    page = (tmp_path / "step_time.md").read_text()
    assert "## demo, float32, update and apply, cpu" in page
    assert (tmp_path / "step_time.png").stat().st_size > 10_000
    counted = json.loads((tmp_path / "memory.json").read_text())["cells"][0]
    assert counted["state_bytes"] == 8 * counted["parameters"] + 4
    assert counted["aliased_bytes"] >= 12 * counted["parameters"]  # parameters and state donated
    assert counted["bytes_accessed"] >= 28 * counted["parameters"]
    assert counted["temporary_bytes_least"] <= counted["temporary_bytes"]
    assert "| AdamW | - | 25.51 MiB |" in (tmp_path / "memory.md").read_text()

    def never(*args):
        raise AssertionError("a measured cell was measured again")

    monkeypatch.setattr(step_time, "measure_update", never)
    monkeypatch.setattr(memory, "measure", never)
    step_time.main(times)
    memory.main(arguments)
    with pytest.raises(AssertionError, match="measured again"):
        memory.main([*arguments, "--again", "adamw"])

    def too_large(*args):
        raise MemoryError("needs 9 GiB, 1 are free")

    monkeypatch.setattr(step_time, "measure_update", too_large)
    step_time.main([*times, "--again", "adamw"])
    assert "left out, needs 9 GiB" in capsys.readouterr().out
