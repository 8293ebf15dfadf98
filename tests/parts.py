"""The tests in parts, so that continuous integration can run another one at each commit."""

from collections.abc import Sequence


def part_of(nodeids: Sequence[str], part: int, parts: int) -> set[str]:
    """The tests of one of several parts, numbered from 1: whole files, dealt out in turn.

    No part is empty while there are as many files as parts.

    >>> nodeids = ["a.py::test_1", "b.py::test_1", "b.py::test_2", "c.py::test_1"]
    >>> [sorted(part_of(nodeids, part, 2)) for part in (1, 2)]
    [['a.py::test_1', 'c.py::test_1'], ['b.py::test_1', 'b.py::test_2']]
    """
    files = sorted({nodeid.partition("::")[0] for nodeid in nodeids})[part - 1 :: parts]
    return {nodeid for nodeid in nodeids if nodeid.partition("::")[0] in files}
