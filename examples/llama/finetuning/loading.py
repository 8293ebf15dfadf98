"""Opens a trained model from a Hugging Face folder, a training run or a fine-tuning run."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from tokenizers import Tokenizer

from examples.llama.data.documents import DataError
from examples.llama.data.instruction_batches import encode_text
from examples.llama.data.tokenizer import load_tokenizer, separator_id
from examples.llama.finetuning.program import finetuning_program, tuned_from_json
from examples.llama.model.config import LlamaConfig
from examples.llama.model.hf import load_params
from examples.llama.model.hf_config import read_config
from examples.llama.model.llama import Params, abstract, stack_layers, structure, unstack_layers
from examples.llama.model.subtrees import select
from examples.llama.reporting.files import CONFIG, read_json
from examples.llama.training.checkpoints import CheckpointError, Checkpoints, checkpoint_steps
from examples.llama.training.program import Program
from examples.llama.training.resume import target
from examples.llama.training.settings import settings_from_json

FINETUNE = "finetune"
"""The section of a fine-tuning run's config.json with the tuned parameters and the base model."""


class Model:
    """A stored model. Its shape and tokenizer are read at once, its parameters on demand.

    Attributes:
        folder: Its folder.
        config: Its shape.
        tokenizer: Its tokenizer.
        stop_ids: Tokens that end a text.
        hub_folder: The Hugging Face folder of the model or of its base; None if it was trained here.
    """

    def __init__(
        self,
        folder: Path,
        config: LlamaConfig,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        read: Callable[..., Params],
        hub_folder: Path | None,
    ):
        self.folder, self.config, self.tokenizer = folder, config, tokenizer
        self.stop_ids = tuple(stop_ids)
        self.hub_folder = hub_folder
        self._read = read

    def read(
        self,
        *,
        scan_layers: bool = True,
        shardings: Any = None,
        wanted: Callable[[str], bool] | None = None,
    ) -> Params:
        """Parameters on the host or, with shardings, on the devices.

        Args:
            scan_layers: Which form of the dict to fill.
            shardings: A sharding for every leaf of the whole dict, or None.
            wanted: Paths to read; the dict then holds only these. None reads all.
        """
        return self._read(scan_layers=scan_layers, shardings=shardings, wanted=wanted)

    @cached_property
    def params(self) -> Params:
        """All parameters in the scanned form, on the first device."""
        return self.read(shardings=on_one_device(abstract(self.config)))

    def structure(self, dtype: Any = "float32") -> Any:
        """The model structure for `params`."""
        return structure(self.config, dtype=dtype)

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, including the special tokens that begin a text."""
        return encode_text(self.tokenizer, text, first=True)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special tokens."""
        return self.tokenizer.decode(list(tokens))

    def token_ids(self, names: Sequence[str]) -> list[int]:
        """Ids of tokens by their text.

        Raises:
            DataError: There is no such token.
        """
        found = []
        for name in names:
            token = self.tokenizer.token_to_id(name)
            if token is None:
                raise DataError(f"The tokenizer of {self.folder} has no token {name!r}.")
            found.append(token)
        return found


def load_model(folder: str | Path, *, tokenizer: str | Path | None = None) -> Model:
    """Opens a model.

    Args:
        folder: A Hugging Face folder, or the folder of a run of `train` or `finetune`, whose newest whole
            checkpoint is used.
        tokenizer: A `tokenizer.json` or its folder to use instead of the model's.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: The model or its tokenizer cannot be used; the message says why.
    """
    folder = Path(folder).expanduser()
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}; {_how_to_get(folder)}")
    fields = json.loads(path.read_text(encoding="utf-8"))
    read_tokenizer = load_tokenizer(folder if tokenizer is None else tokenizer)
    if "settings" not in fields:
        return _hub_model(folder, fields, read_tokenizer)
    return _run_model(folder, fields, read_tokenizer)


def _how_to_get(folder: Path) -> str:
    """What to do if a folder holds no model: its name may be a model on the hub."""
    if not folder.exists() and re.fullmatch(r"[\w-]+/[\w.-]+", str(folder)):
        return f"if it is a model of the hub: hf download {folder} --local-dir {folder.name}"
    return "give a Hugging Face folder or a run's folder"


def on_one_device(params: Params) -> Any:
    """The sharding of each leaf that puts it on the first device."""
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: sharding, params)


def _hub_model(folder: Path, fields: dict[str, Any], tokenizer: Tokenizer) -> Model:
    config = read_config(folder)
    generation = folder / "generation_config.json"
    if generation.is_file():
        known = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
        fields = fields if known is None else {**fields, "eos_token_id": known}
    stop = fields.get("eos_token_id")
    stop_ids = [] if stop is None else stop if isinstance(stop, list) else [stop]

    def read(*, scan_layers: bool, shardings: Any, wanted: Any) -> Params:
        return load_params(folder, config, scan_layers, shardings=shardings, wanted=wanted)

    return Model(folder, config, tokenizer, stop_ids, read, folder)


def _run_model(folder: Path, fields: dict[str, Any], tokenizer: Tokenizer) -> Model:
    settings = dataclasses.replace(
        settings_from_json(fields["settings"]), mesh=None, mesh_mode=None, mesh_strict=None
    )
    hub_folder, tuned = None, None
    if FINETUNE in fields:
        base = load_model(_base_of(folder, fields))
        hub_folder, stop_ids = base.hub_folder, base.stop_ids
        tuned = tuned_from_json(fields[FINETUNE]["tuned"])
        program = finetuning_program(settings, tuned, base.read)
    else:
        program, stop_ids = Program(settings), [separator_id(tokenizer)]

    def read(*, scan_layers: bool, shardings: Any, wanted: Any) -> Params:
        params = _newest_params(folder, program)
        if tuned is not None:
            params = tuned.merge(params, program.frozen)
        if settings.scan_layers != scan_layers:
            params = stack_layers(params) if scan_layers else unstack_layers(params)
        if shardings is not None:
            params = jax.device_put(params, shardings)
        return params if wanted is None else select(params, wanted)

    stops = [token for token in stop_ids if token is not None]
    return Model(folder, settings.model, tokenizer, stops, read, hub_folder)


def _base_of(folder: Path, fields: dict[str, Any]) -> Path:
    """The base model of a fine-tuning run.

    Raises:
        ValueError: The run, or one that it starts from, starts from itself.
    """
    base, seen = Path(fields[FINETUNE]["base"]), {folder.resolve()}
    following = base
    while following.resolve() not in seen:
        seen.add(following.resolve())
        found = read_json(following / CONFIG)
        if not isinstance(found, dict) or FINETUNE not in found:
            return base
        following = Path(found[FINETUNE]["base"])
    raise ValueError(
        f"{folder / CONFIG} says that the run starts from {base}, which starts from the run itself; its base "
        "model was overwritten"
    )


def _newest_params(folder: Path, program: Program) -> Params:
    """The parameters of the newest whole checkpoint."""
    problems = []
    if checkpoint_steps(folder):
        with Checkpoints(folder, read_only=True) as checkpoints:
            for step in checkpoints.steps():
                try:
                    return checkpoints.restore(step, target(program)).params
                except CheckpointError as error:
                    problems.append(f"step {step}: {error}")
    found = "; ".join(problems) or "there is none"
    raise ValueError(f"{folder} has no checkpoint that can be read ({found})")
