"""A model small enough to fine-tune in a test, as a Hugging Face folder with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from examples.llama.data.arithmetic import arithmetic_text
from examples.llama.data.tokenizer import train_tokenizer
from examples.llama.finetuning.run import FinetuneConfig
from examples.llama.model.config import LlamaConfig
from examples.llama.model.hf_write import save_folder
from tests.llama.random_params import random_params

MODEL = LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    tie_embeddings=True,
    max_seq_len=160,
)


def write_model(folder: Path, model: LlamaConfig = MODEL) -> Path:
    """A random model with a tokenizer of the generated problems."""
    tokenizer = train_tokenizer(arithmetic_text(0, 20), model.vocab_size)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_folder(folder, model, random_params(model))
    fields = json.loads((folder / "config.json").read_text())
    fields["eos_token_id"] = tokenizer.token_to_id("<eos>")
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def config(model: Path, out: Path, **fields: Any) -> FinetuneConfig:
    """A short run on generated problems."""
    defaults = {
        "data": "arithmetic:0:80:1",
        "template": "plain",
        "learning_rate": 3e-3,
        "batch_size": 4,
        "seq_len": 64,
        "steps": 6,
        "eval_every": 3,
        "eval_batches": 2,
        "log_every": 3,
        "heldout_fraction": 0.1,
        "rank": 4,
        "tensorboard": False,
        "checkpoint_every": 0,
    }
    return FinetuneConfig(model=str(model), out=out, **{**defaults, **fields})
