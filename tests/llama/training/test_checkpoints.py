"""Checkpoints of a run: exact resumption, what is kept, damage, refusals, migrations, signals."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import os
import re
import shutil
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama.model.llama import stack_layers, unstack_layers
from examples.llama.optimizers.registry import OPTIMIZERS
from examples.llama.reporting.files import METRICS, SUMMARY, jsonable, read_json
from examples.llama.reporting.metrics import MetricsWriter, read_metrics
from examples.llama.training import checkpoints as checkpoints_module
from examples.llama.training.checkpoints import (
    DAMAGED_FOLDER,
    FOLDER,
    CheckpointError,
    Checkpoints,
    SchemaError,
    checkpoint_steps,
)
from examples.llama.training.config import resolve
from examples.llama.training.fingerprint import fingerprints
from examples.llama.training.migrations import (
    MigrationError,
    migrate_layers,
    migrate_ranks,
    parse_migrations,
)
from examples.llama.training.program import Program
from examples.llama.training.resume import ResumeError, describe_run, target
from examples.llama.training.run import prepare_run
from examples.llama.training.settings import settings_from_json
from examples.llama.training.step import TrainState
from tests.faults.damage import DAMAGES, every_file, flip_file
from tests.llama import tiny


@functools.cache
def program(**fields):
    """A compiled program, shared between tests."""
    return Program(resolve(tiny.config(None, **fields), tiny.MODEL))


def make_run(folder, *, shared=None, dataset=None, **fields):
    fields = {"checkpoint_every": 4, "statistics_every": 0, **fields}
    config = tiny.config(folder, **fields)
    return prepare_run(
        config,
        model=tiny.MODEL,
        dataset=dataset or tiny.dataset(),
        program=shared or program(),
        console=tiny.quiet_console(),
    )


def said(run):
    return run.console.file.getvalue()


def numbers(folder):
    """The lines of a run without what depends on the clock."""
    clocks = {"tokens_per_second", "seconds"}
    return [{k: v for k, v in row.items() if k not in clocks} for row in read_metrics(folder)]


def final_state(folder, shared=None, step=None):
    with Checkpoints(folder, read_only=True) as checkpoints:
        step = checkpoints.steps()[0] if step is None else step
        return checkpoints.restore(step, target(shared or program()))


def stop_after(run, step, number=signal.SIGTERM):
    """Lets the run get a signal while it takes this step."""
    taken, count = run.program.step, [0]

    def counting(*arguments, **options):
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), number)
        return taken(*arguments, **options)

    run.program.step = counting
    try:
        return run.train()
    finally:
        del run.program.step


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert make_run(folder).train().status == "finished"
    return folder


@pytest.mark.full_codegen
# Step 4 ends a log interval and is a checkpoint anyway; 5 and 7 lie inside one.
@pytest.mark.parametrize("step", [1, 4, 5, 7])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, undisturbed, step, number):
    summary = stop_after(make_run(tmp_path), step, number)
    expected = {signal.SIGTERM: "preempted", signal.SIGINT: "interrupted"}[number]
    assert (summary.status, summary.steps) == (expected, step)
    assert re.search(rf"after step {step}, saved.*--resume", summary.message)
    assert read_json(tmp_path / SUMMARY)["status"] == expected
    resumed = make_run(tmp_path, resume=True)
    summary = resumed.train()
    assert (summary.status, summary.steps, summary.tokens) == ("finished", 8, 1024)
    assert f"resumed from step {step}" in said(resumed)
    assert numbers(tmp_path) == numbers(undisturbed)
    chex.assert_trees_all_equal(final_state(tmp_path), final_state(undisturbed))
    other = read_json(undisturbed / SUMMARY)
    for name in ("train_loss", "heldout_loss", "heldout_step", "steps", "tokens", "skipped"):
        assert getattr(summary, name) == other[name], name


def test_a_run_that_was_killed_drops_what_it_wrote_after_the_checkpoint(tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run")
    folder = tmp_path / "run"
    shutil.rmtree(folder / FOLDER / "8")
    (folder / SUMMARY).unlink()
    with (folder / METRICS).open("a") as file:
        file.write('{"kind": "train", "st')  # half a line
    assert make_run(folder, resume=True).train().status == "finished"
    assert numbers(folder) == numbers(undisturbed)
    chex.assert_trees_all_equal(final_state(folder), final_state(undisturbed))


def test_resuming_a_finished_run_changes_nothing_and_an_empty_folder_begins(tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run")
    summary = make_run(tmp_path / "run", resume=True).train()
    assert (summary.status, summary.steps) == ("finished", 8)
    assert summary.heldout_loss == read_json(undisturbed / SUMMARY)["heldout_loss"]
    assert numbers(tmp_path / "run") == numbers(undisturbed)
    fresh = make_run(tmp_path / "fresh", resume=True)
    assert fresh.train().status == "finished"
    assert "no checkpoint" in said(fresh)
    assert numbers(tmp_path / "fresh") == numbers(undisturbed)


def test_a_run_with_checkpoints_is_not_trained_over_by_mistake(tmp_path):
    stop_after(make_run(tmp_path), 5)
    with pytest.raises(FileExistsError, match="checkpoints up to step 5; --resume goes on"):
        make_run(tmp_path)
    assert make_run(tmp_path, overwrite=True, checkpoint_every=0).train().status == "finished"
    assert checkpoint_steps(tmp_path) == []


def test_without_checkpoints_ctrl_c_still_ends_after_the_step_and_sigterm_is_not_caught(tmp_path):
    run = make_run(tmp_path, checkpoint_every=0)
    handler, caught = signal.getsignal(signal.SIGTERM), []
    step = run.program.step

    def look(*arguments, **options):
        caught.append(signal.getsignal(signal.SIGTERM) is not handler)
        return step(*arguments, **options)

    run.program.step = look
    try:
        run.train()
    finally:
        del run.program.step
    assert not any(caught)
    # Ignored, where a shell started the tests in the background.
    before = signal.getsignal(signal.SIGINT)
    summary = stop_after(make_run(tmp_path / "b", checkpoint_every=0), 3, signal.SIGINT)
    assert (summary.status, summary.message) == ("interrupted", "Interrupted after step 3.")
    assert signal.getsignal(signal.SIGINT) is before


def test_the_last_and_the_best_are_kept(tmp_path, monkeypatch):
    run = make_run(tmp_path, checkpoint_every=1, eval_every=1, keep_last=2, keep_best=1)
    scores = iter([5.0, 4.0, 1.0, 2.0, 6.0, 7.0, 8.0, 9.0])
    monkeypatch.setattr(run.program, "evaluate", lambda *_: (next(scores), 1), raising=False)
    run.train()
    assert checkpoint_steps(tmp_path) == [8, 7, 3]


def test_a_checkpoint_between_evaluations_does_not_compete_for_best(tmp_path):
    make_run(tmp_path, checkpoint_every=3, eval_every=4, keep_last=1).train()
    assert checkpoint_steps(tmp_path) == [8]


# --- steps that are not finite


def poison(run, steps):
    """Makes the loss of some steps NaN, by tokens that make the embedding's look-up NaN."""
    taken, count = run.program.step, [0]

    def poisoned(state, tokens, peak, **options):
        count[0] += 1
        if count[0] in steps:
            # The compiled step reads the rate from outside, but a NaN rate would not be in the loss.
            broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params)
            kept = jax.tree.map(jnp.copy, state)
            new, metrics, found = taken(state._replace(params=broken), tokens, peak, **options)
            return new._replace(params=kept.params), metrics, found
        return taken(state, tokens, peak, **options)

    run.program.step = poisoned
    try:
        return run.train()
    finally:
        del run.program.step


