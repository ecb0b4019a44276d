"""The memory of this process, and of those that it ran."""

import resource
import sys
from pathlib import Path

_UNIT = 1 if sys.platform == "darwin" else 1024


def resident() -> int:
    """Bytes of memory that this process holds; the most that it ever held where no /proc says."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    return pages * resource.getpagesize()


def child_peak() -> int:
    """Bytes that the largest of the processes that ended held at most; 0 where there were none."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _UNIT
