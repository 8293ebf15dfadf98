"""The short form of the faults: a few kills, damage of the newest checkpoint, a disk that is full.

`python -m tests.faults.kill` (`make faults`) is the long form, and writes docs/results/faults.md.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from examples.llama.training.checkpoints import DAMAGED_FOLDER, checkpoint_steps
from tests.faults import harness
from tests.faults.damage import DAMAGES

STEPS = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def undisturbed(folder):
    job = harness.make_job(folder, "undisturbed", steps=STEPS, optimizer="adamw", pace=0.0)
    assert harness.run_to_end(job) == 0, job.log.read_text()
    return job


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(folder, undisturbed):
    job = harness.make_job(folder, "killed", steps=STEPS, optimizer="adamw", pace=0.03)
    kills = harness.killed_run(job, seed=3, random_kills=1, save_kills=2, steps=(9, 14))
    assert all(kill.exit_code == -9 and kill.step > kill.resumed_from for kill in kills)
    # A checkpoint every 4 steps, the next one waiting for the last: after 9 there is one more for certain.
    assert all(kill.resumed_from >= 4 * number for number, kill in enumerate(kills))
    assert sum(kill.in_save for kill in kills) >= 2
    assert harness.result(job) == harness.result(undisturbed)
    assert harness.lines(job) == harness.lines(undisturbed)


def test_a_disk_that_is_full_ends_the_run_with_a_clear_error_and_the_old_checkpoint(
    folder, undisturbed
):
    job = harness.make_job(folder, "full", steps=STEPS, optimizer="adamw", pace=0.0, limit_from=10)
    assert harness.run_to_end(job) == 1, job.log.read_text()
    text = job.log.read_text()
    assert "The checkpoint of step 12 could not be written to" in text
    assert "the newest whole checkpoint is that of step 8" in text
    assert checkpoint_steps(job.out)[0] == 8
    assert harness.run_to_end(replace(job, limit_from=None)) == 0
    assert "resumed from step 8" in job.log.read_text()
    assert harness.result(job) == harness.result(undisturbed)
    assert harness.lines(job) == harness.lines(undisturbed)


def test_damage_is_found_in_a_new_process_too(folder, undisturbed):
    job = harness.make_job(folder, "undisturbed", steps=STEPS, optimizer="adamw", pace=0.0)
    before = harness.result(job), harness.lines(job)
    DAMAGES["one flipped bit"](job.out, STEPS)
    assert harness.run_to_end(job) == 0
    text = job.log.read_text()
    assert f"The checkpoint of step {STEPS} is damaged: " in text
    assert f"resumed from step {STEPS - 4}" in text
    assert (job.out / DAMAGED_FOLDER / str(STEPS)).is_dir()
    assert (harness.result(job), harness.lines(job)) == before