def test_single_bad_steps_are_skipped_counted_and_logged(tmp_path):
    summary = poison(make_run(tmp_path, max_skipped=3), {3, 4, 6})
    assert (summary.status, summary.skipped, summary.steps) == ("finished", 3, 8)
    rows = read_metrics(tmp_path, "non_finite")
    assert [(row["step"], row["skipped"]) for row in rows] == [(3, 1), (4, 2), (6, 3)]
    assert {row["loss"] for row in rows} == {"NaN"}
    train = read_metrics(tmp_path, "train")
    assert train[-1]["skipped"] == 3
    assert train[1]["loss"] == "NaN"  # steps 3 and 4
    assert isinstance(train[2]["loss"], float)  # step 5 alone
    state = final_state(tmp_path)
    assert (int(state.step), int(state.skipped)) == (8, 3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert int(optax.tree.get(state.opt_state, "mu", None) is not None)


def test_too_many_bad_steps_in_a_row_stop_the_run_and_leave_the_good_checkpoint(tmp_path):
    summary = poison(make_run(tmp_path, checkpoint_every=2, max_skipped=3), {4, 5, 6, 7})
    assert (summary.status, summary.steps, summary.skipped) == ("non_finite", 6, 3)
    assert "3 steps in a row" in summary.message
    assert summary.message.endswith("The last checkpoint is that of step 2.")
    assert checkpoint_steps(tmp_path) == [2]  # none at step 4, in the middle of it
    # Without the trouble the run goes on from there.
    assert make_run(tmp_path, checkpoint_every=2, resume=True).train().status == "finished"
    assert not read_metrics(tmp_path, "non_finite")


def test_the_row_of_bad_steps_is_counted_across_a_resumption(tmp_path):
    run = make_run(tmp_path, max_skipped=3)
    inner, count = run.program.step, [0]

    def stopping(*arguments, **options):
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments, **options)

    run.program.step = stopping
    stopped = poison(run, {2, 3})
    assert (stopped.status, stopped.skipped) == ("preempted", 2)
    summary = poison(make_run(tmp_path, resume=True, max_skipped=3), {1})
    assert (summary.status, summary.steps, summary.skipped) == ("non_finite", 4, 3)


