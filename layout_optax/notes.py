"""What a transformation says of each parameter at init, for `describe`: what trains it, and at which rank.

States tell that only in part: SinkGD has none, and a moment in full looks alike whether a rank was meant for
it or not. So a transformation's init calls `note`; outside of `collect` that does nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple


class Note(NamedTuple):
    """What one transformation does with one parameter.

    Attributes:
      path: the parameter's.
      transformation: the name to print.
      rank: of its factors, or why there are none; empty where ranks do not apply.
      state: name of the state's class that the note speaks for: ``low_rank`` of ``LowRankState``.
    """

    path: str
    transformation: str
    rank: str = ""
    state: str = ""


_NOTES: contextvars.ContextVar[list[Note] | None] = contextvars.ContextVar("notes", default=None)


def note(path: str, transformation: str, rank: str = "", state: str = "") -> None:
    """Says what a transformation does with a parameter; see `Note`."""
    notes = _NOTES.get()
    if notes is not None:
        notes.append(Note(path, transformation, rank, state))


@contextlib.contextmanager
def collect() -> Iterator[list[Note]]:
    """Collects what is noted inside.

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
