"""Keeps freed memory in the process, so that XLA:CPU does not page-fault its temporaries at every step."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt(3), from <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_OPTIONS = {
    _M_MMAP_MAX: 0,  # large blocks come from the heap, not from mmap, which returns them when freed
    _M_TRIM_THRESHOLD: -1,  # and the heap never shrinks
    _M_TOP_PAD: 2**26,
    _M_ARENA_MAX: 1,  # other arenas are mapped, and too small for such blocks
}


def keep_freed_memory() -> bool:
    """Tells the C library to keep freed memory for the rest of the process.

    XLA:CPU allocates a program's temporaries at every call. glibc maps blocks of that size and unmaps them when
    they are freed, so each step waits for zeroed pages from the system. With SAGE-Hybrid on a Llama of 60M
    these are 57,000 page faults, over half the time of the update (docs/results/step_time.md). The process then
    holds its peak memory until it ends. Accelerators have their own pools; there this only concerns the host.

    Returns:
        Whether the C library took the options; libraries other than glibc have none and do not change.

    >>> keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    True
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(option, value) == 1 for option, value in _OPTIONS.items()]
    return all(taken)


def release_freed_memory() -> None:
    """Returns freed memory to the system once; otherwise the system counts it as used.

    >>> release_freed_memory()
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
