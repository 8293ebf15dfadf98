"""Makes a file of tokens from the text of this interpreter's packages; needs the trainer's packages.

    python -m benchmarks.tokens.make tokens.npz --vocab-size 8192 --tokens 30e6

Text files of the installed packages and of the standard library, each text once, in an order that the seed
and the text alone decide; the first documents are held out. A byte-level BPE is trained on all of it. The
file holds both sides, their hash and what they were made from, and travels to a machine without that text.
`--folder` names other folders.
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from benchmarks.tokens.file import Tokens, save_tokens

SUFFIXES = frozenset({".py", ".md", ".rst", ".txt", ".markdown"})
LONGEST = 500_000
"""Bytes of the largest file that is read: larger ones are tables, not text."""
_CHUNK = 64
"""Documents that are encoded at a time."""


def installed_folders() -> list[pathlib.Path]:
    """The folders of the standard library and of the installed packages, each once."""
    names = ("stdlib", "purelib", "platlib")
    found = [pathlib.Path(sysconfig.get_path(name)).resolve() for name in names]
    # A folder inside another one (site-packages in the standard library's) is read with it.
    unique = list(dict.fromkeys(found))
    return [
        one for one in unique if not any(other in one.parents for other in unique if other != one)
    ]


def read_texts(folders: Iterable[pathlib.Path]) -> Iterator[str]:
    """The text of every file of `SUFFIXES` below the folders; what is not UTF-8 is passed over."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                continue
            if path.stat().st_size > LONGEST:
                continue
            try:
                text = path.read_text(encoding="utf-8-sig")
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip():
                yield text


def shuffled(texts: Iterable[str], seed: int) -> list[str]:
    """Each text once, ordered by a hash of seed and text: the same whatever the order that they came in.

    >>> shuffled(["b", "a", "b", "c"], 0) == shuffled(["c", "b", "a"], 0)
    True
    """
    found = {hashlib.sha256(f"{seed}:{text}".encode()).digest(): text for text in texts}
    return [found[key] for key in sorted(found)]


def make_tokens(
    path: pathlib.Path,
    folders: Sequence[pathlib.Path],
    *,
    vocab_size: int = 8192,
    tokens: int = 30_000_000,
    heldout: int = 1_000_000,
    seed: int = 0,
) -> Tokens:
    """Reads, tokenizes and writes; documents are whole, so that both sides may be a little longer.

    Args:
        path: The file to write.
        folders: Where the text is.
        vocab_size: Of the tokenizer that is trained on the text.
        tokens: Training tokens wanted; less text gives fewer.
        heldout: Held-out tokens.
        seed: Of the documents' order.

    Raises:
        ValueError: There is too little text to hold out so much of it.
    """
    from examples.llama.data.documents import Document
    from examples.llama.data.tokenizer import (
        encode_documents,
        separator_id,
        tokenizer_sha256,
        train_tokenizer,
    )

    documents = [Document(str(n), t) for n, t in enumerate(shuffled(read_texts(folders), seed))]
    tokenizer = train_tokenizer(documents, vocab_size)
    separator = separator_id(tokenizer)
    ends = [] if separator is None else [separator]
    sides: dict[str, list[np.ndarray]] = {"heldout": [], "train": []}
    counts = {"heldout": 0, "train": 0}
    wanted = {"heldout": heldout, "train": tokens}
    used = 0
    for start in range(0, len(documents), _CHUNK):
        if counts["train"] >= tokens:
            break
        chunk = documents[start : start + _CHUNK]
        found, lengths = encode_documents(chunk, tokenizer)
        for part in np.split(found, np.cumsum(lengths)[:-1]):
            side = "heldout" if counts["heldout"] < heldout else "train"
            if counts[side] >= wanted[side]:
                break
            piece = np.concatenate([part, np.asarray(ends, part.dtype)])
            sides[side].append(piece)
            counts[side] += len(piece)
            used += 1
    if not sides["train"]:
        raise ValueError(
            f"{len(documents)} documents hold {counts['heldout']} tokens: too few to hold out {heldout} "
            "and to train; name more folders or hold out less"
        )
    text = hashlib.sha256("\0".join(d.text for d in documents[:used]).encode()).hexdigest()
    about = {
        "documents": used,
        "seed": seed,
        "vocab_size": vocab_size,
        "corpus_sha256": text,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "python": sys.version.split()[0],
    }
    return save_tokens(
        path, np.concatenate(sides["train"]), np.concatenate(sides["heldout"]), about
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Args:
        arguments: command line, without the program's name.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=pathlib.Path, help="the .npz file to write")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--tokens", type=float, default=30e6, help="to train on")
    parser.add_argument("--heldout", type=float, default=1e6, help="tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, action="append", help="instead of packages")
    options = parser.parse_args(arguments)
    made = make_tokens(
        options.path,
        options.folder or installed_folders(),
        vocab_size=options.vocab_size,
        tokens=int(options.tokens),
        heldout=int(options.heldout),
        seed=options.seed,
    )
    print(
        f"{options.path}: {len(made.train):,} tokens and {len(made.heldout):,} held out of "
        f"{made.about['documents']:,} documents, hash {made.sha256[:12]}"
    )


if __name__ == "__main__":
    main()
