"""What each way of storing weights costs in speed: one model, its layers stored in each way.

    python benchmarks/methods.py smollm2-135m --repeats 3

The linear layers of a model are dequantized one at a time and rounded to nearest in the layout of
each method, in memory; embedding and head stay as they are. Decoding is then measured beside the
model as its file holds it (about 4 bits) and beside Q8_0, in turns. Since decoding reads every
weight once, what counts is bytes/s of weights: the last column is that of the method divided by
that of the baseline with about as many bits.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import ml_dtypes
import numpy as np

import qjax
from pallas_kernels import codes
from qjax import ops
from qjax.api import engine_for
from qjax.engine.engine import Engine
from qjax.engine.sampling_params import SamplingParams
from qjax.params import Params
from qjax.qarray import ActSpec, QArray

# The codebook of bitsandbytes' 4-bit normal floats (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A way of storing a weight.

    Attributes:
      bits: 4 or 8, whichever baseline it is held against.
      quantize: float32 [N, K] -> QArray.
    """

    name: str
    bits: int
    quantize: Callable[[np.ndarray], QArray]


def blocks(w: np.ndarray, group: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Largest absolute value, smallest and largest value of each group: [rows, columns] each."""
    n, k = w.shape
    rows, columns = (min(size, length) for size, length in zip(group, w.shape, strict=True))
    padded = np.pad(w, ((0, -n % rows), (0, -k % columns)))
    tiles = padded.reshape(-(-n // rows), rows, -(-k // columns), columns)
    return np.abs(tiles).max((1, 3)), tiles.min((1, 3)), tiles.max((1, 3))


def spread(scale: np.ndarray, group: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    return np.broadcast_to(codes.spread(scale, group, shape, np), shape)


def integers(
    bits: int,
    group: int | None,
    *,
    asymmetric: bool = False,
    scale_dtype: Any = np.float16,
    zero_dtype: Any = np.uint8,
    act: ActSpec | None = None,
    permuted: bool = False,
) -> Callable[[np.ndarray], QArray]:
    def quantize(w: np.ndarray) -> QArray:
        size = (1, group or w.shape[1])
        absmax, low, high = blocks(w, size)
        half, top = 1 << (bits - 1), (1 << bits) - 1
        aux = {}
        if permuted:
            order = np.random.default_rng(0).permutation(w.shape[1])
            w, aux["perm"] = w[:, order], order.astype(np.int32)[None]
        if asymmetric:
            scale = (np.maximum(high - low, 1e-8) / top).astype(scale_dtype)
            zero = -low / scale.astype(np.float32)
            zero = zero.astype(zero_dtype) if zero_dtype != np.uint8 else np.rint(zero).clip(0, top)
            zero = zero.astype(zero_dtype)
            offset = spread(zero, size, w.shape)
        else:
            scale = (np.maximum(absmax, 1e-8) / (half - 1)).astype(scale_dtype)
            zero, offset = None, half
        code = np.rint(w / spread(scale, size, w.shape) + offset).clip(0, top).astype(np.uint8)
        qtype = f"uint{bits}" if asymmetric else f"uint{bits}b{half}"
        if qtype == "uint8b128":
            qtype, code = "int8", code ^ 128
        return QArray(codes.pack(code, bits), qtype, w.shape, scale, zero, aux, size, act=act)

    return quantize


def floats(
    qtype: str,
    group: tuple[int | None, int | None],
    *,
    scale_dtype: Any = ml_dtypes.bfloat16,
    has_global: bool = False,
    act: ActSpec | None = None,
    act_aux: dict[str, float] | None = None,
) -> Callable[[np.ndarray], QArray]:
    table = codes.table(qtype)
    order = np.argsort(np.where(np.isfinite(table), table, np.inf), kind="stable")
    order = order[: np.isfinite(table).sum()]
    middles = (table[order][1:] + table[order][:-1]) / 2
    largest = table[order][-1]

    def quantize(w: np.ndarray) -> QArray:
        size = (group[0] or w.shape[0], group[1] or w.shape[1])
        wanted = np.maximum(blocks(w, size)[0], 1e-8) / largest
        aux = {key: np.full((1, 1), value, np.float32) for key, value in (act_aux or {}).items()}
        if scale_dtype is ml_dtypes.float8_e8m0fnu:
            scale = np.exp2(np.ceil(np.log2(wanted))).astype(scale_dtype)
            real = scale.astype(np.float32)
        elif has_global:
            aux["global_scale"] = np.full((1, 1), wanted.max() / 448, np.float32)
            scale = (wanted / aux["global_scale"]).astype(scale_dtype)
            real = scale.astype(np.float32) * aux["global_scale"]
        else:
            scale = wanted.astype(scale_dtype)
            real = scale.astype(np.float32)
        code = order[np.searchsorted(middles, w / spread(real, size, w.shape))].astype(np.uint8)
        packed = codes.pack(code, codes.CODES[qtype].bits)
        return QArray(packed, qtype, w.shape, scale, None, aux, size, act=act)

    return quantize


def lookup(group: int) -> Callable[[np.ndarray], QArray]:
    table = np.array(NF4, np.float32)

    def quantize(w: np.ndarray) -> QArray:
        size = (1, group)
        scale = np.maximum(blocks(w, size)[0], 1e-8).astype(np.float32)
        near = w / spread(scale, size, w.shape)
        code = np.searchsorted((table[1:] + table[:-1]) / 2, near).astype(np.uint8)
        aux = {"codebook": table[None]}
        return QArray(codes.pack(code, 4), "lookup4", w.shape, scale, None, aux, size)

    return quantize


def q8_0(w: np.ndarray) -> QArray:
    """GGUF's 8-bit blocks: a float16 scale and 32 int8 codes each."""
    parts = w.reshape(w.shape[0], -1, 32)
    scale = (np.abs(parts).max(-1, keepdims=True) / 127).astype(np.float16)
    code = np.rint(parts / np.maximum(scale.astype(np.float32), 1e-8)).astype(np.int8)
    raw = np.concatenate([scale.view(np.uint8), code.view(np.uint8)], -1)
    return QArray(raw.reshape(w.shape[0], -1), "q8_0", w.shape)


def token(dtype: str, **settings: Any) -> ActSpec:
    return ActSpec(dtype, "token", True, **settings)


def groups(dtype: str, size: int, **settings: Any) -> ActSpec:
    return ActSpec(dtype, "group", True, group_size=size, **settings)


E8M0, E4M3 = ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn
METHODS = (
    Method("W4A16 group 32, asymmetric (AWQ, GPTQ)", 4, integers(4, 32, asymmetric=True)),
    Method("W4A16 group 128 (GPTQ)", 4, integers(4, 128)),
    Method("W4A16 group 32, act-order (GPTQ)", 4, integers(4, 32, permuted=True)),
    Method("W4A16 per channel (compressed-tensors)", 4, integers(4, None)),
    Method("W4A8 group 32", 4, integers(4, 32, act=token("int8"))),
    Method("W4AFP8 group 32", 4, integers(4, 32, act=token("fp8_e4m3"))),
    Method("4 bits, float zeros, group 64 (HQQ)", 4,
           integers(4, 64, asymmetric=True, scale_dtype=np.float32, zero_dtype=np.float32)),
    Method("NF4 group 64 (bitsandbytes)", 4, lookup(64)),
    Method("NVFP4", 4, floats("fp4_e2m1", (1, 16), scale_dtype=E4M3, has_global=True,
                              act=groups("fp4_e2m1", 16, scale="fp8_e4m3"),
                              act_aux={"act_global_scale": 0.01})),
    Method("NVFP4, weights only", 4,
           floats("fp4_e2m1", (1, 16), scale_dtype=E4M3, has_global=True)),
    Method("MXFP4", 4, floats("fp4_e2m1", (1, 32), scale_dtype=E8M0,
                              act=groups("fp4_e2m1", 32, scale="e8m0"))),
    Method("MXFP4, weights only", 4, floats("fp4_e2m1", (1, 32), scale_dtype=E8M0)),
    Method("W8A16 per channel", 8, integers(8, None)),
    Method("W8A16 group 128 (GPTQ)", 8, integers(8, 128)),
    Method("W8A8 dynamic", 8, integers(8, None, act=token("int8"))),
    Method("W8A8 dynamic, asymmetric", 8, integers(8, None, act=token("int8", symmetric=False))),
    Method("FP8 dynamic", 8, floats("fp8_e4m3", (1, None), act=token("fp8_e4m3"))),
    Method("FP8 static, per tensor", 8,
           floats("fp8_e4m3", (None, None), act=ActSpec("fp8_e4m3", "tensor", False),
                  act_aux={"act_scale": 0.05})),
    Method("FP8 128x128 blocks", 8,
           floats("fp8_e4m3", (128, 128), act=groups("fp8_e4m3", 128))),
    Method("FP8, weights only", 8, floats("fp8_e4m3", (1, None))),
    Method("MXFP8", 8, floats("fp8_e4m3", (1, 32), scale_dtype=E8M0,
                              act=groups("fp8_e4m3", 32, scale="e8m0"))),
    Method("W3A16 group 32", 4, integers(3, 32)),
    Method("W2A16 group 32", 4, integers(2, 32)),
    Method("W6A16 group 32", 8, integers(6, 32)),
)  # fmt: skip


Path = tuple[str, ...]


def linear_layers(tree: Any, path: Path = ()) -> Iterator[tuple[Path, QArray]]:
    """Weights of linear layers, without embedding and head."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from linear_layers(value, (*path, key))
        elif isinstance(value, QArray) and "layers" in path:
            yield (*path, key), value


def stored_as(params: Params, quantize: Callable[[np.ndarray], QArray]) -> Params:
    """The model with every linear layer stored anew."""

    def copy(tree: Any) -> Any:
        return {k: copy(v) if isinstance(v, dict) else v for k, v in tree.items()}

    tree = copy(params.tree)
    for path, weight in linear_layers(params.tree):
        dense = np.asarray(ops.unprepare(weight).dequantize())
        node = tree
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = jax.device_put(ops.prepare(quantize(dense)))
    return replace(params, tree=tree)


class Decoding:
    """Decodes one sequence; `measure` gives tokens/s."""

    def __init__(self, params: Params, length: int):
        self.prompt = tuple(range(1, 9))
        self.sampling = SamplingParams(max_tokens=length + 1, ignore_eos=True)
        self.engine: Engine = engine_for(params, [self.prompt], self.sampling)
        self.length = length
        self.measure()

    def measure(self) -> float:
        request = self.engine.add(self.prompt, self.sampling)
        while not request.output_ids:
            self.engine.step()
        done = len(request.output_ids)
        start = time.perf_counter()
        while self.engine.busy:
            self.engine.step()
        return (self.length + 1 - done) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="decoding speed of each way of storing weights")
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--only", default="", help="methods whose name holds this text")
    options = parser.parse_args()
    source = qjax.load(options.model)
    bases = {4: source, 8: stored_as(source, q8_0)}
    running = {bits: Decoding(params, options.generate) for bits, params in bases.items()}
    print("| method | bits | MB | tokens/s | MB of baseline | its tokens/s | ratio of bytes/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for method in METHODS:
        if options.only.lower() not in method.name.lower():
            continue
        params = stored_as(source, method.quantize)
        ours, base = Decoding(params, options.generate), running[method.bits]
        rates: dict[Decoding, list[float]] = {ours: [], base: []}
        for turn in range(options.repeats):
            for each in (ours, base) if turn % 2 == 0 else (base, ours):
                rates[each].append(each.measure())
        rate, base_rate = (statistics.median(rates[each]) for each in (ours, base))
        size, base_size = params.nbytes / 1e6, bases[method.bits].nbytes / 1e6
        ratio = rate * size / (base_rate * base_size)
        print(
            f"| {method.name} | {method.bits} | {size:.0f} | {rate:.0f} | {base_size:.0f} | "
            f"{base_rate:.0f} | **{ratio:.2f}** |",
            flush=True,
        )


if __name__ == "__main__":
    main()
