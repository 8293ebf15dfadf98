"""The cells of the token benchmark as a page: the best of each variant, its searched rates, traces."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import describe_circumstances, table

GROUP = (
    "shape",
    "dtype",
    "budget",
    "batch_size",
    "seq_len",
    "accumulate",
    "final_rate_fraction",
    "tokens_sha256",
    "device",
)
"""What all rows of a table share."""
ROLES = ("embedding", "matrix", "vector")


def page(content: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    parts = [
        """# Training on a file of tokens: every cell

Held-out loss and perplexity after the last step, of the best rates that were searched; rates on a grid of
factor two. "Edge" marks a best rate at the end of its grid. The rate is that of matrices and vectors, the
tables' rate that of embedding and head. State as a share of AdamW's. The command
`python -m benchmarks.tokens --report` writes this page.
"""
    ]
    if content.get("circumstances"):
        parts.append(describe_circumstances(content["circumstances"]) + "\n")
    return "\n".join([*parts, *sections(content)])


def sections(content: Mapping[str, Any], heading: str = "##") -> list[str]:
    """A part for each shape, budget, file and device: the table of its rows, and its traces."""
    groups = dict.fromkeys(map(_group, [*content["cells"], *content.get("traces", [])]))
    return [_section(content, group, heading) for group in groups]


def cells_by_group(content: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
    """The cells of each part with rows, in the order of `sections`."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell in content["cells"]:
        groups.setdefault(_group(cell), []).append(cell)
    return list(groups.values())


def describe_protocol(cell: Mapping[str, Any]) -> str:
    """The budget, the step and a schedule of its own, of a cell or a group.

    >>> describe_protocol({"budget": 2e6, "batch_size": 8, "seq_len": 64, "final_rate_fraction": 1.0})
    '2 million tokens, 8 x 64 a step, final rate 1 of the peak'
    """
    step = f"{cell['batch_size']} x {cell['seq_len']} a step"
    final = cell["final_rate_fraction"]
    end = "" if final is None else f", final rate {final:g} of the peak"
    return f"{cell['budget'] / 1e6:.4g} million tokens, {step}{end}"


