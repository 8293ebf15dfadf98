"""Writes a trained model as a Hugging Face folder that `transformers` and other tools load.

    python -m examples.llama.export --model runs/metamath --out exported --dtype bfloat16

MODEL is the folder of a run of `train` or `finetune`, whose newest whole checkpoint is used (adapters are
merged into the matrices), or a Hugging Face folder to write in another dtype. The tokenizer is written too,
with the files in which `transformers` looks for special tokens. Your umask decides who may read the files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.llama.data.tokenizer import BOS, EOS
from examples.llama.finetuning.loading import Model, load_model
from examples.llama.model.hf_write import TOKENIZER_FILES, Dtype, save_folder
from examples.llama.reporting.command import command
from examples.llama.reporting.files import write_json, write_text
from examples.llama.reporting.folders import check_output
from examples.llama.reporting.progress import say, waiting
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
    """Replace a model in the folder."""


def export(config: ExportConfig) -> list[Path]:
    """Writes the folder; returns its files.

    Raises:
        ValueError: The model cannot be read, or the size is not positive.
        FileExistsError: The folder holds a model without `overwrite`, or holds other files.
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
    _name_special_tokens(config.out / "config.json", model)
    return [*written, *_generation_files(config.out, model, {path.name for path in written})]


def _tokenizer_folder(model: Model) -> Path:
    """The hub folder if its tokenizer was kept, since it has the chat template too. Otherwise the run's."""
    hub = model.hub_folder
    if hub is None or not (hub / TOKENIZER_FILES[0]).is_file():
        return model.folder
    same = load_model(hub).tokenizer.to_str() == model.tokenizer.to_str()
    return hub if same else model.folder


def _name_special_tokens(path: Path, model: Model) -> None:
    """Writes the tokens that begin and end a text to config.json, if the base model's does not have them."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    before = dict(fields)
    for name, ids in (("eos_token_id", model.stop_ids), ("bos_token_id", _begin(model))):
        if fields.get(name) is None and ids:
            fields[name] = ids[0] if len(ids) == 1 else list(ids)
    if fields != before:
        write_text(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _begin(model: Model) -> tuple[int, ...]:
    """The token that begins a text, if the tokenizer was trained here."""
    begin = model.tokenizer.token_to_id(BOS)
    return () if begin is None else (begin,)


def _generation_files(folder: Path, model: Model, there: Collection[str]) -> list[Path]:
    """Writes the files that `transformers` reads besides the weights, if the base model has none."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ids = {name: fields[name] for name in ("bos_token_id", "eos_token_id") if name in fields}
    wanted: dict[str, dict[str, Any]] = {"generation_config.json": ids}
    if _begin(model) and model.tokenizer.token_to_id(EOS) is not None:
        wanted["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "model_max_length": model.config.max_seq_len,
            "clean_up_tokenization_spaces": False,
        }
    written = []
    for name, content in wanted.items():
        if content and name not in there:
            write_json(folder / name, content)
            written.append(folder / name)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return command(ExportConfig, _export, arguments, prog="python -m examples.llama.export")


def _export(config: ExportConfig) -> int:
    quiet_orbax()
    console = Console()
    with waiting(console, "reading and writing"):
        written = export(config)
    for path in written:
        say(console, str(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
