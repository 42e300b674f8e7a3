"""Checks of what is installed: versions, extras, and the hub's settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from qjax.doctor.finding import Finding, Surroundings

EXTRAS = {
    "server": (
        ("starlette", "uvicorn", "msgspec", "prometheus_client", "llguidance"),
        "qjax serve",
    ),
    "structured": (("llguidance",), "answers that follow a JSON schema, a regex or a grammar"),
    "eval": (("lm_eval", "datasets", "matplotlib"), "qjax eval tasks, and plots of qjax report"),
    "calibration": (("datasets",), "calibration with data sets of the hub"),
}
_GPU_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin", "jax-rocm60-plugin")


def installed(name: str) -> str | None:
    """A distribution's version, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def wanted() -> dict[str, str]:
    """The versions of jax and jaxlib that qjax goes with, by its own metadata."""
    try:
        lines = metadata.requires("qjax") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return {}
    found = map(Requirement, lines)
    return {
        each.name: str(each.specifier)
        for each in found
        if each.name in ("jax", "jaxlib") and each.marker is None
    }


def versions(
    bounds: dict[str, str], version: Callable[[str], str | None] = installed
) -> Iterator[Finding]:
    """Of jax, jaxlib, and the plugin that drives a GPU.

    Args:
      bounds: as of `wanted`.
      version: says what is installed.
    """
    for name, bound in bounds.items():
        own = version(name)
        if own is None:
            continue  # nothing would run
        if not SpecifierSet(bound).contains(own, prereleases=True):
            yield Finding(
                name,
                f"{name} {own} is not of the versions that qjax is tested with ({bound})",
                f'python -m pip install "{name}{bound}"',
            )
    jaxlib = version("jaxlib")
    for name in _GPU_PLUGINS:
        own = version(name)
        if own is not None and jaxlib is not None and _minor(own) != _minor(jaxlib):
            yield Finding(
                name,
                f"{name} {own} does not go with jaxlib {jaxlib}: jax leaves it out, or fails",
                f"python -m pip install {name}=={jaxlib}",
            )


def _minor(version: str) -> tuple[int, ...]:
    return Version(version).release[:2]


def missing(found: Callable[[str], object] = importlib.util.find_spec) -> dict[str, list[str]]:
    """Extras that are not installed, and what of each is missing."""
    lacks = {
        extra: [name for name in names if found(name) is None]
        for extra, (names, _) in EXTRAS.items()
    }
    return {extra: names for extra, names in lacks.items() if names}


def extras(lacking: dict[str, list[str]]) -> Iterator[Finding]:
    """What the extras that are not installed would give."""
    for extra, names in lacking.items():
        yield Finding(
            f"extra {extra}",
            f"{', '.join(names)} not installed: without, no {EXTRAS[extra][1]}",
            f"python -m pip install 'qjax[{extra}]'",
            fault=False,
        )


def hub(around: Surroundings) -> Iterator[Finding]:
    """HF_HUB_OFFLINE and HF_TOKEN."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if around.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            yield Finding(
                name,
                "set: models of the hub come from its cache alone, others are not found",
                f"unset {name} to fetch models",
                fault=False,
            )
    token = around.environ.get("HF_TOKEN")
    if token is not None and (token != token.strip() or not token.startswith("hf_")):
        yield Finding(
            "HF_TOKEN",
            "does not look like a token (hf_...): the hub may refuse gated models, and public ones "
            "too",
            "copy it again from huggingface.co/settings/tokens, or unset it",
        )
