"""Finds the data that a compiled program moves between devices: collectives in its HLO, times loop counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_SHAPE = re.compile(r"\b(?:pred|bf16|token|[a-z]\d+\w*)\[([\d,<=]*)\]")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ONE_CALLEE = re.compile(r"(?:calls|to_apply|body)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_FALSE = re.compile(r"(?:true|false)_computation=%?([\w.-]+)")


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: ``"all-reduce"`` and so on, the asynchronous forms under the same name.
      elements: elements of its larger side on one device: the result, or the operands of a reduce-scatter.
      times: number of executions: the product of the trip counts of the enclosing loops.
      name: the instruction's name.
    """

    kind: str
    elements: int
    times: int
    name: str

    @property
    def moved(self) -> int:
        """Elements in all executions."""
        return self.elements * self.times


def collectives(text: str, *, trip_count: int | None = None) -> list[Collective]:
    """The collectives that one run of a program executes, in the order of its text.

    Of the branches of a conditional the one that moves most counts.

    Args:
      text: the result of ``jax.jit(f).lower(...).compile().as_text()``.
      trip_count: trip count of loops whose count XLA did not find.

    Raises:
      ValueError: if the text has no entry computation, or a loop with collectives has an unknown trip
        count and ``trip_count`` is not given.

    Example:
      >>> text = '''HloModule f
      ... ENTRY %main (x: f32[8,4]) -> f32[16,4] {
      ...   %x = f32[8,4]{1,0} parameter(0)
      ...   ROOT %g = f32[16,4]{1,0} all-gather(%x), dimensions={0}
      ... }'''
      >>> collectives(text)
      [Collective(kind='all-gather', elements=64, times=1, name='g')]
    """
    entry, computations = _computations(text)
    return list(_walk(entry, computations, 1, trip_count))


def moved(text: str, *, trip_count: int | None = None) -> int:
    """Elements that the collectives of a program move on one device, see `collectives`."""
    return sum(each.moved for each in collectives(text, trip_count=trip_count))


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


def _computations(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
    found: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_Instruction(*match.groups()))
    if not entry:
        raise ValueError(
            "collectives: no ENTRY computation; is this the text of a compiled program?"
        )
    return entry, found


def _walk(
    name: str,
    computations: Mapping[str, list[_Instruction]],
    times: int,
    trip_count: int | None,
) -> Iterator[Collective]:
    instructions = computations.get(name, [])
    types = {each.name: each.type for each in instructions}
    for each in instructions:
        kind = each.opcode.removesuffix("-start")
        if kind in KINDS:
            yield Collective(kind, _elements(each, kind, types), times, each.name)
        elif each.opcode == "while":
            yield from _loop(each, computations, times, trip_count)
        elif each.opcode == "conditional":
            branches = [list(_walk(b, computations, times, trip_count)) for b in _branches(each)]
            yield from max(branches, key=lambda found: sum(c.moved for c in found), default=[])
        elif callee := _ONE_CALLEE.search(each.rest):
            yield from _walk(callee[1], computations, times, trip_count)


def _loop(
    loop: _Instruction,
    computations: Mapping[str, list[_Instruction]],
    times: int,
    trip_count: int | None,
) -> Iterator[Collective]:
    body = re.search(r"body=%?([\w.-]+)", loop.rest)
    known = _TRIP_COUNT.search(loop.rest)
    count = int(known[1]) if known else trip_count
    found = list(_walk(body[1], computations, times * (count or 1), trip_count)) if body else []
    if found and count is None:
        raise ValueError(
            f"collectives: the trip count of loop '{loop.name}' is not known, and its body moves data. "
            "Pass trip_count."
        )
    yield from found


def _branches(conditional: _Instruction) -> list[str]:
    if many := _BRANCHES.search(conditional.rest):
        return [name.strip().lstrip("%") for name in many[1].split(",")]
    return _TRUE_FALSE.findall(conditional.rest)


def _elements(instruction: _Instruction, kind: str, types: Mapping[str, str]) -> int:
    results = _sizes(instruction.type)
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # These return their operands first, a permute two numbers for bookkeeping last.
        half = len(results) // 2
        results = results[1:2] if kind == "collective-permute" else results[half:]
    operands = instruction.rest.partition(")")[0]
    names = re.findall(r"%?([A-Za-z_][\w.-]*)(?=,|$)", operands)
    given = [size for name in names for size in _sizes(types.get(name, ""))]
    return max(sum(results), sum(given))


def _sizes(shapes: str) -> list[int]:
    """Numbers of elements of the arrays in a type; a bound of a dynamic axis counts as its size."""
    return [
        math.prod(int(size.lstrip("<=")) for size in shape.split(",") if size)
        for shape in _SHAPE.findall(shapes)
    ]
