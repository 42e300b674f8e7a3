"""Every implementation in turn, and weights made of blocks that the `gguf` package decoded."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pallas_kernels import dispatch, native

Blocks = dict[str, tuple[np.ndarray, np.ndarray]]
Weights = Callable[[str, int, int], tuple[np.ndarray, np.ndarray]]


def not_built(implementation: str) -> str | None:
    """Why an implementation is absent from this machine, or None where it is there."""
    library, reason = native.library()
    return reason if implementation == "native" and library is None else None


@pytest.fixture(params=["native", "xla", "ref"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an implementation, which is in use while the test runs."""
    if reason := not_built(request.param):
        pytest.skip(reason)
    with dispatch.use(request.param):
        yield request.param


@pytest.fixture(scope="session")
def golden_blocks(golden: Path) -> Blocks:
    """qtype -> (raw uint8 [blocks, bytes], decoded float32 [blocks, elements])."""
    with np.load(golden / "gguf_blocks.npz") as file:
        names = {key.partition("/")[0] for key in file}
        return {name: (file[f"{name}/raw"], file[f"{name}/values"]) for name in sorted(names)}


@pytest.fixture(scope="session")
def golden_weight(golden_blocks: Blocks) -> Weights:
    """(qtype, N, K) -> (raw uint8 [N, row_bytes], decoded float32 [N, K]), random blocks."""

    def make(qtype: str, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        raw, values = golden_blocks[qtype]
        blocks = k // values.shape[1]
        picks = np.random.default_rng(n * k).integers(0, len(raw), (n, blocks))
        return raw[picks].reshape(n, -1), values[picks].reshape(n, k)

    return make
