"""Variants of the optimizers in a comparison: a name with options, `lorapre_adamw:rank=4:options=recommended`.

The options are the fields of `OptimizerOptions` that the optimizer takes, by the names of `WRITTEN`;
`embedding_rate`, `head_rate`, `matrix_rate` and `vector_rate` are multiples of the common learning rate.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union

from examples.llama.optimizers.options import WRITTEN, OptimizerOptions
from examples.llama.optimizers.rates import TUNED_RATES, parse_rate
from examples.llama.optimizers.registry import OPTIMIZERS, optimizer_entry
from layout_optax.layout import ROLES

_MULTIPLIERS = "role_multipliers"
_RATES = {f"{role}_rate": role for role in ROLES}
_FIRST = ("rank", "table_rank", "options", "weight_decay", "decay_vectors")
_ORDER = (*_FIRST, *(name for name in WRITTEN if name not in (*_FIRST, _MULTIPLIERS)), *_RATES)
"""The order of options in a key."""


@dataclass(frozen=True)
class Variant:
    """An optimizer with the options that were given, in the order of the key.

    Attributes:
        optimizer: A name of the registry.
        options: Values by option; a role's multiple under `embedding_rate` and the like.

    >>> parse_variant("lorapre_adamw : options=recommended : rank=04").key
    'lorapre_adamw:rank=4:options=recommended'
    """

    optimizer: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """The variant's canonical text form."""
        return ":".join([self.optimizer, *(f"{k}={_text(v)}" for k, v in self.options.items())])

    @property
    def folder(self) -> str:
        """The key as a file name.

        >>> parse_variant("galore:rank=16:scale=1").folder
        'galore__rank=16__scale=1'
        """
        return self.key.replace(":", "__")

    @property
    def label(self) -> str:
        """The variant's label for readers.

        >>> parse_variant("lorapre_adamw:rank=4:options=recommended:second_moment=full").label
        'LoRA-Pre Adam r=4 recommended second_moment=full'
        >>> parse_variant("adamw:matrix_rate=0.25").label
        'AdamW matrix x0.25'
        """
        return " ".join(
            [optimizer_entry(self.optimizer).label, *map(_readable, self.options.items())]
        )

    def fields(self) -> dict[str, Any]:
        """The fields of `TrainConfig` that the variant sets.

        >>> parse_variant("adamw:b2=0.95:matrix_rate=0.25").fields()
        {'optimizer': 'adamw', 'b2': 0.95, 'role_multipliers': 'matrix=0.25'}
        """
        found: dict[str, Any] = {"optimizer": self.optimizer}
        found |= {
            WRITTEN[name]: value for name, value in self.options.items() if name not in _RATES
        }
        roles = [
            f"{role}={_text(self.options[name])}"
            for name, role in _RATES.items()
            if name in self.options
        ]
        return found | ({_MULTIPLIERS: ",".join(roles)} if roles else {})


def parse_variant(text: str) -> Variant:
    """Reads `name:option=value:option=value`.

    Raises:
        ValueError: The name is unknown, or an option is unknown, given twice or of no such value; the
            message names the item and what there is.

    >>> parse_variant("lorapre_adamw:rank=4:bound=inf").options
    {'rank': 4, 'bound': inf}
    >>> parse_variant("galore:rank=four")
    Traceback (most recent call last):
        ...
    ValueError: 'galore:rank=four': rank must be an integer, got 'four'
    """
    name, *items = (part.strip() for part in text.split(":"))
    entry = optimizer_entry(name)
    known = [option for option in _ORDER if _takes(entry.options, option)]
    given: dict[str, Any] = {}
    for item in items:
        option, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"{text!r}: expected option=value, got {item!r}")
        if option not in known:
            raise ValueError(
                f"{text!r}: {name} takes no option {option!r}; use one of {', '.join(known)}"
            )
        if option in given:
            raise ValueError(f"{text!r}: {option} is given twice")
        try:
            given[option] = _value(option, value)
        except ValueError as error:
            raise ValueError(f"{text!r}: {option} must be {error}, got {value!r}") from None
    return Variant(name, {option: given[option] for option in known if option in given})


