"""The Python snippets of a Markdown page, and running them in order as a reader would."""

from __future__ import annotations

import pathlib
import re
from typing import Any


def snippets(text: str) -> list[str]:
    """The fenced Python blocks of a Markdown text."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_page(path: pathlib.Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Executes the snippets of a page one after the other; returns what they defined.

    Args:
      path: the page.
      names: what the page takes for granted.
    """
    names = {"__name__": f"page:{path.name}", **(names or {})}
    for snippet in snippets(path.read_text()):
        exec(compile(snippet, path.name, "exec", dont_inherit=True), names)
    return names
