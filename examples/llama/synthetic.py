"""Generated text with structure to learn: for tests and for runs that must repeat anywhere."""

from __future__ import annotations

import random

from examples.llama.documents import DataError, Document


def synthetic_documents(
    seed: int, count: int = 400, *, words: int = 200, lexicon: int = 400
) -> list[Document]:
    """Generates word-like text with structure for a model to learn.

    A lexicon of syllable words is drawn, and for each word four likely successors (probabilities
    .4, .2, .1, .1); one time in five the next word comes instead from the document's topic, a
    tenth of the lexicon, and now and then it is the document's own name. So there is something to
    learn at every range: spelling, bigrams, topic, and copying from far back. Only
    `random.Random.random` is used, whose sequence Python guarantees for a seed, so that the text is
    the same with every version of Python and NumPy.

    Args:
        seed: Seed of lexicon, successors and documents.
        count: Number of documents.
        words: Mean number of words of a document; lengths are uniform in half to one and a half.
        lexicon: Number of words of the language.

    Returns:
        `count` documents of about `6 * words` bytes.

    >>> synthetic_documents(0, 2) == synthetic_documents(0, 2)
    True
    >>> synthetic_documents(0, 1)[0].text[:34]
    'Ka bekas mir dovihur. Tadeves mabo'
    """
    if count < 1 or words < 2 or lexicon < 10:
        raise DataError(
            "Synthetic text needs count >= 1, words >= 2 and lexicon >= 10, got "
            f"count={count}, words={words}, lexicon={lexicon}."
        )
    draw = random.Random(seed).random

    def below(n: int) -> int:
        return int(draw() * n)

    def word() -> str:
        syllables = 1 + below(3)
        return (
            "".join("bcdfghklmnprstvz"[below(16)] + "aeiou"[below(5)] for _ in range(syllables))
            + ("", "n", "r", "s")[below(4)]
        )

    vocabulary = [word() for _ in range(lexicon)]
    successors = [[below(lexicon) for _ in range(4)] for _ in range(lexicon)]
    documents = []
    for index in range(count):
        topic = below(10) * (lexicon // 10)
        name = word().capitalize() + word()
        parts: list[str] = []
        current = topic
        start = True
        for _ in range(words // 2 + below(words + 1)):
            u = draw()
            if u < 0.8:
                current = successors[current][(u >= 0.4) + (u >= 0.6) + (u >= 0.7)]
            else:
                current = topic + below(lexicon // 10)
            text = name if u >= 0.97 else vocabulary[current]
            parts.append(text.capitalize() if start and u < 0.97 else text)
            start = draw() < 0.12
            parts.append((".\n\n" if draw() < 0.2 else ". ") if start else " ")
        documents.append(Document(f"synthetic/{seed}/{index:05d}", "".join(parts).rstrip() + "\n"))
    return documents
