"""Keeps freed memory in the process, so that XLA:CPU does not fault its temporaries in anew at every step."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt(3), from <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_OPTIONS = {
    _M_MMAP_MAX: 0,  # large blocks come from the heap, not from mmap, which gives them back when freed
    _M_TRIM_THRESHOLD: -1,  # and the heap never shrinks
    _M_TOP_PAD: 2**26,
    _M_ARENA_MAX: 1,  # other arenas are mapped, and too small for such blocks
}


def keep_freed_memory() -> bool:
    """Tells the C library to keep what is freed, for the rest of the process.

    XLA:CPU allocates a program's temporaries at every call. glibc maps blocks of that size and unmaps them when
    they are freed, so that each step waits for zeroed pages from the system: with SAGE-Hybrid on a Llama of 60M
    57,000 page faults, over half the time of the update (docs/results/step_time.md). The process then holds
    its peak until it ends. Accelerators have pools of their own; there this only concerns the host.

    Returns:
        Whether the C library took the options; others than glibc have none and are left as they are.

    >>> keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    True
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(option, value) == 1 for option, value in _OPTIONS.items()]
    return all(taken)


def release_freed_memory() -> None:
    """Gives back, once, what was freed and kept: memory that counts as taken for whoever asks the system.

    >>> release_freed_memory()
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
