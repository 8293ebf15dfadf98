"""A file of tokens with its hash, and the windows and batches that are cut from it."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tokens:
    """Both sides of a corpus.

    Attributes:
        train: 1-D array of token ids.
        heldout: Likewise.
        sha256: Hash of both.
        about: What the file was made from.
    """

    train: np.ndarray = field(repr=False)
    heldout: np.ndarray = field(repr=False)
    sha256: str
    about: Mapping[str, Any]

    @property
    def largest(self) -> int:
        """The largest token id of both sides."""
        return max(int(self.train.max()), int(self.heldout.max()))


def tokens_sha256(train: np.ndarray, heldout: np.ndarray) -> str:
    """SHA-256 over the lengths and the ids of both sides, whatever their dtype.

    >>> a = np.arange(4, dtype=np.uint16)
    >>> tokens_sha256(a, a) == tokens_sha256(a.astype(np.int32), a)
    True
    >>> tokens_sha256(a, a[:2]) == tokens_sha256(a[:2], a)
    False
    """
    digest = hashlib.sha256()
    for side in (train, heldout):
        digest.update(len(side).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(side, "<u4").tobytes())
    return digest.hexdigest()


def save_tokens(
    path: pathlib.Path, train: np.ndarray, heldout: np.ndarray, about: Mapping[str, Any]
) -> Tokens:
    """Writes a file of tokens, compressed, with its hash and what it was made from."""
    sha256 = tokens_sha256(train, heldout)
    np.savez_compressed(
        path, train=train, heldout=heldout, sha256=sha256, about=json.dumps(dict(about))
    )
    return Tokens(train, heldout, sha256, about)


def load_tokens(path: pathlib.Path) -> Tokens:
    """Reads a file of tokens.

    Raises:
        ValueError: Its tokens are not those that its hash was made from, or a side is missing or empty.
    """
    with np.load(path) as file:
        sides = {name: file[name] for name in ("train", "heldout") if name in file}
        stored = str(file["sha256"]) if "sha256" in file else None
        about = json.loads(str(file["about"])) if "about" in file else {}
    for name in ("train", "heldout"):
        if name not in sides or not sides[name].size:
            raise ValueError(
                f"{path}: no tokens under {name!r}; make it with benchmarks.tokens.make"
            )
    found = tokens_sha256(sides["train"], sides["heldout"])
    if stored is not None and stored != found:
        raise ValueError(f"{path}: the tokens do not have the stored hash; make the file again")
    return Tokens(sides["train"], sides["heldout"], found, about)


def windows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """All windows of `seq_len` predicted tokens; neighbours share a token.

    >>> windows(np.arange(10), 4).tolist()
    [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    """
    count = (len(tokens) - 1) // seq_len
    starts = seq_len * np.arange(count)[:, None]
    return tokens[starts + np.arange(seq_len + 1)].astype(np.int32)


def batches(found: np.ndarray, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of windows in a seeded order, another one in each epoch; none is filled across epochs.

    Raises:
        ValueError: There are fewer windows than a batch takes.
    """
    if len(found) < batch_size:
        raise ValueError(f"{len(found)} windows do not fill a batch of {batch_size}")
    rng, taken = np.random.default_rng(seed), 0
    while taken < steps:
        order = rng.permutation(len(found))
        for start in range(0, len(found) - batch_size + 1, batch_size):
            if taken == steps:
                return
            taken += 1
            yield found[order[start : start + batch_size]]
