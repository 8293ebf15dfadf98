"""Peak learning rates by preset and optimizer with their sources, and ranks by preset.

`python -m examples.llama.compare --tune` searches them; the source says which were searched, so that no table
presents a guess as tuned. An optimizer with options has its own learning rate, under the key of its variant
(`variants.Variant.key`): "galore:rank=16".
"""

from __future__ import annotations

SEARCHED = "searched over 150 steps"
HALF = "searched over 75 steps"
GUESS = "starting guess, not searched"
SCRIPTS = "SAGE authors' scripts, not searched"

_SAGE_SCRIPTS = {
    "adamw": (1e-4, SCRIPTS),
    "lion": (1e-4, SCRIPTS),
    "sage_hybrid": (2e-3, SCRIPTS),
    "sage_hybrid_int8": (2e-3, SCRIPTS),
}

TUNED_RATES: dict[str, dict[str, tuple[float, str]]] = {
    "demo": {
        "adamw": (3e-3, SEARCHED),
        "lion": (2e-3, HALF),
        "adafactor": (3e-2, HALF),
        "muon": (1.2e-2, SEARCHED),
        "galore": (1e-2, HALF),
        "sage_hybrid": (1e-3, SEARCHED),
        "sage_hybrid_int8": (1e-3, "that of SAGE-Hybrid"),
        "sinkgd_hybrid": (4e-3, HALF),
        "lion_hybrid": (1e-3, SEARCHED),
        "sage": (1e-3, GUESS),
        "sinkgd": (2e-2, GUESS),
        "adamw:b2=0.95": (1.5e-3, SEARCHED),
        "adamw:b2=0.95:matrix_rate=0.25": (1e-2, SEARCHED),
        "galore:rank=4": (8e-2, SEARCHED),
        "galore:rank=16": (4e-2, SEARCHED),
        "galore:rank=64": (1e-2, SEARCHED),
        "lorapre_adamw:rank=4:scale=0.25": (2.5e-3, SEARCHED),
        "lorapre_adamw:rank=16:scale=0.25": (1e-2, SEARCHED),
        "lorapre_adamw:rank=64:scale=0.25": (5e-3, SEARCHED),
        "lorapre_adamw:rank=4:options=recommended:scale=0.25": (5e-3, SEARCHED),
        "lorapre_adamw:rank=16:options=recommended:scale=0.25": (5e-3, SEARCHED),
        "lorapre_adamw:rank=64:options=recommended:scale=0.25": (5e-3, SEARCHED),
        "lorapre_muon": (1.2e-2, "that of ranks 4, 16 and 64"),
        "lorapre_muon:rank=4": (1.2e-2, SEARCHED),
        "lorapre_muon:rank=16": (1.2e-2, SEARCHED),
        "lorapre_muon:rank=64": (1.2e-2, SEARCHED),
        "lorapre_muon:rank=1:table_rank=2:b2=0.95": (1.2e-2, SEARCHED),
        "lorapre_muon:rank=4:table_rank=4:b2=0.95": (2.4e-2, SEARCHED),
        "lorapre_muon:rank=16:table_rank=16:b2=0.95": (1.2e-2, SEARCHED),
        "lorapre_sinkgd:rank=3:scale=5": (6e-3, SEARCHED),
        "lorapre_sinkgd:rank=4:scale=5": (6e-3, SEARCHED),
        "lorapre_sinkgd:rank=16:scale=5": (3e-3, SEARCHED),
        "lorapre_sinkgd:rank=64:scale=5": (6e-3, SEARCHED),
    },
    "sage_270m": _SAGE_SCRIPTS,
    "sage_1.3b": _SAGE_SCRIPTS,
}


def tuned_rate(preset: str, optimizer: str) -> tuple[float, str]:
    """The peak learning rate of an optimizer or variant on a preset, and its source.

    Raises:
        ValueError: The table has none; the message says how to give or find one.

    >>> tuned_rate("demo", "adamw")
    (0.003, 'searched over 150 steps')
    """
    rates = TUNED_RATES.get(preset, {})
    if optimizer not in rates:
        found = rate_to_begin_with(optimizer)
        begin = "give --learning-rate"
        if found is not None:
            rate, source, where = found
            begin = f"begin with --learning-rate {rate:g} ({source}, {where})"
        raise ValueError(
            f"no tuned rate of {optimizer!r} for preset {preset!r}; {begin}, read docs/tuning.md, or search "
            "with compare --tune"
        )
    return rates[optimizer]


def rate_to_begin_with(optimizer: str) -> tuple[float, str, str] | None:
    """The learning rate of the largest preset that has one, for a model without its own.

    Returns:
        The learning rate, its source, and the preset; None if no preset has one. The rate of the optimizer with
        options counts if there is none without.

    >>> rate_to_begin_with("muon")
    (0.012, 'searched over 150 steps', 'demo')
    >>> rate_to_begin_with("lorapre_adamw")[0]
    0.0025
    """
    name = optimizer.partition(":")[0]
    for preset in ("sage_1.3b", "sage_270m", "demo"):
        rates = TUNED_RATES[preset]
        for key in (optimizer, name, *(one for one in rates if one.startswith(f"{name}:"))):
            if key in rates:
                return (*rates[key], preset)
    return None


RANKS = {"galore_60m": 128, "galore_130m": 256, "galore_350m": 256, "galore_1b": 512}
"""Ranks of the published low-rank tables; elsewhere a quarter of the hidden size."""


def default_rank(preset_name: str, hidden_size: int) -> int:
    """The default rank of low-rank optimizers: the published one, or a quarter of the width.

    >>> default_rank("galore_60m", 512), default_rank("demo", 192)
    (128, 48)
    """
    return RANKS.get(preset_name, max(1, hidden_size // 4))


def parse_rates(
    text: str | None, known: tuple[str, ...] | list[str], what: str
) -> dict[str, float]:
    """Reads `name=rate,name=rate`.

    Raises:
        ValueError: An item is no such pair, a name is not among `known`, or a rate is not positive.

    >>> from layout_optax.layout import ROLES
    >>> parse_rates("embedding=1e-3,vector=0.002", ROLES, "role")
    {'embedding': 0.001, 'vector': 0.002}
    """
    rates = {}
    for item in filter(None, (part.strip() for part in (text or "").split(","))):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in known:
            raise ValueError(f"unknown {what} {name!r} in {item!r}; use one of {', '.join(known)}")
        rates[name] = parse_rate(value, name, item, what)
    return rates


def parse_rate(value: str, name: str, item: str, what: str) -> float:
    """Reads the rate in an item `name=rate`.

    Raises:
        ValueError: It is no positive number; the message names the item.
    """
    try:
        rate = float(value)
    except ValueError:
        raise ValueError(f"expected {what}=rate, got {item!r}") from None
    if not 0 < rate < float("inf"):
        raise ValueError(f"the rate of {what} {name!r} must be positive, got {value}")
    return rate
