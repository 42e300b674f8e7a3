"""Makes gguf_quants.npz: a matrix of floats, and what ggml makes of it in every type.

The tool is ggml as in llama-cpp-python 0.3.36, the function that llama-quantize calls. Run by hand
where that package is installed: `python tests/golden/make_gguf_quants.py`.
Keys: "w" float32 [16, 512]; "importance" float32 [512]; "<qtype>/plain" and "<qtype>/importance",
uint8 [16, row_bytes]: without and with it. (iq1 and most iq2 types need one.)
"""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import numpy as np

TYPES = {
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
    "tq1_0": (34, 256, 54),
    "tq2_0": (35, 256, 66),
    "q1_0": (41, 128, 18),
    "q2_0": (42, 64, 18),
}
NEED_IMPORTANCE = ("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m")


def main() -> None:
    package = Path(find_spec("llama_cpp").origin).parent
    library = ctypes.CDLL(str(package / "lib" / "libggml-base.so"))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3]
    quantize.argtypes += [ctypes.c_void_p]
    rng = np.random.default_rng(7)
    rows, columns = 16, 512
    w = rng.standard_t(6, (rows, columns)) * 0.03 * np.exp(0.4 * rng.standard_normal((rows, 1)))
    w = w.astype(np.float32)
    w[3, :256] = 0  # a block of nothing
    w[5] = np.abs(w[5])  # and a row without a sign
    importance = np.exp(1.2 * rng.standard_normal(columns)).astype(np.float32)
    arrays = {"w": w, "importance": importance}
    for qtype, (number, elements, size) in TYPES.items():
        for key, given in (("plain", None), ("importance", importance.ctypes.data)):
            if given is None and qtype in NEED_IMPORTANCE:
                continue
            made = np.zeros((rows, columns // elements * size), np.uint8)
            quantize(number, w.ctypes.data, made.ctypes.data, 0, rows, columns, given)
            arrays[f"{qtype}/{key}"] = made
    np.savez_compressed(Path(__file__).with_name("gguf_quants.npz"), **arrays)


if __name__ == "__main__":
    main()
