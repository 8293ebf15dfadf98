"""A model and a corpus small enough to train in a test, and configurations for them."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer, models

from examples.llama.data.dataset import DataConfig, Dataset
from examples.llama.model.config import LlamaConfig
from examples.llama.training.config import TrainConfig

MODEL = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    tie_embeddings=True,
    max_seq_len=32,
)


@functools.cache
def dataset(tokens: int = 6000, heldout: int = 800) -> Dataset:
    """A corpus with something to learn: each token is mostly followed by one of two others."""
    random = np.random.default_rng(0)
    chain = np.zeros(tokens + heldout, np.uint16)
    for i in range(1, len(chain)):
        guess = (3 * int(chain[i - 1]) + int(random.integers(1, 3))) % MODEL.vocab_size
        chain[i] = guess if random.random() < 0.9 else random.integers(MODEL.vocab_size)
    return Dataset(
        config=DataConfig("synthetic:0"),
        train_tokens=chain[:tokens],
        heldout_tokens=chain[tokens:],
        train_documents=1,
        heldout_documents=1,
        tokenizer=Tokenizer(models.BPE()),
        vocab_size=MODEL.vocab_size,
        corpus_sha256="0123456789abcdef" * 4,
        tokenizer_sha256="f" * 64,
    )


def config(out: Path, **fields: Any) -> TrainConfig:
    """A short run of the tiny model."""
    defaults = {
        "optimizer": "adamw",
        "learning_rate": 1e-2,
        "steps": 8,
        "batch_size": 8,
        "seq_len": 16,
        "eval_every": 4,
        "eval_batches": 2,
        "log_every": 2,
        "statistics_every": 0,
        "tensorboard": False,
        "checkpoint_every": 0,
    }
    return TrainConfig(out=out, **{**defaults, **fields})


def quiet_console() -> Console:
    """A console that nobody reads; its text is in `console.file`."""
    return Console(file=io.StringIO(), width=120)
