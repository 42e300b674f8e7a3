"""Makes gguf_blocks.npz: random raw blocks of every type, and what the `gguf` package decodes.

Written with gguf 0.19.0 and numpy 2. Run by hand: `python tests/golden/make_gguf_blocks.py`.
Keys: "<qtype>/raw" uint8 [blocks, bytes] and "<qtype>/values" float32 [blocks, elements].
"""

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


def main() -> None:
    rng = np.random.default_rng(20)
    arrays = {}
    for qtype, halves in HALVES.items():
        kind = gguf.GGMLQuantizationType[qtype.upper()]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (40 if elements == 32 else 16, size), dtype=np.uint8)
        for offset in halves:
            numbers = (rng.standard_normal((len(raw), 1)) * 0.01).astype(np.float16)
            raw[:, offset : offset + 2] = numbers.view(np.uint8)
        arrays[f"{qtype}/raw"] = raw
        arrays[f"{qtype}/values"] = gguf.dequantize(raw, kind)
    plain = rng.standard_normal((40, 32)).astype(np.float32)
    for qtype in ("f32", "f16", "bf16"):
        kind = gguf.GGMLQuantizationType[qtype.upper()]
        raw = gguf.quantize(plain, kind).view(np.uint8)
        arrays[f"{qtype}/raw"] = raw
        arrays[f"{qtype}/values"] = gguf.dequantize(raw, kind)
    np.savez_compressed(Path(__file__).with_name("gguf_blocks.npz"), **arrays)


if __name__ == "__main__":
    main()
