"""Warnings about uncertain layouts, with the rule to add, and errors for rules that match nothing."""

from __future__ import annotations

import difflib
import functools
import re
import warnings
from collections.abc import Sequence

from layout_optax.layout import ParamLayout
from layout_optax.rules import Inferred, Rule, anchored


class LayoutWarning(UserWarning):
    """Warns of a layout, a role or a rank that is probably wrong, once for each message.

    The message names the parameters and two rules: one that corrects the reading, and one that confirms it.
    Silence the category with `warnings.filterwarnings`.
    """


_SAID: set[str] = set()
_LINES = 6  # rules in one message
_MATRIX = re.compile(  # names that only matrices have
    r"(?i)(^|/)([qkvo]|qkv|query|key|value|up|down|gate|w[123qkvoi]|wi_\d|[qkvo]_proj|(up|down|gate|qkv)_proj"
    r"|\w*att\w*|mlp\w*|ffn|feed_forward)(/|$)"
)
_IN_STACK = re.compile(r"(?i)(^|/)(\w+_)?(layers?|blocks?|h)([_/]|$)")


def warn_once(message: str) -> None:
    """Warns with `LayoutWarning`, once per process for each message."""
    if message not in _SAID:
        _SAID.add(message)
        warnings.warn(message, LayoutWarning, stacklevel=3)


@functools.lru_cache(maxsize=256)
def check_rules(rules: tuple[Rule, ...], paths: tuple[str, ...]) -> None:
    """Refuses rules that match no path of a whole tree.

    Raises:
      ValueError: with the pattern and the nearest path, or with the fault in the regular expression.
    """
    for pattern, _ in rules:
        if not matches(pattern, paths, "layout: rule"):
            raise ValueError(
                f"layout: rule {pattern!r} matches no parameter; {nearest(pattern, paths)}. Correct the "
                "pattern or remove the rule."
            )


def matches(pattern: str, paths: Sequence[str], what: str) -> bool:
    """Whether a pattern matches any path.

    Raises:
      ValueError: if the pattern is not a regular expression; ``what`` begins the message.
    """
    try:
        find = re.compile(pattern).search
    except re.error as error:
        raise ValueError(
            f"{what} {pattern!r} is not a regular expression: {error}. Escape it with re.escape."
        ) from None
    return any(map(find, paths))


def nearest(pattern: str, paths: Sequence[str]) -> str:
    """Names the path that is most similar to a pattern."""
    plain = re.sub(r"[\\^$()?]", "", pattern)
    # Compare the ends of paths, since patterns name ends more often than whole paths.
    depth = plain.count("/") + 1
    ends = {"/".join(path.split("/")[-n:]): path for path in paths for n in (depth, depth + 1)}
    close = difflib.get_close_matches(plain, ends, n=1, cutoff=0.0)
    return f"the nearest path is '{ends[close[0]]}'" if close else "there are none"


def warn_of_guesses(
    paths: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], found: tuple[Inferred, ...]
) -> None:
    """Warns of leaves with uncertain axes, and of leaves that look like stacks beside stacks."""
    for message in (*_uncertain(paths, found), *_unstacked(paths, shapes, found)):
        warn_once(message)


def _uncertain(paths: Sequence[str], found: Sequence[Inferred]) -> list[str]:
    """Leaves whose preset or stack is a guess, with a rule for the other reading."""
    by_guess: dict[str, list[tuple[str, Inferred]]] = {}
    for path, inferred in zip(paths, found, strict=True):
        if inferred.guess and inferred.other is not None:
            by_guess.setdefault(inferred.guess, []).append((path, inferred))
    messages = []
    for guess, rows in by_guess.items():
        other = _rules([(path, inferred.other) for path, inferred in rows])
        same = _rules([(path, inferred.layout) for path, inferred in rows])
        messages.append(
            f"layout: '{rows[0][0]}'{_and_more(rows)} read as '{rows[0][1].assumed}', but {guess}. If "
            f"so, say {other}; if not, silence this with {same}."
        )
    return messages


