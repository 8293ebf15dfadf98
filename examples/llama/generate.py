"""Completes prompts with a trained model.

    python -m examples.llama.generate --model MODEL --prompt "Once upon a time" --new-tokens 64

MODEL is the folder of a run of the trainer, or a Hugging Face folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from examples.llama.finetuning.loading import load_model
from examples.llama.model.generation import Generator, Sampling
from examples.llama.reporting.command import command
from examples.llama.reporting.progress import say, waiting
from examples.llama.training.orbax_noise import quiet_orbax


@dataclass(frozen=True)
class GenerateConfig:
    """Completes prompts with a trained model."""

    model: Path
    """Folder of a run, or a Hugging Face folder."""
    prompt: Annotated[list[str], tyro.conf.arg(help="One or more prompts.")]
    new_tokens: int = 64
    """Largest number of tokens to add."""
    temperature: float = 0.0
    """0 takes the most likely token; otherwise logits are divided by this number."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with at least this probability."""
    seed: int = 0
    """Seed of the draws."""
    stop: list[str] | None = None
    """Tokens that end a completion, by their text; by default the model's own."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products and cache."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return command(GenerateConfig, _generate, arguments, prog="python -m examples.llama.generate")


def _generate(config: GenerateConfig) -> int:
    quiet_orbax()
    console = Console()
    sampling = Sampling(config.temperature, config.top_p, config.seed)
    model = load_model(config.model)
    prompts = [model.encode(text) for text in config.prompt]
    stop_ids = model.stop_ids if config.stop is None else model.token_ids(config.stop)
    generator = Generator(
        model.structure(config.compute_dtype),
        model.params,
        batch_size=len(prompts),
        prompt_tokens=max(map(len, prompts)),
        new_tokens=config.new_tokens,
        stop_ids=stop_ids,
    )
    with waiting(console, "compiling and completing"):
        completions = generator(prompts, sampling)
    for text, completion in zip(config.prompt, completions, strict=True):
        console.print(text, style="bold", end="", markup=False, soft_wrap=True, highlight=False)
        say(console, model.decode(completion.tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
