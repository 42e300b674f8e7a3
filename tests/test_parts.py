"""Pieces of weights stand for the same numbers as the rows and columns that they are cut from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import codes
from pallas_kernels.inputs import ActSpec
from pallas_kernels.matmul.spec import decode
from qjax.errors import ShardingError
from qjax.parts import part
from qjax.qarray import QArray


@st.composite
def weights(draw: st.DrawFn) -> QArray:
    """Codes in groups of rows and columns that need not divide what they are of."""
    qtype = draw(st.sampled_from(["uint4", "uint4b8", "uint3b4", "int8", "fp4_e2m1"]))
    n, k = draw(st.sampled_from([8, 24, 48])), draw(st.sampled_from([32, 64, 96]))
    group = draw(st.sampled_from([1, 4, 16, n])), draw(st.sampled_from([8, 16, 24, k]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tiles = -(-n // group[0]), -(-k // group[1])
    zero = random.integers(0, 15, tiles).astype(np.uint8) if qtype == "uint4" else None
    return QArray(
        random.integers(0, 256, (n, codes.row_bytes(qtype, k))).astype(np.uint8),
        qtype,
        (n, k),
        random.uniform(0.5, 2, tiles).astype(np.float32),
        zero,
        group=group,
    )


def numbers(weight: QArray) -> np.ndarray:
    return decode(weight.spec, weight.arrays, np)


@given(weights(), st.sampled_from([(2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (8, 2)]))
def test_pieces(weight: QArray, parts: tuple[int, int]) -> None:
    (n, k), (rows, columns) = weight.shape, parts
    whole = numbers(weight)
    kinds = set()
    for i, j in np.ndindex(parts):
        piece = part(weight, parts, (i, j))
        kinds.add((piece.shape, piece.group))
        assert piece.shape == (n // rows, k // columns)
        here = np.s_[i * n // rows : (i + 1) * n // rows, j * k // columns : (j + 1) * k // columns]
        np.testing.assert_array_equal(numbers(piece), whole[here])
    assert len(kinds) == 1  # one program for all devices


def test_what_cannot_be_cut() -> None:
    raw = np.zeros((6, 2 * 144), np.uint8)
    blocks = QArray(raw, "q4_k", (6, 512))
    assert part(blocks, (3, 2), (2, 1)).qvalue.shape == (2, 144)
    with pytest.raises(ShardingError, match=r"512 inputs in blocks of 256 .* in 4: in 1, 2 they"):
        part(blocks, (1, 4), (0, 0))
    with pytest.raises(ShardingError, match=r"6 outputs cannot be split in 4: in 1, 2, 3, 6 they"):
        part(blocks, (4, 1), (0, 0))
    act = ActSpec("fp8_e4m3", "group", dynamic=True, group_size=128)
    grouped = QArray(
        np.zeros((4, 512), np.uint8), "fp8_e4m3", (4, 512), np.ones((4, 4), np.float32),
        group=(1, 128), act=act,
    )  # fmt: skip
    assert part(grouped, (1, 4), (0, 3)).group == (1, 128)
    with pytest.raises(
        ShardingError, match=r"512 inputs in blocks of 128 .* in 8: in 1, 2, 4 they"
    ):
        part(grouped, (1, 8), (0, 0))