# --- damage


def sign_again(folder, step, **changes):
    """Changes a record and its hash with it."""
    path = folder / FOLDER / str(step) / "run" / "metadata"
    record = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**record, "sha256": checkpoints_module._digest(record)}))


# Orbax leaves reads of a broken file unfinished, and Python says so when they are collected.
ABANDONED_READS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@ABANDONED_READS
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_used(
    tmp_path, undisturbed, damage
):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    DAMAGES[damage](folder, 8)
    run = make_run(folder, resume=True)
    assert run.train().status == "finished"
    assert "The checkpoint of step 8 is damaged: " in said(run)
    assert "resumed from step 4" in said(run)
    gc.collect()
    assert (folder / DAMAGED_FOLDER / "8").is_dir()
    assert numbers(folder) == numbers(undisturbed)
    chex.assert_trees_all_equal(final_state(folder), final_state(undisturbed))


@ABANDONED_READS
def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(tmp_path, undisturbed):
    whole = final_state(undisturbed, step=8)
    found = 0
    for number, original in enumerate(every_file(undisturbed, 8)):
        folder = tmp_path / str(number)
        shutil.copytree(undisturbed, folder)
        path = folder / original.relative_to(undisturbed)
        if not path.stat().st_size:
            continue
        flip_file(path, 0.5)
        try:
            state = final_state(folder, step=8)
        except CheckpointError:
            found += 1
        else:
            chex.assert_trees_all_equal(state, whole)
        shutil.rmtree(folder)
    gc.collect()
    assert found >= 3


@ABANDONED_READS
def test_if_all_are_damaged_the_run_does_not_begin_anew_in_silence(tmp_path, undisturbed):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    for step in (4, 8):
        DAMAGES["one flipped bit"](folder, step)
    with pytest.raises(ResumeError, match=r"none of the 2 checkpoints in .* is whole; --overwrite"):
        make_run(folder, resume=True).train()
    gc.collect()


def test_a_checkpoint_of_another_schema_is_refused_and_left_alone(tmp_path, undisturbed):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    sign_again(folder, 8, schema=99)
    with pytest.raises(
        SchemaError, match=r"step 8 .* is of schema 99; this program reads schema 1"
    ):
        make_run(folder, resume=True)
    assert checkpoint_steps(folder) == [8, 4]


def test_every_bit_and_every_exchange_changes_the_fingerprint():
    random = np.random.default_rng(0)
    for dtype in (np.float32, np.float16, jnp.bfloat16, np.int8, np.int32, np.bool_):
        array = np.asarray(random.normal(size=(5, 7)) * 3, dtype)
        before = fingerprints({"x": jnp.asarray(array)})["x"]
        raw = array.view(np.uint8).copy()
        raw.reshape(-1)[11] ^= 1
        changed = raw.view(array.dtype).reshape(array.shape)
        assert fingerprints({"x": jnp.asarray(changed)})["x"] != before
        exchanged = array.copy()
        exchanged[[0, 1]] = exchanged[[1, 0]]
        if dtype is np.bool_:  # nearly all true
            continue
        assert fingerprints({"x": jnp.asarray(exchanged)})["x"] != before
    zeros = [fingerprints({"x": jnp.zeros((4,), dtype)})["x"] for dtype in ("float32", "int32")]
    assert zeros[0] != zeros[1]
    with pytest.raises(TypeError, match="'key' is of dtype key"):
        fingerprints({"key": jax.random.key(0)})


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_fingerprints_are_the_same_on_every_mesh(kind):
    array = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)
    axis = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis, axis))
    expected = fingerprints({"w": array})
    for spec in (("x", "y"), ("x", None), (None, "y"), (("x", "y"), None), ()):
        sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
        assert fingerprints({"w": jax.device_put(array, sharding)}) == expected


