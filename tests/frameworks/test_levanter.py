"""Levanter: its `Trainer` trains a small Llama, stops, and goes on from its own checkpoint."""

from __future__ import annotations

import shutil

import haliax as hax
import jax
import levanter.tracker
import pytest
from levanter.checkpoint import CheckpointerConfig
from levanter.models.llama import LlamaConfig
from levanter.models.lm_model import LmExample
from levanter.optim.config import OptimizerConfig
from levanter.tracker.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig
from levanter.utils.mesh import MeshConfig

from tests.frameworks import harness

CONFIG = LlamaConfig(
    max_seq_len=16,
    hidden_dim=32,
    intermediate_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    gradient_checkpointing=False,
)
VOCABULARY = hax.Axis("vocab", 128)
ROLES = {
    r"^embeddings/token_embeddings/weight$": ("embedding", (0,), (1,)),
    r"^lm_head/weight$": ("head", (0,), (1,)),
    r"/q_proj/weight$": ("matrix", (1, 2, 3), (4,)),  # layers, kv heads, group, head size, embed
    r"/(k|v)_proj/weight$": ("matrix", (1, 2), (3,)),
    r"/o_proj/weight$": ("matrix", (1,), (2, 3)),
    r"/(gate|up|down)_proj/weight$": ("matrix", (1,), (2,)),
    r"layers/stacked/.*layernorm/weight$": ("vector", (), (1,)),
    r"transformer/norm/weight$": ("vector", (), (0,)),
}


def train(optimizer, folder):
    """Trains to the last step, from the folder's newest checkpoint if there is one."""
    registry = OptimizerConfig._choice_registry
    registry.pop("sage_hybrid", None)  # the page's section registers it anew
    found = harness.run_section("Levanter", optimizer, {})
    config = TrainerConfig(
        id="run",
        tracker=NoopConfig(),
        mesh=MeshConfig(axes={"data": 4, "model": 2}),
        train_batch_size=16,
        num_train_steps=harness.STEPS,
        log_jaxprs=False,
        log_xla_hlo=False,
        checkpointer=CheckpointerConfig(
            base_path=str(folder), save_interval=None, keep=[{"every": harness.SAVED}]
        ),
    )
    kind = OptimizerConfig.get_choice_class("sage_hybrid")
    assert kind is found["SageHybridConfig"]
    tx = kind(learning_rate=1e-2, warmup=0, lr_schedule="constant").build(harness.STEPS)

    def loss(model, example, *, key=None):
        return model.compute_next_token_loss(example, key=key)

    losses = {}  # hooks run once more at the end
    with (
        harness.compilations(".*_train_step.*") as count,
        Trainer(config, tx, loss) as trainer,
        levanter.tracker.current_tracker(trainer.tracker),
    ):
        trainer.add_hook(lambda info: losses.update({int(info.step): info.loss}), every=1)
        model_key, data_key, key = jax.random.split(jax.random.PRNGKey(0), 3)
        state = trainer.initial_state(
            key, model_init=lambda: CONFIG.build(VOCABULARY, key=model_key)
        )
        tokens = hax.random.randint(
            data_key, (config.TrainBatch, CONFIG.max_Pos), 0, VOCABULARY.size
        )
        batch = hax.vmap(LmExample.causal, config.TrainBatch)(tokens)
        batch = hax.shard(batch, trainer.compute_axis_mapping)
        state = trainer.train(state, [batch] * harness.STEPS).state
        compilations = count()
    found_losses = list(losses.values())
    return harness.Trained(found_losses, state.trainable_model, state.opt_state, compilations, tx)


@pytest.mark.parametrize("optimizer", harness.OPTIMIZERS)
def test_trainer(optimizer, tmp_path):
    whole = train(optimizer, tmp_path / "whole")
    saved = tmp_path / "whole" / "run" / f"step-{harness.SAVED}"
    shutil.copytree(saved, tmp_path / "stopped" / "run" / saved.name)
    resumed = train(optimizer, tmp_path / "stopped")
    harness.check("Levanter", optimizer, "`Trainer`, data 4 x model 2", whole, resumed, ROLES)
