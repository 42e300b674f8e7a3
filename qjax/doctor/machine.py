"""Checks of processors and folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pallas_kernels.user_cache import cache_folder
from qjax.doctor.finding import Finding, Surroundings

THREADS = "QJAX_NUM_THREADS"
_LEAST_FREE = 500_000_000  # bytes of disk: a small model and what is compiled for it


def quota(around: Surroundings) -> float | None:
    """Processors that a container may use together, by its cgroup (version 2 or 1); None: all."""
    text = around.read("sys/fs/cgroup/cpu.max")
    if text is not None:
        parts = text.split()
    else:
        group = "sys/fs/cgroup/cpu/cpu.cfs_"
        parts = [(around.read(f"{group}{name}_us") or "").strip() for name in ("quota", "period")]
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or int(parts[1]) == 0:
        return None  # "max", or -1
    return int(parts[0]) / int(parts[1])


def cores(around: Surroundings) -> int | None:
    """Physical cores that Linux knows; None where it does not say."""
    found = {
        path.read_text().strip()
        for path in (around.root / "sys/devices/system/cpu").glob(
            "cpu[0-9]*/topology/thread_siblings_list"
        )
    }
    return len(found) or None


def threads(around: Surroundings) -> Iterator[Finding]:
    """QJAX_NUM_THREADS, a container's quota, and hyperthreads."""
    text = around.environ.get(THREADS)
    count = int(text) if text and text.strip().isdigit() else 0
    if text and count < 1:
        yield Finding(
            THREADS,
            f"{text!r:.40} is no number of threads, and {around.processors} are used",
            f"unset {THREADS}, or set it to a number from 1 to {around.processors}",
        )
    elif count > around.processors:
        yield Finding(
            THREADS,
            f"{count} threads share {around.processors} processors and wait for each other",
            f"set {THREADS}={around.processors}, or unset it",
        )
    elif text and count < around.processors:
        yield Finding(
            THREADS,
            f"kernels use {count} of {around.processors} processors",
            f"unset {THREADS} to use all",
            fault=False,
        )
    limit, used = quota(around), count or around.processors
    if limit is not None and limit < min(used, around.processors):
        yield Finding(
            "processor quota",
            f"the container may use {limit:g} processors, and kernels run {used} threads: they are "
            "stopped again and again",
            f"set {THREADS}={max(1, int(limit))}, or raise the quota",
        )
    physical = cores(around)
    if physical is not None and around.processors > physical and not count:
        yield Finding(
            "hyperthreads",
            f"{around.processors} processors are {physical} cores: two threads of one core share "
            "its arithmetic and its caches",
            f"try {THREADS}={physical}, and compare with `qjax bench`",
            fault=False,
        )


def folders(around: Surroundings) -> Iterator[Finding]:
    """Whether models and compiled programs can be kept."""
    own = cache_folder()
    yield from folder("cache", own, "QJAX_CACHE")
    text = around.environ.get("HF_HOME")
    if text:
        yield from folder("HF_HOME", Path(text).expanduser(), "HF_HOME")


def folder(name: str, path: Path, variable: str) -> Iterator[Finding]:
    """Whether files can be written there, and room is left."""
    parent = path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        yield Finding(
            name,
            f"{path} cannot be written: models are not kept, and programs compiled at each start",
            f"set {variable} to a folder that can, or give yourself the right to write there",
        )
        return
    free = shutil.disk_usage(parent).free
    if free < _LEAST_FREE:
        yield Finding(
            name,
            f"{free / 1e6:,.0f} MB are free on the disk of {path}: downloads and compiled programs "
            "may not fit",
            f"make room there, or set {variable} to a folder on another disk",
        )