# --- refusals


def test_another_run_is_refused_with_every_difference_named(tmp_path, undisturbed):
    changes = {"optimizer": "lion", "batch_size": 4, "learning_rate": 2e-2}
    with pytest.raises(ResumeError) as caught:
        make_run(undisturbed, resume=True, shared=program(optimizer="lion"), **changes)
    message = str(caught.value)
    for part in (
        "optimizer is 'lion' and was 'adamw'",
        "batch_size is 4 and was 8",
        "learning_rate is 0.02 and was 0.01",
        "was 0.01 (--migrate schedule allows that)",
        "give the run's own options or another --out",
    ):
        assert part in message
    assert "ask for the change" not in message
    data = dataclasses.replace(tiny.dataset(), corpus_sha256="0" * 64)
    with pytest.raises(ResumeError, match=r"data.corpus_sha256 is '000.* and was '0123"):
        make_run(undisturbed, resume=True, dataset=data)
    model = dataclasses.replace(tiny.MODEL, num_layers=2)
    with pytest.raises(ResumeError, match=r"model.num_layers is 2 and was 1"):
        prepare_run(tiny.config(undisturbed, resume=True), model=model, dataset=tiny.dataset())


def test_another_rank_is_refused_and_the_migration_offered(tmp_path):
    fields = {"optimizer": "lorapre_adamw", "checkpoint_every": 4}
    shared = program(optimizer="lorapre_adamw", rank=2)
    stop_after(make_run(tmp_path, shared=shared, rank=2, **fields), 4)
    with pytest.raises(ResumeError, match=r"options.rank is 3 and was 2; .*--migrate rank"):
        make_run(tmp_path, resume=True, rank=3, shared=Program(shared.settings), **fields)
    run = prepare_run(
        tiny.config(tmp_path, resume=True, rank=3, migrate="rank", **fields),
        model=tiny.MODEL,
        dataset=tiny.dataset(),
        console=tiny.quiet_console(),
    )
    assert run.train().status == "finished"
    assert "Migrated: options.rank is 3 and was 2." in said(run)
    assert [row["step"] for row in read_metrics(tmp_path, "train")] == [2, 4, 6, 8]
    ranks = {
        leaf.shape[-2]
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            final_state(tmp_path, run.program, 8).opt_state
        )
        if ".left" in jax.tree_util.keystr(path)
    }
    assert ranks == {3}


def test_what_is_logged_may_change_and_a_longer_schedule_is_a_migration(tmp_path, undisturbed):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    longer = {"steps": 12, "resume": True, "log_every": 1}
    with pytest.raises(ResumeError, match="steps is 12 and was 8"):
        make_run(folder, **longer)
    settings = resolve(tiny.config(None, steps=12), tiny.MODEL)
    summary = make_run(folder, shared=Program(settings), migrate="schedule", **longer).train()
    assert (summary.status, summary.steps) == ("finished", 12)


