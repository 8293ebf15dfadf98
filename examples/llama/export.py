"""Writes a trained model as a Hugging Face folder that `transformers` and other tools load.

    python -m examples.llama.export --model runs/metamath --out exported --dtype bfloat16

MODEL is the folder of a run of `train` or `finetune`, whose newest whole checkpoint is taken (adapters are
merged into the matrices), or a Hugging Face folder to write in another dtype. The tokenizer goes along.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from examples.llama.finetuning.loading import Model, load_model
from examples.llama.model.hf_write import TOKENIZER_FILES, Dtype, save_folder
from examples.llama.reporting.command import command
from examples.llama.reporting.folders import check_output
from examples.llama.training.orbax_noise import quiet_orbax


@dataclass(frozen=True)
class ExportConfig:
    """Writes a trained model as a Hugging Face folder."""

    model: str
    """Folder of a run, or a Hugging Face folder."""
    out: Path
    """Folder to write."""
    dtype: Dtype = "float32"
    """Dtype to store."""
    max_file_gb: float = 5.0
    """Largest safetensors file, in 10^9 bytes."""
    overwrite: bool = False
    """Replace a model that the folder holds."""


def export(config: ExportConfig) -> list[Path]:
    """Writes the folder; returns its files.

    Raises:
        ValueError: The model cannot be read, or the size is not positive.
        FileExistsError: The folder holds a model and `overwrite` is not set, or it is no place for one.
    """
    check_output(config.out, "model", {"--model": config.model})
    if not config.max_file_gb > 0:
        raise ValueError(f"max_file_gb must be positive, got {config.max_file_gb}")
    model = load_model(config.model)
    written = save_folder(
        config.out,
        model.config,
        model.params,
        dtype=config.dtype,
        max_file_bytes=int(config.max_file_gb * 10**9),
        base=model.hub_folder,
        tokenizer=_tokenizer_folder(model),
        overwrite=config.overwrite,
    )
    _name_stop_tokens(config.out / "config.json", model)
    return written


def _tokenizer_folder(model: Model) -> Path:
    """The hub folder if its tokenizer was kept: the chat template is there too. Otherwise the run's."""
    hub = model.hub_folder
    if hub is None or not (hub / TOKENIZER_FILES[0]).is_file():
        return model.folder
    same = load_model(hub).tokenizer.to_str() == model.tokenizer.to_str()
    return hub if same else model.folder


def _name_stop_tokens(path: Path, model: Model) -> None:
    """Says in config.json which tokens end a text, where a base has not said it."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.get("eos_token_id") is None and model.stop_ids:
        stop = list(model.stop_ids)
        fields["eos_token_id"] = stop[0] if len(stop) == 1 else stop
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return command(ExportConfig, _export, arguments, prog="python -m examples.llama.export")


def _export(config: ExportConfig) -> int:
    quiet_orbax()
    for path in export(config):
        Console().print(str(path), markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
