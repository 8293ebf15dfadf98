"""EasyDeL: its `Trainer` trains a small Llama, stops, and goes on from its own checkpoint."""

from __future__ import annotations

import shutil

import datasets
import easydel
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.frameworks import harness

ROLES = {
    r"^model/embed_tokens/embedding$": ("embedding", (0,), (1,)),
    r"^lm_head/kernel$": ("head", (1,), (0,)),
    r"_proj/kernel$": ("matrix", (1,), (0,)),
    r"norm/kernel$": ("vector", (), (0,)),
}


def make_model():
    config = easydel.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        sharding_axis_dims=(1, 4, 1, 2, 1),  # fsdp 4, tp 2
        attn_mechanism="vanilla",
    )
    return easydel.LlamaForCausalLM.sequential_init(
        config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )


def train(optimizer, folder):
    """Trains to the last step, from the folder's newest checkpoint if there is one."""
    found = harness.run_section("EasyDeL", optimizer, {})
    tokens = np.random.default_rng(0).integers(0, 128, (16, 16)).astype(np.int32)
    rows = np.tile(tokens, (harness.STEPS, 1))
    data = datasets.Dataset.from_dict(
        {"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()}
    )
    losses, ended = [], []

    class Trainer(found["Trainer"]):
        def on_step_end(self, state, metrics, step):
            losses.append(float(metrics.loss))
            ended[:] = [state]
            return super().on_step_end(state, metrics, step)

    arguments = found["Arguments"](
        save_directory=str(folder),
        model_name="run",
        learning_rate=1e-2,
        num_train_epochs=1,
        total_batch_size=16,
        max_training_steps=harness.STEPS,
        max_length=16,
        save_steps=harness.SAVED,
        save_total_limit=None,
        shuffle_train_dataset=False,
        do_last_save=False,
        use_wandb=False,
        report_metrics=False,
        track_memory=False,
        progress_bar_type="json",
    )
    with harness.compilations("training_step") as count:
        trainer = Trainer(
            arguments=arguments, model=make_model(), dataset_train=data, data_collator=None
        )
        trainer.train()
        compilations = count()
    state = ended[0]
    return harness.Trained(losses, state.graphstate, state.opt_state, compilations, trainer.tx)


@pytest.mark.parametrize("optimizer", harness.OPTIMIZERS)
def test_trainer(optimizer, tmp_path):
    whole = train(optimizer, tmp_path / "whole")
    saved = next((tmp_path / "whole").rglob(f"run-{harness.SAVED}"))
    there = tmp_path / "stopped" / saved.relative_to(tmp_path / "whole")
    shutil.copytree(saved, there)
    resumed = train(optimizer, tmp_path / "stopped")
    harness.check("EasyDeL", optimizer, "`Trainer`, fsdp 4 x tp 2", whole, resumed, ROLES)