def test_options_are_checked():
    with pytest.raises(ValueError, match="unknown migration 'optimizer'; use layers, rank, sched"):
        parse_migrations("optimizer")
    for fields, message in (
        ({"migrate": "rank"}, "add --resume"),
        ({"keep_last": 0}, "keep_last must be at least 1"),
        ({"keep_best": -1}, "keep_best must not be negative"),
        ({"max_skipped": 0}, "max_skipped must be at least 1"),
        ({"checkpoint_every": -1}, "checkpoint_every must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(tiny.config(None, **fields), tiny.MODEL)


# --- migrations


TWO_LAYERS = dataclasses.replace(tiny.MODEL, num_layers=2, tie_embeddings=False)


def trained(name, scan_layers):
    """The state after two steps on made-up gradients, equal for both forms of the layers."""
    made = Program(resolve(tiny.config(None, optimizer=name, scan_layers=scan_layers), TWO_LAYERS))
    state = made.init(0)
    tx = made.settings.optimizer_from(optax.constant_schedule(1e-2))

    @jax.jit
    def step(state, gradients):
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1, state.skipped)

    random = np.random.default_rng(0)
    stacked = jax.device_get(state.params if scan_layers else stack_layers(state.params))
    for _ in range(2):
        gradients = jax.tree.map(
            lambda x: np.asarray(random.normal(size=x.shape), np.float32), stacked
        )
        state = step(state, gradients if scan_layers else unstack_layers(gradients))
    return made, jax.device_get(state)


def filled(abstract):
    """A tree of these shapes and dtypes with numbers that are all over."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(100 * random.normal(size=x.shape), x.dtype), abstract)


@pytest.mark.parametrize(
    "name", [name for name, entry in OPTIMIZERS.items() if not entry.needs_unscanned]
)
def test_layers_migrate_both_ways_with_every_optimizer(name):
    forms = [
        Program(resolve(tiny.config(None, optimizer=name, scan_layers=scan), TWO_LAYERS))
        for scan in (True, False)
    ]
    stacked, layered = (form.abstract_state for form in forms)
    before = filled(stacked)
    there = migrate_layers(before, layered)
    chex.assert_trees_all_equal_shapes_and_dtypes(there, layered)
    chex.assert_trees_all_equal(migrate_layers(there, stacked), before)
    own = {"mlp": {"up_proj": {"kernel": before.params["layers"]["mlp"]["up_proj"]["kernel"][1]}}}
    chex.assert_trees_all_equal(there.params["layers"][1]["mlp"]["up_proj"], own["mlp"]["up_proj"])


# Together these hold every kind of state that has layers: moments, factors, SAGE's scales.
@pytest.mark.parametrize("name", ["sage", "lorapre_muon"])
def test_a_migrated_state_is_that_of_a_run_in_the_other_form(name):
    (scanned, stacked), (unscanned, layered) = trained(name, True), trained(name, False)
    there = migrate_layers(stacked, unscanned.abstract_state)
    chex.assert_trees_all_close(there, layered, rtol=2e-4, atol=2e-6)
    back = migrate_layers(layered, scanned.abstract_state)
    chex.assert_trees_all_close(back, stacked, rtol=2e-4, atol=2e-6)


def test_what_has_no_counterpart_is_an_error_with_its_path():
    scanned = Program(resolve(tiny.config(None), TWO_LAYERS))
    state = filled(scanned.abstract_state)
    other = dataclasses.replace(scanned.settings, scan_layers=False)
    broken = dataclasses.replace(other, model=dataclasses.replace(TWO_LAYERS, intermediate_size=40))
    with pytest.raises(MigrationError, match=r"'params/layers/0/mlp/down_proj/kernel' is float32"):
        migrate_layers(state, Program(broken).abstract_state)
    with pytest.raises(MigrationError, match=r"adamw: .*holds no LowRankState"):
        migrate_ranks(state, scanned.settings, scanned.abstract_state)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("lorapre_adamw", {"rank": 2}, {"rank": 4}),
        ("lorapre_muon", {"rank": 4, "table_rank": 4}, {"rank": 2, "table_rank": 3}),
        ("lorapre_muon", {"rank": 2}, {"rank": 3}),
        ("lorapre_sgd", {"rank": 2}, {"rank": 4}),
        ("lorapre_lion", {"rank": 4}, {"rank": 2}),
        ("lorapre_sinkgd", {"rank": 2}, {"rank": 4}),
    ],
)
def test_ranks_migrate_with_every_low_rank_optimizer(name, old, new):
    made, wanted = (
        Program(resolve(tiny.config(None, optimizer=name, **ranks), TWO_LAYERS))
        for ranks in (old, new)
    )
    for before, after in ((made, wanted), (wanted, made)):
        like = after.abstract_state
        migrated = jax.eval_shape(
            functools.partial(migrate_ranks, settings=after.settings, like=like),
            before.abstract_state,
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(migrated, like)


def test_a_run_goes_on_with_unstacked_layers(tmp_path, undisturbed):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / FOLDER / "8")
    fields = {"resume": True, "scan_layers": False}
    with pytest.raises(ResumeError, match=r"scan_layers is False and was True.*--migrate layers"):
        make_run(folder, **fields)
    shared = Program(resolve(tiny.config(None, scan_layers=False), tiny.MODEL))
    summary = make_run(folder, shared=shared, migrate="layers", **fields).train()
    assert summary.status == "finished"
    found, expected = numbers(folder), numbers(undisturbed)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    np.testing.assert_allclose(found[-1]["loss"], expected[-1]["loss"], rtol=1e-4)


# --- meshes


MESHES = [None, "data=2,fsdp=2,tensor=2", "fsdp=8"]


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_a_state_is_restored_onto_another_mesh(tmp_path, mode):
    def on(mesh):
        fields = {"mesh": mesh, "mesh_mode": mode if mesh else None}
        return Program(resolve(tiny.config(None, optimizer="lorapre_adamw", **fields), tiny.MODEL))

    programs = [on(mesh) for mesh in MESHES]
    state = programs[1].init(0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        checkpoints.wait()
        for made in programs:
            restored = checkpoints.restore(0, target(made))
            chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))
            if made.state_shardings is not None:
                chex.assert_trees_all_equal(
                    jax.tree.map(lambda x: x.sharding, restored), made.state_shardings
                )


def test_a_run_on_a_mesh_resumes_to_the_same_bits_and_goes_on_without_the_mesh(
    tmp_path, undisturbed
):
    fields = {"mesh": "data=4,fsdp=2"}
    shared = Program(resolve(tiny.config(None, **fields), tiny.MODEL))
    make_run(tmp_path / "whole", shared=shared, **fields).train()
    stop_after(make_run(tmp_path / "a", shared=shared, **fields), 5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    make_run(tmp_path / "a", shared=shared, resume=True, **fields).train()
    assert numbers(tmp_path / "a") == numbers(tmp_path / "whole")
    chex.assert_trees_all_equal(
        final_state(tmp_path / "a", shared), final_state(tmp_path / "whole", shared)
    )
    make_run(tmp_path / "b", resume=True).train()
    np.testing.assert_allclose(
        [row["loss"] for row in numbers(tmp_path / "b")],
        [row["loss"] for row in numbers(undisturbed)],
        rtol=1e-5,
    )


def test_metrics_writer_keeps_what_was_written_up_to_a_step(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 5):
            writer.write("train", step, {"loss": float(step)})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "tr')
    with MetricsWriter(tmp_path, tensorboard=False, keep_until=3) as writer:
        writer.write("train", 4, {"loss": 40.0})
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 40.0]


def test_a_description_tells_runs_apart_by_what_matters():
    settings = resolve(tiny.config(None), tiny.MODEL)
    data = tiny.dataset().describe()
    same = dataclasses.replace(settings, log_every=1, remat=True, eval_every=3)
    assert describe_run(settings, data) == describe_run(same, {**data, "data": "elsewhere"})
    for change in ({"seed": 1}, {"optimizer": "lion"}, {"clip_norm": 7.0}):
        assert describe_run(settings, data) != describe_run(
            dataclasses.replace(settings, **change), data
        )


def test_settings_have_the_names_that_files_of_version_0_2_have():
    settings = resolve(
        tiny.config(None, optimizer="lorapre_adamw", rank=4, option_set="paper", bound=math.inf),
        tiny.MODEL,
    )
    stored = jsonable(settings)
    names = """weight_decay decay_vectors b1 b2 eps damper eps_mode mu_dtype head_rule vector_rule scale
    sinkhorn_iterations sinkhorn_variant rank table_rank update_gap options bias_correction bound residual
    second_moment initial_subspace factor_dtype damping role_multipliers"""
    given = {"weight_decay": 0.01, "decay_vectors": True, "rank": 4, "options": "paper"}
    given["bound"] = "Infinity"
    since = {"table_rule": None}
    assert stored["options"] == {**dict.fromkeys(names.split()), **given, **since}
    assert settings_from_json(stored) == settings
    del stored["options"]["table_rule"]
    assert settings_from_json(stored) == settings
    run = describe_run(settings, tiny.dataset().describe())
    assert {name for name in run if name.startswith("options.")} == {f"options.{n}" for n in given}


def test_who_only_reads_leaves_alone_what_is_being_written(tmp_path):
    state = program().init(0)
    unfinished = tmp_path / FOLDER / "7.orbax-checkpoint-tmp"
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        checkpoints.wait()
        unfinished.mkdir()
        with Checkpoints(tmp_path, read_only=True) as reader:
            assert reader.steps() == [0]
            chex.assert_trees_all_equal(reader.restore(0, target(program())), state)
    assert unfinished.is_dir()
    # A writer removes it in the background, before it saves itself.
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state._replace(step=state.step + 1), {})
        assert not unfinished.exists()
        checkpoints.wait()
        assert checkpoints.steps() == [1, 0]


def test_a_folder_that_is_no_checkpoint_is_no_checkpoint(tmp_path):
    (tmp_path / FOLDER / "notes").mkdir(parents=True)
    assert checkpoint_steps(tmp_path) == []
    (tmp_path / FOLDER / "3").mkdir()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="record"):
        checkpoints.record(3)
