"""Where files that this machine made or fetched for its user lie."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$QJAX_CACHE, else $XDG_CACHE_HOME/qjax, else ~/.cache/qjax."""
    if own := os.environ.get("QJAX_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "qjax"
