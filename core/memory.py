"""Memory of a process that trains: what tensors gave back is used again instead of being fetched anew in every step."""

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST = 2**31 - 1
MMAP_THRESHOLDS = (2**25, 2**30)  # in bytes; older releases of glibc take no more than the first


@cache
def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, once and for all; whether the C library can be told to (glibc can).

    Tensors of a step would otherwise be mapped, filled with zeros page by page, and unmapped again, which took about a fifth of
    the time of a step of the small encoder (`python -m simulations.speed steps`). The process stays as large as its largest step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    taken = [mallopt(M_MMAP_THRESHOLD, threshold) for threshold in MMAP_THRESHOLDS]
    return bool(mallopt(M_TRIM_THRESHOLD, MOST) and any(taken))
