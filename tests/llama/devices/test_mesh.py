"""The trainer on a mesh of eight devices: rules, fallbacks, the same losses as on one, state that is split."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from examples.llama.data.batches import heldout_batches, train_iterator
from examples.llama.devices.mesh import Placement, mesh_shape, parse_mesh
from examples.llama.devices.processes import simulate_devices, start_devices
from examples.llama.model.llama import abstract
from examples.llama.optimizers.registry import OPTIMIZERS
from examples.llama.reporting.files import CONFIG, SUMMARY, read_json
from examples.llama.reporting.metrics import read_metrics
from examples.llama.reporting.summary import RunSummary, summary_table
from examples.llama.training.config import resolve
from examples.llama.training.program import Program
from examples.llama.training.run import train
from examples.llama.training.sources import _create_params
from examples.llama.training.step import init_state
from layout_optax.layout import path_string
from tests.llama import tiny

CUBE = "data=2,fsdp=2,tensor=2"
UNTIED = dataclasses.replace(
    tiny.MODEL, vocab_size=96, num_layers=2, num_kv_heads=2, tie_embeddings=False
)
STEPS, RATE = 20, 3e-3


def settings(name, mesh=CUBE, **fields):
    config = tiny.config(None, optimizer=name, steps=STEPS, learning_rate=RATE, mesh=mesh, **fields)
    return resolve(config, UNTIED)


@functools.cache
def program(name, mesh=CUBE, **fields):
    return Program(settings(name, mesh, **fields))


def specs(scan_layers, mesh=CUBE, model=UNTIED):
    shardings = Placement(parse_mesh(mesh)).params(abstract(model, scan_layers=scan_layers))
    flat, _ = jax.tree_util.tree_flatten_with_path(shardings)
    return {path_string(path): sharding.spec for path, sharding in flat}


@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_parameter_is_split_as_the_table_says(scan_layers):
    found = specs(scan_layers)
    layer = "layers" if scan_layers else "layers/1"
    stack = (None,) if scan_layers else ()
    into, out = (PartitionSpec(*stack, *axes) for axes in (("fsdp", "tensor"), ("tensor", "fsdp")))
    for name in ("q", "k", "v"):
        assert found[f"{layer}/self_attn/{name}_proj/kernel"] == into
    assert found[f"{layer}/self_attn/o_proj/kernel"] == out
    assert found[f"{layer}/mlp/gate_proj/kernel"] == found[f"{layer}/mlp/up_proj/kernel"] == into
    assert found[f"{layer}/mlp/down_proj/kernel"] == out
    assert found[f"{layer}/input_layernorm/scale"] == PartitionSpec(*stack, None)
    assert found["embed_tokens/embedding"] == PartitionSpec("tensor", "fsdp")
    assert found["lm_head/kernel"] == PartitionSpec("fsdp", "tensor")
    assert found["norm/scale"] == PartitionSpec(None)
    assert len(found) == 12 if scan_layers else 21


def test_an_axis_that_does_not_divide_is_left_whole_and_said_or_refused():
    odd = dataclasses.replace(UNTIED, vocab_size=97)
    shapes = abstract(odd)
    placement = Placement(parse_mesh(CUBE))
    found = placement.params(shapes)
    assert found["embed_tokens"]["embedding"].spec == PartitionSpec(None, "fsdp")
    assert found["layers"]["mlp"]["up_proj"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    note = "97 (vocab) does not divide over tensor=2, not split there"
    assert placement.notes == [f"embed_tokens/embedding: {note}", f"lm_head/kernel: {note}"]
    with pytest.raises(ValueError, match=r"lm_head/kernel: 97 .* leave out --mesh-strict"):
        Placement(parse_mesh(CUBE), strict=True).params(shapes)
    with pytest.raises(ValueError, match="new/kernel: no rule says how to split it"):
        placement.params({"new": {"kernel": shapes["lm_head"]["kernel"]}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "unknown axis in 'model=2'; the axes are data, fsdp, tensor"),
        ("data=2,data=4", "data is given twice"),
        ("data=0", "at least 1 or .*, got 'data=0'"),
        ("data=two", "got 'data=two'"),
        ("data=*,fsdp=-1", "only one size may be free"),
        (" , ", "name at least one axis"),
        (
            "data=2,fsdp=2",
            "data=2,fsdp=2,tensor=1 needs 4 devices, there are 8; .*fsdp=.*-devices 4",
        ),
        ("data=3,fsdp=*", "3 does not divide the 8 devices"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_the_fix(text, message):
    with pytest.raises(ValueError, match=message):
        mesh_shape(parse_mesh(text), 8)


def test_settings_of_a_mesh_that_do_not_fit_are_refused_before_compiling():
    with pytest.raises(ValueError, match="mesh_mode needs a mesh; give --mesh too"):
        settings("adamw", None, mesh_mode="explicit")
    with pytest.raises(ValueError, match="4 sequences do not divide over 8 devices"):
        Program(settings("adamw", "fsdp=*", accumulate=2))
    with pytest.raises(ValueError, match=r"muon fails on Explicit axes; give --mesh-mode auto"):
        settings("muon", mesh_mode="explicit")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_is_split_with_its_parameters(name):
    scan = not OPTIMIZERS[name].needs_unscanned
    made = settings(name)
    placement, shapes = Placement(parse_mesh(CUBE)), abstract(UNTIED, scan_layers=scan)
    state = jax.eval_shape(lambda params: init_state(params, made.optimizer_from), shapes)
    shardings = placement.state(lambda p: init_state(p, made.optimizer_from), shapes)
    assert jax.tree.structure(state) == jax.tree.structure(shardings)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state))
    device = placement.bytes_per_device(state.opt_state, shardings.opt_state)
    # SinkGD-Pure has counts alone; a projection of GaLore's is whole, since its init makes it from a shape.
    if any(leaf.ndim for leaf in jax.tree.leaves(state.opt_state)):
        assert device < (0.75 if name == "galore" else 0.67) * total
    if name == "adamw":  # two moments and two counts; norms are whole, the rest is in four parts
        norms, parameters = 5 * 32, sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert device == 4 * 2 * ((parameters - norms) // 4 + norms) + 2 * 4


@pytest.mark.parametrize(
    ("name", "mesh", "fields"),
    [
        pytest.param("adamw", "fsdp=*", {"mesh_mode": "explicit"}, marks=pytest.mark.extended),
        ("sage_hybrid", CUBE, {}),
        ("lorapre_adamw", "data=4,tensor=2", {"mesh_mode": "explicit"}),
        pytest.param(
            "lorapre_sinkgd",
            CUBE,
            {"scan_layers": False, "accumulate": 2, "remat": True, "mesh_mode": "explicit"},
            marks=pytest.mark.extended,
        ),
    ],
)
def test_a_mesh_gives_the_losses_of_one_device(name, mesh, fields):
    losses, heldout, statistics = [], [], []
    for where in (None, mesh):
        given = {key: value for key, value in fields.items() if where or key != "mesh_mode"}
        made = program(name, where, **given)
        detailed = "accumulate" in fields
        state = made.init(0)
        batches = train_iterator(tiny.dataset(), 8, 16, 0)
        steps, numbers = [], {}
        for _ in range(STEPS):
            state, metrics, numbers = made.step(state, next(batches), RATE, detailed=detailed)
            steps.append(float(metrics.loss))
        losses.append(steps)
        rows = 8 // made.settings.accumulate
        heldout.append(made.evaluate(state.params, heldout_batches(tiny.dataset(), rows, 16, 2))[0])
        statistics.append(jax.device_get(numbers))
    assert losses[0][-1] < losses[0][0] - 0.05
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert heldout[1] == pytest.approx(heldout[0], rel=1e-5)
    assert statistics[1].keys() == statistics[0].keys()
    for key, value in statistics[0].items():
        np.testing.assert_allclose(statistics[1][key], value, rtol=2e-3, atol=1e-6, err_msg=key)


@contextlib.contextmanager
def compiles_counted():
    events = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def compiled():
    """AdamW's program on the cube and the number of compiles that its step took."""
    made = Program(settings("adamw"))
    with compiles_counted() as events:
        made.compile()
    return made, len(events)


