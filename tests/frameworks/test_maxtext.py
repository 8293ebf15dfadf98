"""MaxText: its `train` trains a small scanned Llama, stops, and goes on from its own checkpoint."""

from __future__ import annotations

import json
import pathlib
import shutil

import maxtext
import pytest
from flax import nnx
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train as trainer

from tests.frameworks import harness

BASE = pathlib.Path(maxtext.__path__[0]) / "configs" / "base.yml"
OPTIONS = (
    "run_name=run",
    "hardware=cpu",
    "skip_jax_distributed_system=true",
    "dataset_type=synthetic",
    "decoder_block=llama2",
    "base_emb_dim=32",
    "base_mlp_dim=64",
    "base_num_decoder_layers=2",
    "base_num_query_heads=4",
    "base_num_kv_heads=2",
    "head_dim=8",
    "vocab_size=128",
    "max_target_length=16",
    "per_device_batch_size=2",
    "attention=dot_product",
    "ici_fsdp_parallelism=4",
    "ici_tensor_parallelism=2",
    "learning_rate=1e-2",
    "warmup_steps_fraction=0",
    "dtype=float32",
    "enable_tensorboard=false",
    "enable_goodput_recording=false",
    "async_checkpointing=false",
    f"checkpoint_period={harness.SAVED}",
)
ROLES = {
    r"^token_embedder/embedding$": ("embedding", (0,), (1,)),
    r"logits_dense/kernel$": ("head", (1,), (0,)),
    r"layers/self_attention/(query|key|value)/kernel$": ("matrix", (2, 3), (0,)),
    r"layers/self_attention/out/kernel$": ("matrix", (3,), (0, 2)),
    r"layers/mlp/(wi_0|wi_1|wo)/kernel$": ("matrix", (2,), (0,)),
    r"layers/.*norm/scale$": ("vector", (), (0,)),  # layers on axis 1
    r"decoder_norm/scale$": ("vector", (), (0,)),
}


def train(optimizer, folder, monkeypatch):
    """Trains to the last step, from the folder's newest checkpoint if there is one."""
    monkeypatch.setattr(optimizers, "get_optimizer", None)  # put back after the test
    found = harness.run_section("MaxText", optimizer, {})
    get_optimizer, made, ended = found["get_optimizer"], [], []

    def kept(*arguments, **options):
        made.append(get_optimizer(*arguments, **options))
        return made[-1]

    loop = trainer.train_loop
    optimizers.get_optimizer = kept
    metrics = folder / "metrics.txt"
    argv = ["train", str(BASE), *OPTIONS, f"steps={harness.STEPS}"]
    argv += [f"base_output_directory={folder}", f"metrics_file={metrics}"]
    with monkeypatch.context() as patch, harness.compilations("train_step") as count:
        patch.setattr(trainer, "train_loop", lambda *a, **k: ended.append(loop(*a, **k)))
        found["train"].main(argv)
        compilations = count()
    losses = [json.loads(line)["learning/loss"] for line in metrics.read_text().splitlines()]
    params = nnx.filter_state(ended[-1].model, nnx.Param)
    return harness.Trained(losses, params, ended[-1].optimizer.opt_state, compilations, made[-1])


@pytest.mark.parametrize("optimizer", harness.OPTIMIZERS)
def test_train(optimizer, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole = train(optimizer, tmp_path / "whole", monkeypatch)
    saved = tmp_path / "whole" / "run" / "checkpoints" / str(harness.SAVED)
    shutil.copytree(saved, tmp_path / "stopped" / "run" / "checkpoints" / saved.name)
    resumed = train(optimizer, tmp_path / "stopped", monkeypatch)
    setting = "`pre_train.train`, fsdp 4 x tensor 2, layers scanned"
    harness.check("MaxText", optimizer, setting, whole, resumed, ROLES)
