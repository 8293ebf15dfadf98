"""A small model of what an accelerator reads and writes of large arrays, on a traced function.

XLA's rules on CUDA and TPU, as far as the optimizers go (docs/results/ahead.md has the compilers' own
counts): element-wise work is never written but where a barrier, a loop, a product or the end needs an array. A
sum reads what its operand is made of. Sums side by side that read the same arrays are one kernel. A
product reads and writes arrays. A loop works out in front of it what is the same in every round. XLA:CPU has
other rules, so its programs cannot be counted instead.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from benchmarks.accelerators.traffic import Move, moved_bytes

CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "shard_map"}
RENAMINGS = {"reshape", "squeeze", "expand_dims", "transpose", "copy", "sharding_constraint"}
PRODUCTS = {"dot_general", "triangular_solve", "cholesky"}


@dataclasses.dataclass(frozen=True)
class Value:
    """An array.

    Attributes:
        sources: The large arrays in memory that it is made of; itself alone where it is one.
        bytes: Its size, 0 for a small one.
        written: Whether it is in memory.
        level: How many kernels come before it, one after the other.
        invariant: Whether it is the same in every round of the loop around it.
        key: Equal for values that are computed in the same way from the same arrays: XLA makes them once.
        narrow: The array that this one holds in a wider dtype.
    """

    sources: frozenset[int] = frozenset()
    bytes: int = 0
    written: bool = True
    level: int = 0
    invariant: bool = False
    key: Hashable = None
    narrow: Value | None = None


class Model:
    """Counts the moves of arrays of at least ``elements`` elements."""

    def __init__(self, elements: int, platform: str = "cuda"):
        self.elements, self.platform = elements, platform
        self.moves: list[Move] = []
        self.sizes: list[int] = []
        self.times = 1
        self.beside: set[tuple[frozenset[int], int, int]] = set()
        self.stored: dict[Hashable, Value] = {}
        self.keys = itertools.count()

    def count(self, function: Callable[..., Any], *args: Any) -> list[Move]:
        """The moves of a function of arrays or shapes."""
        closed = jax.make_jaxpr(function)(*args)
        for value in self.run(closed.jaxpr, [self.array(v.aval) for v in closed.jaxpr.invars]):
            self.materialise(value, "output")
        return self.moves

    def run(self, jaxpr: Jaxpr, inputs: Sequence[Value]) -> list[Value]:
        """Values of the outputs of a jaxpr."""
        known: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable in jaxpr.constvars:
            known[variable] = self.array(variable.aval)
        read = lambda atom: (  # noqa: E731
            Value(invariant=True, key=str(atom)) if isinstance(atom, Literal) else known[atom]
        )
        for eqn in jaxpr.eqns:
            values = self.equation(eqn, [read(atom) for atom in eqn.invars])
            known.update(zip(eqn.outvars, values, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def size(self, aval: Any) -> int:
        """Bytes of a large array, 0 for others."""
        large = math.prod(aval.shape) >= self.elements
        return math.prod(aval.shape) * aval.dtype.itemsize if large else 0

    def array(self, aval: Any, level: int = 0) -> Value:
        """A new array in memory."""
        size = self.size(aval)
        if not size:
            return Value(level=level, key=next(self.keys))
        self.sizes.append(size)
        return Value(frozenset([len(self.sizes) - 1]), size, True, level, key=next(self.keys))

    def materialise(self, value: Value, name: str) -> Value:
        """The array in memory, which is written first where it is not there."""
        if value.written:
            return value
        if (self.times, value.key) not in self.stored:
            self.move(name, value.sources, (value.bytes,))
            self.sizes.append(value.bytes)
            fresh = frozenset([len(self.sizes) - 1])
            self.stored[self.times, value.key] = dataclasses.replace(
                value, sources=fresh, written=True, level=value.level + 1, key=next(self.keys)
            )
        return self.stored[self.times, value.key]

    def move(
        self, name: str, sources: frozenset[int], writes: tuple[int, ...], product: bool = False
    ) -> None:
        """Notes a kernel."""
        read = tuple(self.sizes[place] for place in sorted(sources))
        if read or writes:
            self.moves.append(Move(name, product, self.times, read, writes))

    def equation(self, eqn: Any, inputs: list[Value]) -> list[Value]:
        """Values of an equation's outputs."""
        name, params = eqn.primitive.name, eqn.params
        avals = [variable.aval for variable in eqn.outvars]
        if name in CALLS:
            inner = params.get("jaxpr") or params.get("call_jaxpr")
            return self.run(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner, inputs)
        if name == "cond":
            return self.branch(params, inputs[1:])
        if name == "scan":
            return self.loop(params, inputs, avals)
        if name == "while":
            return self.unknown_loop(params, inputs)
        level = max((value.level for value in inputs), default=0)
        if name == "optimization_barrier":
            # Tied to what changes, so that no loop works out in front of it what comes after.
            inputs = [self.materialise(value, name) for value in inputs]
            return [dataclasses.replace(v, invariant=False, level=level) for v in inputs]
        if name in PRODUCTS:
            return self.product(inputs, avals)
        if (
            name == "reduce" and len(avals) > 1
        ):  # several results at once: XLA:CUDA writes its operands
            inputs = [self.materialise(value, name) for value in inputs]
        sources = frozenset[int]().union(*(value.sources for value in inputs))
        if sources and not any(map(self.size, avals)):
            if (sources, level, self.times) not in self.beside:
                self.move("reduction", sources, ())
            self.beside.add((sources, level, self.times))
            level += 1
        return [self.element_wise(eqn, inputs, aval, sources, level) for aval in avals]

    def product(self, inputs: list[Value], avals: Sequence[Any]) -> list[Value]:
        """Reads arrays and writes arrays."""
        operands = [self.materialise(value, "operand of a product") for value in inputs]
        sources = frozenset[int]().union(*(each.sources for each in operands))
        level = 1 + max(each.level for each in operands)
        self.move("product", sources, tuple(filter(None, map(self.size, avals))), product=True)
        return [self.array(aval, level) for aval in avals]

    def element_wise(
        self, eqn: Any, inputs: list[Value], aval: Any, sources: frozenset[int], level: int
    ) -> Value:
        """A value that is not written, but for one that a loop can work out in front of it."""
        size = self.size(aval)
        invariant = all(value.invariant for value in inputs)
        key = (str(eqn.primitive), str(eqn.params), tuple(value.key for value in inputs))
        if not size:
            return Value(level=level, invariant=invariant, key=next(self.keys))
        if eqn.primitive.name == "convert_element_type":
            (whole,) = inputs
            if whole.narrow is not None and whole.narrow.bytes == size:
                return whole.narrow
            if whole.written and size > whole.bytes and not whole.invariant:
                return Value(sources, size, False, level, invariant, key, whole)
        if eqn.primitive.name in RENAMINGS and sources:
            return next(dataclasses.replace(v, level=level) for v in inputs if v.sources)
        value = Value(sources, size, False, level, invariant, key)
        if not (invariant and sources):
            return value
        times, self.times = self.times, 1
        value = self.materialise(value, "in front of a loop")
        self.times = times
        return value

    def branch(self, params: Any, inputs: list[Value]) -> list[Value]:
        """The platform's branch, or else the one that moves least."""
        branches, platforms = params["branches"], params.get("branches_platforms")
        if platforms:
            named = [names is None or self.platform in names for names in platforms]
            return self.run(branches[named.index(True)].jaxpr, inputs)
        start, kept = len(self.moves), []
        stored, beside = self.stored, self.beside
        for branch in branches:
            self.stored, self.beside = dict(stored), set(beside)
            outputs = [self.materialise(v, "branch") for v in self.run(branch.jaxpr, inputs)]
            kept.append((self.moves[start:], outputs))
            del self.moves[start:]
        self.stored, self.beside = stored, beside
        found, outputs = min(kept, key=lambda each: moved_bytes(each[0]))
        self.moves += found
        return outputs

    def loop(self, params: Any, inputs: list[Value], avals: Sequence[Any]) -> list[Value]:
        """A scan: constants and what it carries are in memory, and slices are read and written."""
        if "ft_in" in params:  # JAX 0.12
            constants, carried = (len(part) for part in params["ft_in"].unpack()[:2])
        else:
            constants, carried = params["num_consts"], params["num_carry"]
        inputs = [self.materialise(value, "loop") for value in inputs]
        level = 1 + max((value.level for value in inputs), default=0)
        body = params["jaxpr"].jaxpr
        start = [
            dataclasses.replace(value, invariant=place < constants, level=level)
            for place, value in enumerate(inputs[: constants + carried])
        ]
        start += [self.array(v.aval, level) for v in body.invars[constants + carried :]]
        times, self.times = self.times, self.times * params["length"]
        outputs = [self.materialise(value, "loop") for value in self.run(body, start)]
        self.times = times
        level = 1 + max((value.level for value in outputs), default=level)
        outputs = [dataclasses.replace(value, level=level) for value in outputs[:carried]]
        return outputs + [self.array(aval, level) for aval in avals[carried:]]

    def unknown_loop(self, params: Any, inputs: list[Value]) -> list[Value]:
        """A while loop, as if it ran once."""
        inputs = [self.materialise(value, "loop") for value in inputs[params["cond_nconsts"] :]]
        outputs = self.run(params["body_jaxpr"].jaxpr, inputs)
        return [self.materialise(value, "loop") for value in outputs]
