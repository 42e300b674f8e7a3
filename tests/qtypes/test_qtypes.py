"""The table of numeric types, against ggml's own numbers."""

import pytest

from pallas_kernels import codes, unpack
from qjax.qtypes import BY_GGML_ID, QTYPES

# ggml number, elements and bytes of a block: GGMLQuantizationType, GGML_QUANT_SIZES of gguf 0.19;
# of q2_0, ggml_get_type_traits of llama.cpp.
GGML = {
    "f32": (0, 1, 4),
    "f16": (1, 1, 2),
    "q4_0": (2, 32, 18),
    "q4_1": (3, 32, 20),
    "q5_0": (6, 32, 22),
    "q5_1": (7, 32, 24),
    "q8_0": (8, 32, 34),
    "q2_k": (10, 256, 84),
    "q3_k": (11, 256, 110),
    "q4_k": (12, 256, 144),
    "q5_k": (13, 256, 176),
    "q6_k": (14, 256, 210),
    "iq2_xxs": (16, 256, 66),
    "iq2_xs": (17, 256, 74),
    "iq3_xxs": (18, 256, 98),
    "iq1_s": (19, 256, 50),
    "iq4_nl": (20, 32, 18),
    "iq3_s": (21, 256, 110),
    "iq2_s": (22, 256, 82),
    "iq4_xs": (23, 256, 136),
    "iq1_m": (29, 256, 56),
    "bf16": (30, 1, 2),
    "tq1_0": (34, 256, 54),
    "tq2_0": (35, 256, 66),
    "q1_0": (41, 128, 18),
    "q2_0": (42, 64, 18),
}


def test_sizes_and_numbers_are_those_of_ggml():
    table = {t.name: (t.ggml_id, t.block_elements, t.block_bytes) for t in BY_GGML_ID.values()}
    assert table == GGML
    assert table.keys() == unpack.BLOCKS.keys()
    assert QTYPES.keys() == unpack.BLOCKS.keys() | codes.CODES.keys()
    assert {number: t.name for number, t in BY_GGML_ID.items()} == {
        number: name for name, (number, _, _) in GGML.items()
    }


@pytest.mark.parametrize(
    ("name", "bits"), [("q4_0", 4.5), ("q4_k", 4.5), ("q6_k", 6.5625), ("bf16", 16)]
)
def test_bits_per_weight(name, bits):
    assert QTYPES[name].bits_per_weight == bits


def test_row_bytes():
    assert QTYPES["q6_k"].row_bytes(1024) == 840
    with pytest.raises(ValueError, match="q6_k rows hold blocks of 256 elements: 640"):
        QTYPES["q6_k"].row_bytes(640)


def test_the_table_is_read_only():
    with pytest.raises(TypeError):
        QTYPES["mine"] = QTYPES["f32"]  # pyright: ignore[reportIndexIssue]
