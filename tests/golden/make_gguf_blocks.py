"""Makes gguf_blocks.npz: random raw blocks of every type, and what other tools decode from them.

The tool is the `gguf` package, version 0.19.0; for q1_0 and q2_0, which it cannot decode, it is
ggml as in llama-cpp-python 0.3.36: `to_float` of its type traits. Run by hand where both are
installed: `python tests/golden/make_gguf_blocks.py`.
Keys: "<qtype>/raw" uint8 [blocks, bytes] and "<qtype>/values" float32 [blocks, elements].
"""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np

# Where a block of each type holds float16 numbers; random bits there could mean infinity.
HALVES = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
}
LATER = {
    "iq1_s": (0,),
    "iq1_m": (),
    "iq2_xxs": (0,),
    "iq2_xs": (0,),
    "iq2_s": (0,),
    "iq3_xxs": (0,),
    "iq3_s": (0,),
    "tq1_0": (52,),
    "tq2_0": (64,),
    "q1_0": (0,),
    "q2_0": (0,),
    "mxfp4": (),
    "nvfp4": (),
}

# Type number, elements and bytes of a block of what ggml decodes; gguf 0.19 does not know q2_0.
GGML_TYPES = {"q1_0": (41, 128, 18), "q2_0": (42, 64, 18)}


class TypeTraits(ctypes.Structure):
    """ggml_type_traits of ggml.h, as far as it is needed."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


def ggml_dequantize(raw, qtype):
    """float32 [blocks, elements], decoded by ggml."""
    package = Path(find_spec("llama_cpp").origin).parent
    library = ctypes.CDLL(str(package / "lib" / "libggml-base.so"))
    library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    traits = library.ggml_get_type_traits(GGML_TYPES[qtype][0]).contents
    values = np.empty((len(raw), traits.blck_size), np.float32)
    traits.to_float(raw.ctypes.data, values.ctypes.data, values.size)
    return values


def random_blocks(rng, qtype, halves):
    """uint8 [16 or 40, bytes] with finite scales."""
    if qtype in GGML_TYPES:
        _, elements, size = GGML_TYPES[qtype]
    else:
        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[qtype.upper()]]
    raw = rng.integers(0, 256, (40 if elements == 32 else 16, size), dtype=np.uint8)
    for offset in halves:
        numbers = (rng.standard_normal((len(raw), 1)) * 0.01).astype(np.float16)
        raw[:, offset : offset + 2] = numbers.view(np.uint8)
    if qtype == "iq1_m":  # the float16 is spread over the upper four bits of four words
        words = raw[:, 48:].view(np.uint16)
        bits = (rng.standard_normal(len(raw)) * 0.01).astype(np.float16).view(np.uint16)
        words &= 0x0FFF
        words |= (bits[:, None] >> np.array([0, 4, 8, 12], np.uint16)) << np.uint16(12)
    elif qtype == "mxfp4":
        raw[:, 0] = rng.integers(110, 130, len(raw))
    elif qtype == "nvfp4":
        raw[:, :4] &= 0x7F
    return raw


def main() -> None:
    rng = np.random.default_rng(20)
    arrays = {}
    for qtype, halves in HALVES.items():
        kind = gguf.GGMLQuantizationType[qtype.upper()]
        raw = random_blocks(rng, qtype, halves)
        arrays[f"{qtype}/raw"] = raw
        arrays[f"{qtype}/values"] = gguf.dequantize(raw, kind)
    plain = rng.standard_normal((40, 32)).astype(np.float32)
    for qtype in ("f32", "f16", "bf16"):
        kind = gguf.GGMLQuantizationType[qtype.upper()]
        raw = gguf.quantize(plain, kind).view(np.uint8)
        arrays[f"{qtype}/raw"] = raw
        arrays[f"{qtype}/values"] = gguf.dequantize(raw, kind)
    for qtype, halves in LATER.items():
        raw = random_blocks(rng, qtype, halves)
        arrays[f"{qtype}/raw"] = raw
        if qtype in GGML_TYPES:
            values = ggml_dequantize(raw, qtype)
        else:
            values = gguf.dequantize(raw, gguf.GGMLQuantizationType[qtype.upper()])
        arrays[f"{qtype}/values"] = values
    np.savez_compressed(Path(__file__).with_name("gguf_blocks.npz"), **arrays)


if __name__ == "__main__":
    main()