def _unstacked(
    paths: Sequence[str], shapes: Sequence[tuple[int, ...]], found: Sequence[Inferred]
) -> list[str]:
    """Matrices known by shape alone that have an axis as long as the batch axis of the leaves beside them."""
    batches: dict[str, set[tuple[int, int]]] = {}  # parent -> position and length of batch axes
    for path, shape, inferred in zip(paths, shapes, found, strict=True):
        if inferred.layout is not None:
            axes = inferred.layout.batch_axes(len(shape))
            for parent in _parents(path):
                batches.setdefault(parent, set()).update((axis, shape[axis]) for axis in axes)
    rows = []
    for path, shape, inferred in zip(paths, shapes, found, strict=True):
        if inferred.grade != "shape" or len(shape) != 2 or inferred.layout is None:
            continue
        beside = next((batches[p] for p in _parents(path) if batches.get(p)), set())
        for axis in inferred.layout.row_axes + inferred.layout.column_axes:
            if (axis, shape[axis]) in beside:
                rows.append((path, ParamLayout("vector", (), (1 - axis,)), shape, inferred.layout))
                break
    if not rows:
        return []
    path, _, shape, _ = rows[0]
    return [
        f"layout: '{path}' of shape {shape}{_and_more(rows)} read as a matrix by its shape alone, but "
        "the leaves beside it are stacks of that length. If it is a stack of vectors, say "
        f"{_rules([row[:2] for row in rows])}; if not, silence this with "
        f"{_rules([(row[0], row[3]) for row in rows])}."
    ]


def warn_of_roles(
    paths: Sequence[str], shapes: Sequence[tuple[int, ...]], found: Sequence[Inferred | None]
) -> None:
    """Warns if inference may have read an embedding or head as a matrix."""
    for message in _missed_tables(tuple(paths), tuple(shapes), tuple(found)):
        warn_once(message)


@functools.lru_cache(maxsize=256)
def _missed_tables(
    paths: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], found: tuple[Inferred, ...]
) -> list[str]:
    layouts = [inferred.layout for inferred in found]
    vague = [  # outside of layers, without a telling name
        (path, shape, layout)
        for path, shape, layout, inferred in zip(paths, shapes, layouts, found, strict=True)
        if inferred.grade in ("general", "shape")
        and layout is not None
        and layout.role == "matrix"
        and len(shape) == 2
        and 0 not in shape
        and re.search(r"[^\d/]", path)  # bare arrays in lists are toy models
        and not _IN_STACK.search(path)
        and not _MATRIX.search(path)
    ]
    tables = {
        (shape[layout.row_axes[0]], shape[layout.column_axes[0]]): path
        for path, shape, layout in zip(paths, shapes, layouts, strict=True)
        if layout is not None and layout.role == "embedding" and len(layout.column_axes) == 1
    }
    roles = [None if layout is None else layout.role for layout in layouts]
    if "embedding" not in roles and "head" not in roles:
        by_rule = [inferred.grade == "rule" for inferred in found]
        matrices = sum(r == "matrix" and not b for r, b in zip(roles, by_rule, strict=True))
        if matrices < 2 or not vague or any(by_rule):
            return []
        path, shape, layout = max(vague, key=lambda row: max(row[1]))
        role = "embedding" if shape[0] >= shape[1] else "head"
        return [
            f"layout: {matrices} matrices and no embedding or head. If '{path}' of shape {shape} is the "
            f"{'table of tokens' if role == 'embedding' else 'head'}, say {_rules([(path, role)])}; if "
            f"the model has none, silence this with {_rules([(path, layout)])}."
        ]
    messages = []
    for path, shape, layout in vague:
        for (vocabulary, features), table in tables.items():
            if vocabulary > features and sorted(shape) == sorted((vocabulary, features)):
                rows = shape.index(vocabulary)
                head = "head" if rows == 1 else ParamLayout("head", (0,), (1,))
                messages.append(
                    f"layout: '{path}' of shape {shape} has the vocabulary's length, as '{table}', and is "
                    f"read as a matrix. If it is the head, say {_rules([(path, head)])}; if not, silence "
                    f"this with {_rules([(path, layout)])}."
                )
    return messages


def _parents(path: str) -> list[str]:
    """The folders of a path, innermost first, without the root."""
    parts = path.split("/")[:-1]
    return ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _and_more(rows: Sequence[object]) -> str:
    return " is" if len(rows) == 1 else f" and {len(rows) - 1} more are"


def _rules(rows: Sequence[tuple[str, ParamLayout | str | None]]) -> str:
    """The ``layout`` argument to pass, with a rule for each of the first rows."""
    lines = []
    for path, layout in rows[:_LINES]:
        if isinstance(layout, ParamLayout):
            layout = f"ParamLayout({layout.role!r}, {layout.row_axes}, {layout.column_axes})"
        else:
            layout = repr(layout)
        lines.append(f"(r'{anchored(path)}', {layout})")
    rest = f", and {len(rows) - _LINES} more like these" if len(rows) > _LINES else ""
    return f"layout=functools.partial(infer_layout, rules=[{', '.join(lines)}]){rest}"


__all__ = [
    "LayoutWarning",
    "check_rules",
    "matches",
    "nearest",
    "warn_of_guesses",
    "warn_of_roles",
    "warn_once",
]