def summarize(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The best cell of every variant of a group, with what was searched around it, by loss.

    A variant whose tables' rate was kept, or whose matrices' was, counts once.
    """
    rows = []
    for variant in dict.fromkeys(cell["variant"] for cell in cells):
        own = [cell for cell in cells if cell["variant"] == variant]
        first = [cell for cell in own if cell["seed"] == 0]
        finite = [cell for cell in first if cell["heldout_loss"] is not None]
        if not finite:
            rows.append({"label": own[0]["label"], "variant": variant, "loss": math.inf})
            continue
        best = min(finite, key=lambda cell: cell["heldout_loss"])
        rates = ("learning_rate", "table_rate")
        seeds = [
            cell
            for cell in own
            if cell["heldout_loss"] is not None and all(cell[r] == best[r] for r in rates)
        ]
        losses = [cell["heldout_loss"] for cell in seeds]
        rows.append(
            {
                "label": best["label"],
                "variant": variant,
                "loss": statistics.fmean(losses),
                "spread": (min(losses), max(losses)),
                "seeds": len(seeds),
                "best": best,
                "searched": _searched(first, best),
                "edge": _edge(first, best),
            }
        )
    return sorted(rows, key=lambda row: row["loss"])


def _searched(cells: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> str:
    """The rates that were tried."""
    sides = [(f"{n} ", sorted({cell[key] for cell in cells})) for n, key in _NAMED.items()]
    ratios = collections.Counter(map(_ratio, cells))
    if len(cells) > 1 and (len(ratios) == 1 or min(ratios.values()) >= 3):
        rates = sides[0][1]
        shown = ", ".join(f"{ratio:g}" for ratio in sorted(ratios, reverse=True))
        return f"{rates[0]:g} to {rates[-1]:g}, ratios {shown}"
    moved = [f"{n}{r[0]:g} to {r[-1]:g}" for n, r in sides if len(r) > 1]
    return ", ".join(moved) or f"{best['learning_rate']:g} only"


def _edge(cells: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> bool:
    """Whether no neighbour was tried on one side of the best, along what was moved."""
    inside = []
    for key, other in (("learning_rate", "table_rate"), ("table_rate", "learning_rate")):
        line = [cell[key] for cell in cells if cell[other] == best[other]]
        if len(line) >= 3:
            inside.append(min(line) < best[key] < max(line))
    if inside:
        return not all(inside)
    line = [
        cell["learning_rate"]
        for cell in cells
        if math.isclose(_ratio(cell), _ratio(best), rel_tol=0.01)
    ]
    return not min(line) < best["learning_rate"] < max(line)


_NAMED = {"matrices": "learning_rate", "tables": "table_rate"}


def _ratio(cell: Mapping[str, Any]) -> float:
    return float(f"{cell['table_rate'] / cell['learning_rate']:.2g}")


def _group(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[name] for name in GROUP)


def _section(content: Mapping[str, Any], group: tuple[Any, ...], heading: str) -> str:
    fields: dict[str, Any] = dict(zip(GROUP, group, strict=True))
    cells = [cell for cell in content["cells"] if _group(cell) == group]
    title = f"{heading} {fields['shape']}: {describe_protocol(fields)}"
    about = [
        f"Products in {fields['dtype']}, on {fields['device']}, tokens {fields['tokens_sha256'][:12]}"
    ]
    if cells:
        about.append(f"{cells[0]['parameters']:,} parameters, {len(cells)} runs")
    if fields["accumulate"] > 1:
        about.append(f"gradients of {fields['accumulate']} parts accumulated")
    parts = [title, "; ".join(about) + "."]
    if cells:
        parts.append(_rows(cells))
    parts += [
        _traced(found, heading) for found in content.get("traces", []) if _group(found) == group
    ]
    return "\n\n".join(parts) + "\n"


def _matrix_rule(cell: Mapping[str, Any]) -> bool:
    return cell["variant"].startswith("adamw+")


def _table_rule(cell: Mapping[str, Any]) -> bool:
    return cell["variant"].endswith("+muon")


def _rows(cells: Sequence[Mapping[str, Any]]) -> str:
    header = ["optimizer", "loss", "perplexity", "seeds", "lowest to highest loss", "rate"]
    header += ["tables' rate", "searched", "of AdamW's state", "tokens/s"]
    lines = []
    for row in summarize(cells):
        if not math.isfinite(row["loss"]):
            lines.append([row["label"], "diverged", *["-"] * 8])
            continue
        best, (low, high) = row["best"], row["spread"]
        pace = best["tokens_per_second"]
        lines.append(
            [
                row["label"],
                f"{row['loss']:.3f}",
                f"{math.exp(row['loss']):.2f}",
                row["seeds"],
                f"{low:.3f} to {high:.3f}" if row["seeds"] > 1 else "-",
                f"{best['learning_rate']:g}{' (edge)' if row['edge'] else ''}",
                f"{best['table_rate']:g}",
                row["searched"],
                f"{100 * best['state_ratio']:.2f} %",
                "-" if pace is None else f"{pace:,.0f}",
            ]
        )
    return table(header, lines)


def _traced(found: Mapping[str, Any], heading: str) -> str:
    """A trace: every second point, to be read."""
    points = found["points"]
    shown = points[1::2] if len(points) > 12 else points
    names = [name for name in points[0] if name != "tokens"]
    order = ("loss", "update/", "damper/", "cosine/", "spectrum/", "common/", "rows/")
    names.sort(key=lambda name: next(n for n, o in enumerate(order) if name.startswith(o)))
    lines = [[f"{p['tokens'] / 1e6:.3g}M", *(f"{p[name]:.3g}" for name in names)] for p in shown]
    shares = ", ".join(f"{100 * part:.1f} %" for part in found["group_share"])
    rate, tables = found["learning_rate"], found["table_rate"]
    rates = f"{rate:g}" if rate == tables else f"{rate:g}, tables {tables:g},"
    return (
        f"{heading}# {found['variant']} at {rates} over the run\n\n"
        f"Row groups from the rarest quarter of the tokens to the most frequent: {shares} of the text.\n\n"
        f"{table(['tokens', *names], lines)}"
    )
