"""Tunix: `PeftTrainer` trains a small Llama 3, stops, and goes on from its own checkpoint."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType
from tunix.models.llama3 import model as llama3
from tunix.sft import hooks, peft_trainer

from tests.frameworks import harness

CONFIG = llama3.ModelConfig(
    num_layers=1,
    vocab_size=128,
    embed_dim=32,
    hidden_dim=64,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    rope_theta=500_000,
    norm_eps=1e-5,
)
ROLES = {
    r"^embedder/input_embedding$": ("embedding", (0,), (1,)),
    r"^lm_head/w$": ("head", (1,), (0,)),
    r"/(q|k|v)_proj/w$": ("matrix", (1, 2), (0,)),
    r"/o_proj/w$": ("matrix", (2,), (0, 1)),
    r"/(gate|up|down)_proj/kernel$": ("matrix", (1,), (0,)),
    r"norm/w$": ("vector", (), (0,)),
}


class Losses(hooks.TrainingHooks):
    """Keeps the loss of every step."""

    def __init__(self):
        self.found = []

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        self.found.append(float(train_loss))

    def on_train_start(self, train_ctx): ...
    def on_train_end(self, train_ctx): ...
    def on_train_step_start(self, train_ctx): ...
    def on_eval_step_start(self, train_ctx): ...
    def on_eval_step_end(self, train_ctx, eval_loss): ...


def batches():
    """The same sixteen sequences at every step."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (16, 16)).astype(np.int32)
    batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens))
    return [batch] * harness.STEPS


def model_input(batch):
    length = batch.input_tokens.shape[1]
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": jnp.arange(length)[None].repeat(batch.input_tokens.shape[0], 0),
        "attention_mask": jnp.tril(jnp.ones((length, length), bool))[None].repeat(
            batch.input_tokens.shape[0], 0
        ),
    }


@nnx.jit
def make_model():
    """The model, its parameters sharded from the start, as Tunix's guides make it."""
    model = llama3.Llama3(CONFIG, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
    return model


def train(optimizer, folder):
    """Trains to the last step, from the folder's newest checkpoint if there is one."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=100,
        max_steps=harness.STEPS,
        checkpoint_root_directory=str(folder),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=harness.SAVED),
    )
    losses = Losses()
    with jax.set_mesh(mesh), harness.compilations("_train_step") as count:
        model = make_model()
        found = harness.run_section("Tunix", optimizer, {"model": model, "config": config})
        trainer = found["trainer"].with_gen_model_input_fn(model_input)
        trainer.with_training_hooks(losses)
        trainer.train(batches())
        params = nnx.state(model, nnx.Param)
        state = trainer.optimizer.opt_state
        return harness.Trained(losses.found, params, state, count(), found["tx"])


@pytest.mark.parametrize("optimizer", harness.OPTIMIZERS)
def test_peft_trainer(optimizer, tmp_path):
    whole = train(optimizer, tmp_path / "whole")
    (tmp_path / "stopped").mkdir()
    shutil.copytree(
        tmp_path / "whole" / str(harness.SAVED), tmp_path / "stopped" / str(harness.SAVED)
    )
    resumed = train(optimizer, tmp_path / "stopped")
    harness.check("Tunix", optimizer, "`PeftTrainer`, fsdp 4 x tp 2", whole, resumed, ROLES)
