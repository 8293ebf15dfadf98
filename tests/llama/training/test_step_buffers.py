"""The step's buffers: every array of the state is updated in place, and no step waits for the host."""

import re
from typing import Any

import jax
import numpy as np
import pytest

from examples.llama.training import recorder as recorder_module
from examples.llama.training.config import resolve
from examples.llama.training.program import Program
from examples.llama.training.run import prepare_run
from tests.llama import tiny


def aliased(text):
    """Numbers of the parameters that an output of a compiled program takes over."""
    header = text.splitlines()[0]
    found = re.search(r"input_output_alias=\{(.*?)\}, entry", header)
    return set() if found is None else {int(n) for n in re.findall(r"\((\d+), \{\}", found[1])}


@pytest.mark.parametrize("optimizer", ["adamw", "sage_hybrid", "sage_hybrid_int8", "lorapre_adamw"])
def test_every_array_of_the_state_is_aliased(optimizer):
    program = Program(resolve(tiny.config(None, optimizer=optimizer), tiny.MODEL))
    leaves = jax.tree.leaves(program.abstract_state)
    compiled: Any = program._step
    assert aliased(compiled.as_text()) == set(range(len(leaves)))
    assert compiled.memory_analysis().alias_size_in_bytes == sum(
        leaf.size * leaf.dtype.itemsize for leaf in leaves
    )


def test_the_check_would_notice_what_is_not_donated():
    compiled = jax.jit(lambda state: state + 1).lower(np.float32(1)).compile()
    assert aliased(compiled.as_text()) == set()


def test_a_step_transfers_nothing_implicitly():
    program = Program(resolve(tiny.config(None), tiny.MODEL))
    state, metrics = program.init(0), None
    tokens = np.zeros((8, 17), np.int32)
    program.compile()
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, metrics, _ = program.step(state, {"tokens": tokens}, 1e-2)
    assert int(state.step) == 3
    assert metrics is not None
    assert np.isfinite(metrics.loss)
    with (
        jax.transfer_guard("disallow"),
        pytest.raises(Exception, match="Disallowed host-to-device transfer"),
    ):
        program._step(state, {}, {"tokens": tokens}, np.float32(1e-2))


def test_the_loop_fetches_metrics_at_log_lines_only(tmp_path, monkeypatch):
    """Eight steps, a line every fourth: two fetches of four steps, and no other wait for a step."""
    fetched, waited = [], []
    fetch, wait = jax.device_get, jax.block_until_ready

    def counted_fetch(tree):
        fetched.append(len(tree))
        return fetch(tree)

    def counted_wait(tree):
        waited.append(tree)
        return wait(tree)

    monkeypatch.setattr(recorder_module.jax, "device_get", counted_fetch)
    monkeypatch.setattr(recorder_module.jax, "block_until_ready", counted_wait)
    config = tiny.config(tmp_path / "run", log_every=4, eval_every=8)
    run = prepare_run(
        config, model=tiny.MODEL, dataset=tiny.dataset(), console=tiny.quiet_console()
    )
    steps = []
    step = run.program.step

    def guarded(*args, **kwargs):
        steps.append(len(fetched))
        with jax.transfer_guard("disallow"):
            return step(*args, **kwargs)

    monkeypatch.setattr(run.program, "step", guarded)
    assert run.train().status == "finished"
    assert steps == [0, 0, 0, 0, 1, 1, 1, 1]
    assert fetched[:2] == [4, 4]
    assert waited == []


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("optimizer", ["adamw", "sage_hybrid"])
def test_the_whole_step_lowers_for_accelerators(platform, optimizer):
    config = tiny.config(None, optimizer=optimizer, compute_dtype="bfloat16", loss_chunk=32)
    program = Program(resolve(config, tiny.MODEL))
    text = program.lower(platforms=(platform,)).as_text()
    assert "stablehlo.dot_general" in text
    assert "bf16" in text


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_a_chunked_step_on_a_mesh_is_that_of_one_device(mode):
    tokens = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)
    losses = []
    for mesh in ({}, {"mesh": "data=2,fsdp=2,tensor=2", "mesh_mode": mode}):
        program = Program(resolve(tiny.config(None, loss_chunk=32, **mesh), tiny.MODEL))
        state, found = program.init(0), []
        for _ in range(3):
            state, metrics, _ = program.step(state, {"tokens": tokens}, 1e-2)
            found.append((float(metrics.loss), float(metrics.grad_norm)))
        losses.append(found)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
