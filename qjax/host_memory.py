"""How much memory of the host is free."""

from __future__ import annotations

from pathlib import Path

_GROUP = "sys/fs/cgroup"
# Of a container's group, version 2 and 1: the limit, what is used, and statistics of it.
_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def available(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping: of the machine, and of the container if less; None
    where the system does not tell.

    Args:
      root: of the file system.
    """
    try:
        text = (root / "proc/meminfo").read_text()
        amounts = [int(text.split("MemAvailable:")[1].split()[0]) * 1024]
    except (OSError, IndexError, ValueError):
        return None
    for names in _FILES:
        limit, current, statistics = (root / _GROUP / name for name in names)
        try:
            used = int(current.read_text()) - _given_up(statistics)
            amounts.append(max(0, int(limit.read_text()) - used))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return min(amounts)


def _given_up(statistics: Path) -> int:
    """Bytes of pages of files, which give way before a limit is met."""
    try:
        words = statistics.read_text().split()
        return int(words[words.index("inactive_file") + 1])
    except (OSError, ValueError, IndexError):
        return 0