def test_a_step_compiles_once_and_the_state_stays_where_it_was(compiled):
    made, compiles = compiled
    assert compiles == 1
    tokens = np.zeros((8, 17), np.int32)
    state = made.init(0)
    state, _, _ = made.step(state, {"tokens": tokens}, RATE)
    with compiles_counted() as events:
        for _ in range(3):
            state, _, _ = made.step(state, {"tokens": tokens}, RATE)
    assert not events
    held = 0
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(made.state_shardings), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert {shard.data.shape for shard in leaf.addressable_shards} == {
            sharding.shard_shape(leaf.shape)
        }
    for leaf in jax.tree.leaves(state.opt_state):
        held += leaf.addressable_shards[0].data.nbytes
    assert held == made.state_bytes_per_device() < 0.27 * made.state_bytes()


def test_no_device_ever_holds_a_whole_parameter_at_the_start():
    placement = Placement(parse_mesh(CUBE))
    shapes = abstract(UNTIED)
    text = (
        jax.jit(
            functools.partial(_create_params, UNTIED, True),
            out_shardings=placement.params(shapes, auto=True),
        )
        .lower(np.uint32(0))
        .compile()
        .as_text()
    )
    assert "f32[48,16]" in text  # a device's part of the embedding
    for whole in ("[96,32]", "[32,96]", "[2,32,48]", "[2,48,32]"):
        assert whole not in text


