"""Counts reads and writes of parameter-sized arrays by a compiled program, from its HLO.

XLA's fusions keep intermediate values in registers, so the inputs and outputs of each operation of a scheduled
program are its memory traffic, except for what a cache holds between two of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "iota"),
    *("after-all", "partition-id", "copy-done", "async-done", "async-update"),
}
"""Operations that move nothing, or that another one counts."""
PRODUCTS = {"dot", "convolution"}

Shape = tuple[str, int]
"""Dtype and number of elements of an array."""


@dataclass(frozen=True)
class Move:
    """An operation that reads or writes large arrays.

    Attributes:
        name: The operation's name in the program.
        product: Whether it is, or holds, a matrix product.
        times: Number of executions, by the trip counts of the enclosing loops.
        reads: Bytes of each large array that it reads.
        writes: Bytes of each large array that it writes.
        sources: Names of the large arrays that it reads.
    """

    name: str
    product: bool
    times: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation:
    """A line of HLO."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, key: str) -> list[str]:
        """The computations named by an attribute."""
        found = re.search(rf"{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        if not found:
            return []
        return [name.strip().lstrip("%") for name in (found[1] or found[2]).split(",")]


@dataclass
class Program:
    """The computations of a module by name, and the entry's name."""

    computations: dict[str, dict[str, Operation]] = field(default_factory=dict)
    entry: str = ""


def moves(text: str, elements: int) -> list[Move]:
    """All operations of a scheduled HLO module that touch arrays of at least this many elements.

    Of a conditional the branch with the least traffic counts. A loop of unknown trip count counts once. If a
    fusion reads only a slice of an array, or writes a slice in place, the size of the slice counts.

    Args:
        text: `compiled.as_text()`.
        elements: The smallest size of an array that counts.
    """
    program = parse(text)
    return list(_moves(program, program.entry, elements, 1))


def reads(found: list[Move]) -> int:
    """Number of large arrays read in total."""
    return sum(move.times * len(move.reads) for move in found)


def writes(found: list[Move]) -> int:
    """Number of large arrays written in total."""
    return sum(move.times * len(move.writes) for move in found)


def moved_bytes(found: list[Move]) -> int:
    """Bytes of large arrays that are read or written."""
    return sum(move.times * (sum(move.reads) + sum(move.writes)) for move in found)


def parse(text: str) -> Program:
    """The operations of a module."""
    program, current = Program(), None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if head:
            current = program.computations.setdefault(head[2], {})
            if head[1]:
                program.entry = head[2]
        elif current is not None and (found := _operation(line)):
            current[found.name] = found
    return program


def _operation(line: str) -> Operation | None:
    start = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not start:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[start.end() :])
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode = rest[: rest.index("(")]
    rest = rest[len(opcode) :]
    end = _closing(rest)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    if opcode == "parameter":
        operands = (rest[1 : end - 1],)
    shapes = tuple(
        (dtype, math.prod(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", kind)
    )
    return Operation(start[2], opcode, shapes, operands, rest[end:], bool(start[1]))


def _closing(text: str) -> int:
    """The position after the parenthesis that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"traffic: no closing parenthesis in {text[:80]!r}.")


def _moves(program: Program, name: str, elements: int, times: int) -> Iterator[Move]:
    operations = program.computations[name]
    for op in operations.values():
        if op.opcode in FREE:
            continue
        if op.opcode == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', op.attributes)
            inner = times * (int(trips[1]) if trips else 1)
            for body in op.called("body"):
                yield from _moves(program, body, elements, inner)
        elif op.opcode == "conditional":
            names = op.called("branch_computations") or [
                *op.called("true_computation"),
                *op.called("false_computation"),
            ]
            branches = [list(_moves(program, each, elements, times)) for each in names]
            yield from min(branches, key=moved_bytes)
        elif op.opcode == "call" or op.opcode.startswith("async"):
            for called in op.called("to_apply") + op.called("calls"):
                yield from _moves(program, called, elements, times)
        else:
            yield from _move(program, operations, op, elements, times)


def _move(
    program: Program, operations: dict[str, Operation], op: Operation, elements: int, times: int
) -> Iterator[Move]:
    arrays = [shape for name in op.operands for shape in operations[name].shapes]
    results = list(op.shapes)
    inside: dict[str, Operation] = {}
    if op.opcode == "fusion":
        inside = program.computations[op.called("calls")[0]]
        arrays = [shape for shape in map(_read_of(inside), range(len(op.operands))) if shape]
        results = _written(inside)
    elif op.opcode in ("dynamic-slice", "slice"):
        arrays = results
    elif op.opcode == "dynamic-update-slice":
        arrays = results = list(operations[op.operands[1]].shapes)
    large = lambda shapes: tuple(  # noqa: E731
        BYTES[dtype] * size for dtype, size in shapes if size >= elements and dtype in BYTES
    )
    read, written = large(arrays), large(results)
    sources = tuple(name for name in op.operands if large(operations[name].shapes))
    if read or written:
        product = any(each.opcode in PRODUCTS for each in (op, *inside.values()))
        # Libraries' products: cuBLAS on a GPU, Eigen and oneDNN on a CPU.
        product |= op.opcode == "custom-call" and bool(re.search("cublas|matmul", op.attributes))
        yield Move(op.name, product, times, read, written, sources)


def _read_of(inside: dict[str, Operation]):
    """The part of an operand that a fusion reads: all of it, slices of it, or nothing."""

    def read(number: int) -> Shape | None:
        parameter = next(
            op
            for op in inside.values()
            if op.opcode == "parameter" and op.operands == (str(number),)
        )
        users = [op for op in inside.values() if parameter.name in op.operands]
        opcodes = {op.opcode for op in users if op.operands[0] == parameter.name}
        if len(opcodes) == 1 and all(op.operands[0] == parameter.name for op in users):
            if opcodes <= {"dynamic-slice", "slice"}:
                return max((op.shapes[0] for op in users), key=lambda shape: shape[1])
            if opcodes == {"dynamic-update-slice"}:
                return None
        return parameter.shapes[0]

    return read


def _written(inside: dict[str, Operation]) -> list[Shape]:
    """The arrays that a fusion writes: its results, or the slices that it changes in place."""
    root = next(op for op in inside.values() if op.is_root)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    shapes: list[Shape] = []
    for result in results:
        while result.opcode in ("bitcast", "copy") and result.operands:
            result = inside[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            result = inside[result.operands[1]]
        shapes += result.shapes
    return shapes
