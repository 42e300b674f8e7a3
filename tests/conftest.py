"""How the suite runs: on the CPU unless asked, without the network, the same on every machine."""

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

OPTIONAL_MARKERS = {
    "gpu": "needs a GPU: run with --gpu",
    "peer": "needs another engine beside qjax: run with --peer",
    "slow": "slow, or needs a real model: run with --slow",
    "crosscompile": "lowers for a device that is not here: run with --crosscompile",
}

# Shared machines stall for seconds at a time, so no deadline; the same examples on every CI run.
settings.register_profile(
    "dev", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qjax", "tests that are skipped unless asked for")
    for name, reason in OPTIONAL_MARKERS.items():
        group.addoption(f"--{name}", action="store_true", help=f"also run what {reason}")


def pytest_configure(config: pytest.Config) -> None:
    """Sets what jax reads when it is first imported, which no test module has done yet."""
    if not config.getoption("--gpu"):
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:
        # Several workers share the memory, of which each would take most when it starts.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Compiled programs are kept from run to run, out of the user's own cache.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("jax_compiled"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # Most of the time of the suite goes into compiling tiny programs that run a few times, so
    # LLVM does little to them, as in jax's own tests. Real models and devices get all of it.
    if not any(config.getoption(f"--{name}") for name in ("slow", "gpu", "peer")):
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    # Nothing a test does may reach the hub; those that test downloads serve them from this machine.
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> None:
    """Frees what earlier modules compiled, once there is much of it."""
    forget_many_programs()


def forget_many_programs() -> None:
    """Frees what was compiled, where it is much: the memory of a CPU's programs comes in many small
    maps, of which a process may have some 65,000, and a program takes hundreds."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") < 15_000:
        return
    import jax

    from qjax.engine import runner

    runner._programs.clear()
    jax.clear_caches()
    gc.collect()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for name, reason in OPTIONAL_MARKERS.items():
            if item.get_closest_marker(name) and not config.getoption(f"--{name}"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of small checkpoints and references that other tools wrote."""
    return Path(__file__).parent / "golden"


@pytest.fixture(params=["tiny", pytest.param("real", marks=pytest.mark.slow)])
def default_model(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    golden: Path,
) -> None:
    """Has the default model in the cache: a tiny one in a cache of its own, or the real one; and a
    folder that looks like the checkout for the current one."""
    from qjax.checkpoint import builtin
    from tests import markdown

    markdown.checkout(monkeypatch, tmp_path / "checkout")
    if request.param == "tiny":
        markdown.stand_in(monkeypatch, tmp_path, golden)
    elif not builtin.cached_path(builtin.DEFAULT).is_file():
        pytest.skip(f"{builtin.DEFAULT} is not in the cache: run `qjax pull {builtin.DEFAULT}`")


@pytest.fixture
def own_loggers() -> Iterator[None]:
    """Puts back what a server sets of its loggers, which outlive it."""
    loggers = [logging.getLogger(name) for name in ("qjax.server", "uvicorn", "uvicorn.error")]
    before = [dict(vars(logger)) for logger in loggers]
    yield
    for logger, attributes in zip(loggers, before, strict=True):
        vars(logger).update(attributes)
        logger.manager._clear_cache()  # type: ignore[attr-defined]  # of what is enabled