def test_only_weights_are_gathered_and_only_over_fsdp(compiled):
    step: Any = compiled[0]._step
    text = step.as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
    assert gathered
    # The largest is half of the embedding, whose features meet; activations of 8 x 16 tokens never do.
    sizes = [math.prod(map(int, shape.split(","))) for shape in gathered]
    assert max(sizes) <= UNTIED.vocab_size * UNTIED.hidden_size // 2
    assert not any(re.fullmatch(r"(8|4|2),16,\d+", shape) for shape in gathered)


def test_a_run_on_a_mesh_says_so_in_its_files(tmp_path):
    config = tiny.config(tmp_path, mesh="data=2,fsdp=*", compute_dtype="bfloat16", steps=4)
    console = tiny.quiet_console()
    model = dataclasses.replace(tiny.MODEL, intermediate_size=50)
    summary = train(config, model=model, dataset=tiny.dataset(), console=console)
    assert summary.status == "finished"
    mesh = read_json(tmp_path / CONFIG)["mesh"]
    assert mesh["axes"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert (mesh["mode"], mesh["devices"], mesh["processes"]) == ("auto", 8, 1)
    assert mesh["device_kinds"] == {"cpu": 8}
    assert mesh["not_split_as_the_rules_say"] == []
    stored = read_json(tmp_path / SUMMARY)
    assert stored["device_state_bytes"] == summary.device_state_bytes
    assert 4 * summary.device_state_bytes == pytest.approx(summary.optimizer_state_bytes, rel=0.05)
    assert len(read_metrics(tmp_path, "heldout")) == 1
    cells = [list(column.cells) for column in summary_table(RunSummary.from_dict(stored)).columns]
    assert "optimizer state of a device" in cells[0]


def test_simulated_devices_are_said_to_come_too_late():
    simulate_devices(8)  # what the tests began with
    with pytest.raises(
        ValueError, match=r"simulate_devices=4 comes too late, .* with 8 CPU devices"
    ):
        simulate_devices(4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        start_devices(tiny.config(None, simulate_devices=0))
