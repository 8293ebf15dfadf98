"""Notes that a transformation makes on each parameter at init: what trains it, and at which rank.

`describe` needs them, because states tell only part of it: SinkGD has no state, and a full moment does not
show whether a rank was given. Outside of `collect`, `note` does nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple


class Note(NamedTuple):
    """The treatment of one parameter by one transformation.

    Attributes:
      path: the parameter's path.
      transformation: the name to print.
      rank: the rank of the factors, or the reason why there are none; empty if ranks do not apply.
      state: name of the state class that the note covers: ``low_rank`` for ``LowRankState``.
    """

    path: str
    transformation: str
    rank: str = ""
    state: str = ""


_NOTES: contextvars.ContextVar[list[Note] | None] = contextvars.ContextVar("notes", default=None)


def note(path: str, transformation: str, rank: str = "", state: str = "") -> None:
    """Records what a transformation does with a parameter; see `Note`."""
    notes = _NOTES.get()
    if notes is not None:
        notes.append(Note(path, transformation, rank, state))


@contextlib.contextmanager
def collect() -> Iterator[list[Note]]:
    """Collects the notes made inside the context.

    Example:
      >>> with collect() as notes:
      ...     note("up/kernel", "sinkgd")
      >>> notes[0].path, notes[0].transformation
      ('up/kernel', 'sinkgd')
    """
    notes: list[Note] = []
    token = _NOTES.set(notes)
    try:
        yield notes
    finally:
        _NOTES.reset(token)
