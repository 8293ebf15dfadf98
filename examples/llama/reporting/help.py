"""The help of a command in groups: the important options first, then by subject.

A command reads its options from one flat dataclass. Only for `--help`, the same options go into nested
dataclasses, which tyro shows as boxes. Lines that an option's docstring breaks are joined, and an optional
option shows no default None.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

from examples.llama.reporting.files import written

FIRST = (
    *("preset", "model", "hf_config", "prompt", "optimizer", "optimizers", "method", "finetune"),
    *("data", "task", "learning_rate", "tune", "device_gb", "out"),
)
"""Options that a command shows first, if it has them."""

MOST_FIRST = 5

FEW = 8
"""A command with at most this many options has one group."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "step": (
        *("protocol", "steps", "epochs", "batch_size", "seq_len", "accumulate", "new_tokens"),
        *("warmup_fraction", "final_rate_fraction", "clip_norm", "weight_decay", "decay_vectors"),
        *(
            "compute_dtype",
            "remat",
            "scan_layers",
            "loss_chunk",
            "attention",
            "dtype",
        ),
        "seed",
    ),
    "data": (
        *("data", "tokenizer", "vocab_size", "heldout_fraction", "max_documents", "max_bytes"),
        *("text_field", "cache_dir", "packing", "template", "query_field", "response_field"),
        *("answer_field", "kind", "split", "limit", "skip_bad_records"),
    ),
    "device": ("mesh", "mesh_mode", "mesh_strict"),
    "evaluation": (
        *("eval_every", "eval_batches", "log_every", "statistics_every", "tensorboard", "wandb"),
    ),
    "checkpoint": ("overwrite",),
}
"""Options by group; others go with the class that declares them, see `_BY_CLASS`."""

_BY_CLASS = {
    "CheckpointConfig": "checkpoint",
    "ClusterConfig": "device",
    "DeviceConfig": "device",
}

_MAIN, _OF_OPTIMIZER, _REST = "main", "optimizer", "other"
_ORDER = (_MAIN, "step", "data", _OF_OPTIMIZER, "device", "evaluation", "checkpoint", _REST)


def grouped(kind: type) -> dict[str, list[str]]:
    """The options of a command's dataclass by group, in the order of the help.

    >>> @dataclasses.dataclass
    ... class Config:
    ...     steps: int = 1
    ...     out: str = "runs"
    >>> grouped(Config)
    {'main': ['out', 'steps']}
    """
    names = [field.name for field in dataclasses.fields(kind)]
    first = [name for name in FIRST if name in names]
    first = (
        [*first, *(n for n in names if n not in first)] if len(names) <= FEW else first[:MOST_FIRST]
    )
    has_optimizer = "optimizer" in names or "method" in names
    of_name = {name: group for group, members in GROUPS.items() for name in members}
    groups: dict[str, list[str]] = {}
    for name in [*first, *(name for name in names if name not in first)]:
        group = _MAIN if name in first else of_name.get(name) or _BY_CLASS.get(_owner(kind, name))
        group = group or (_OF_OPTIMIZER if has_optimizer else _REST)
        groups.setdefault(group, []).append(name)
    return {group: groups[group] for group in _ORDER if group in groups}


def help_class(kind: type) -> Any:
    """A class that tyro shows as the grouped help of `kind`; it is not meant to be instantiated."""
    described = descriptions(kind)
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    boxes = []
    for group, names in grouped(kind).items():
        members = []
        for name in names:
            hint = _shown(hints[name], fields[name].default, described.get(name, ""))
            member = dataclasses.field(
                default=fields[name].default, default_factory=fields[name].default_factory
            )
            members.append((written(fields[name]), hint, member))
        box = dataclasses.make_dataclass(group, members, kw_only=True)
        box.__doc__ = ""
        boxes.append((group, tyro.conf.OmitArgPrefixes[box]))
    made = dataclasses.make_dataclass(kind.__name__, boxes, kw_only=True)
    made.__doc__ = inspect.getdoc(kind)
    return tyro.conf.OmitArgPrefixes[made]


def _shown(hint: Any, default: Any, described: str) -> Any:
    """An option's type as the help shows it, without `{None}|` if None means that it is omitted."""
    given: list[Any] = list(hint.__metadata__) if typing.get_origin(hint) is Annotated else []
    bare = hint.__origin__ if given else hint
    helps = [one.help for one in given if getattr(one, "help", None)]
    text = " ".join((helps[0] if helps else described).split())
    if default is not None:
        return Annotated[bare, tyro.conf.arg(help=text)]
    return Annotated[bare, tyro.conf.arg(help=text, metavar=_metavar(bare), help_behavior_hint="")]


def _metavar(hint: Any) -> str:
    """The form of a value, for an optional option.

    >>> _metavar(int | None), _metavar(Literal["a", "b"] | None), _metavar(list[str] | None)
    ('INT', '{a,b}', 'STR [STR ...]')
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)][:1]
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) is list:
        name = typing.get_args(hint)[0].__name__.upper()
        return f"{name} [{name} ...]"
    return "{True,False}" if hint is bool else hint.__name__.upper()


@functools.cache
def descriptions(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass and of those that it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        if not dataclasses.is_dataclass(owner):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except OSError:  # a dynamically created class
            continue
        (body,) = [node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        for node, following in itertools.pairwise(body):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                found[node.target.id] = " ".join(str(following.value.value).split())
    return found


def _owner(kind: type, name: str) -> str:
    """The name of the class that declares an option."""
    for owner in kind.__mro__:
        if name in vars(owner).get("__annotations__", {}):
            return owner.__name__
    return kind.__name__