def parse_variants(text: str) -> list[Variant]:
    """Reads variants separated by commas.

    Raises:
        ValueError: There is none, one cannot be read, or one occurs twice.

    >>> [variant.key for variant in parse_variants("adamw, galore:rank=16")]
    ['adamw', 'galore:rank=16']
    """
    variants = [parse_variant(part) for part in text.split(",") if part.strip()]
    if not variants:
        raise ValueError("name at least one optimizer")
    keys = [variant.key for variant in variants]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"an optimizer is named twice in {text!r}: {key}")
    return variants


def parse_variant_rates(rates: str | None) -> dict[str, float]:
    """Reads `variant=rate,variant=rate`: the last `=` of an item is before its rate.

    Raises:
        ValueError: A variant cannot be read, or a rate is no positive number.

    >>> parse_variant_rates("adamw=3e-3,galore:rank=16=1e-2")
    {'adamw': 0.003, 'galore:rank=16': 0.01}
    """
    found = {}
    for item in filter(None, (part.strip() for part in (rates or "").split(","))):
        text, equals, value = (part.strip() for part in item.rpartition("="))
        name = (text if equals else item).partition(":")[0]
        if name not in OPTIMIZERS:
            known = ", ".join(OPTIMIZERS)
            raise ValueError(f"unknown optimizer {name!r} in {item!r}; use one of {known}")
        key = parse_variant(text if equals else item).key
        found[key] = parse_rate(value if equals else "", key, item, "optimizer")
    return found


def nearest_rate(preset: str, variant: Variant) -> tuple[str, float] | None:
    """The key and learning rate of the tuned variant with the most of these options and no others.

    >>> nearest_rate("demo", parse_variant("galore:rank=8"))
    ('galore', 0.01)
    """
    table = TUNED_RATES.get(preset, {})
    near = [found for found in map(parse_variant, table) if _within(found, variant)]
    if not near:
        return None
    best = max(near, key=lambda found: len(found.options)).key
    return best, table[best][0]


def _within(variant: Variant, other: Variant) -> bool:
    same = variant.optimizer == other.optimizer
    return same and variant.options.items() <= other.options.items()


def _takes(options: Sequence[str], option: str) -> bool:
    """Whether an entry with these options takes an option of a variant; all take weight decay."""
    if option in _RATES:
        return _MULTIPLIERS in options
    return WRITTEN[option] in (*options, "weight_decay", "decay_vectors")


def _value(option: str, text: str) -> Any:
    """Reads an option's value; the message of its ValueError says what the value must be."""
    if option in _RATES:
        number = _number(text)
        if not 0 < number < math.inf:
            raise ValueError("a positive number")
        return number
    kind = _kinds()[WRITTEN[option]]
    if typing.get_origin(kind) is Literal:
        if text not in typing.get_args(kind):
            raise ValueError(f"one of {', '.join(typing.get_args(kind))}")
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError("true or false")
        return text == "true"
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise ValueError("an integer") from None
    return _number(text)


@functools.cache
def _kinds() -> dict[str, Any]:
    """The type of each option, without None."""
    kinds = {}
    for name, hint in typing.get_type_hints(OptimizerOptions).items():
        if typing.get_origin(hint) in (Union, UnionType):
            (hint,) = (part for part in typing.get_args(hint) if part is not NoneType)
        kinds[name] = hint
    return kinds


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise ValueError("a number")
    return number


def _text(value: Any) -> str:
    """A value as written in a key: the shortest form that reads back as the same number.

    >>> _text(0.95), _text(4.0), _text(1e-8), _text(True)
    ('0.95', '4', '1e-08', 'true')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)


def _readable(item: tuple[str, Any]) -> str:
    option, value = item
    if option in _RATES:
        return f"{_RATES[option]} x{_text(value)}"
    if option == "options":
        return str(value)
    names = {"rank": "r", "table_rank": "table r"}
    return f"{names.get(option, option)}={_text(value)}"
