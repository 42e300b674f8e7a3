"""What a check looks at, and what it finds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """Something to know.

    Attributes:
      name: of what it is about, a word or two.
      what: how it is, and what that costs.
      do: what would change it.
      fault: whether something is broken or needlessly slow; else it may be meant so.
    """

    name: str
    what: str
    do: str
    fault: bool = True


@dataclass(frozen=True)
class Surroundings:
    """Attributes:
    environ: environment variables.
    root: of the file system.
    processors: that this process may run on.
    """

    environ: Mapping[str, str]
    root: Path
    processors: int

    def read(self, path: str) -> str | None:
        """A small file's text, path from the root; None where it cannot be read."""
        try:
            return (self.root / path).read_text()
        except (OSError, UnicodeDecodeError):
            return None


def here() -> Surroundings:
    """Those of this process."""
    own = getattr(os, "sched_getaffinity", None)
    count = len(own(0)) if own is not None else os.cpu_count() or 1
    return Surroundings(os.environ, Path("/"), count)
