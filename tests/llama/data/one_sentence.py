"""What every error about data has to be: a DataError whose message is one plain sentence."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

from examples.llama.data.documents import DataError


@contextlib.contextmanager
def one_sentence(match: str) -> Iterator[None]:
    """Expects a DataError that says `match` (literally), in one line that ends with a full stop."""
    with pytest.raises(DataError, match=re.escape(match)) as caught:
        yield
    message = str(caught.value)
    assert message.endswith(".")
    assert not message.endswith("..")
    assert "\n" not in message
