"""Hides messages of Orbax, TensorStore and asyncio about errors that this program reports itself."""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

_LOGGERS = ("absl", "asyncio", "orbax", "orbax.checkpoint")

# Their background threads and coroutines; their errors are raised again where a save or a restore waits.
_SOURCES = ("orbax", "tensorstore", "asyncio", "coroutine")


def quiet_orbax() -> None:
    """Hides Orbax's logs, and tracebacks of threads and coroutines whose errors are also raised elsewhere.

    Its warnings concern intended behaviour (a read-only folder, a save that waits for the last), and its errors
    are raised where the training waits for the save. A second call changes nothing.
    """
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    if not getattr(sys.unraisablehook, "_quiet", False):
        sys.unraisablehook = _quieter(sys.unraisablehook, _of_coroutine)
        threading.excepthook = _quieter(threading.excepthook, _of_thread)


def _quieter(show: Any, theirs: Any) -> Any:
    def hook(found: Any) -> None:
        if not theirs(found):
            show(found)

    hook._quiet = True  # pyright: ignore[reportFunctionMemberAccess]
    return hook


def _of_coroutine(found: Any) -> bool:
    """Whether an unraisable exception comes from a coroutine that an aborted restore left behind."""
    text = f"{type(found.object).__name__} {found.object!r} {found.err_msg or ''}".lower()
    return (
        any(source in text for source in _SOURCES)
        or "event loop is closed" in str(found.exc_value).lower()
    )


def _of_thread(found: Any) -> bool:
    """Whether an exception ended one of Orbax's threads."""
    trace = found.exc_traceback
    while trace is not None:
        if any(source in trace.tb_frame.f_code.co_filename for source in ("orbax", "asyncio")):
            return True
        trace = trace.tb_next
    return False
