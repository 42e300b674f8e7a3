"""Native CPU kernels of the quantized matrix product, as XLA custom calls.

They read weights in the "tile16" layout (native/tile.h): 16 rows side by side, codes and scales as
the file has them, so that `unprepare` gives back the file's bytes.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.inputs import ActSpec, Inputs
from pallas_kernels.matmul.spec import CANONICAL, WeightArrays, WeightSpec

LAYOUT = "tile16"
MAX_WEIGHTS = 8
_PRECISION = {"float32": 0, "int16": 1, "int8": 2}
_ACTIVATION = {None: 0, "silu": 1, "gelu_tanh": 2}


def require_tiles(spec: WeightSpec) -> int:
    """ggml's number of the weight's type; refuses a weight that is not tiled for these kernels."""
    native.require()
    if spec.layout == CANONICAL and spec.qtype not in native.TYPE_IDS:
        raise NotImplementedError(f"no native kernel reads weights of type {spec.qtype}")
    if spec.layout != LAYOUT:
        raise NotImplementedError(f"a weight in the {spec.layout!r} layout, not {LAYOUT!r}")
    return native.TYPE_IDS[spec.qtype]


def matmul(
    x: jax.Array,
    weights: tuple[tuple[WeightSpec, WeightArrays], ...],
    *,
    norm: jax.Array | None,
    norm_eps: float,
    biases: tuple[jax.Array | None, ...],
    activation: str | None,
    residual: jax.Array | None,
    post_norm: jax.Array | None,
    activation_dtype: str,
    num_rows: jax.Array | None,
    act: ActSpec | None = None,
    inputs: Inputs | None = None,
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.matmul.api.matmul`."""
    types = [require_tiles(spec) for spec, _ in weights]
    if len(weights) > MAX_WEIGHTS:
        raise NotImplementedError(f"{len(weights)} weights in one call, at most {MAX_WEIGHTS}")
    rows = x.shape[0]
    if num_rows is None:
        num_rows = jnp.full((1,), rows, jnp.int32)
    outputs = [weights[0]] if activation else weights
    given = [bias for bias in biases if bias is not None]
    if act is not None and not rounds_inputs(act):
        raise NotImplementedError(f"inputs rounded to {act}")
    optional = [norm, residual, post_norm, *_input_arrays(inputs)]
    extra = [array for array in optional if array is not None]
    flags = sum((array is not None) << bit for bit, array in enumerate(optional))
    call = jax.ffi.ffi_call(
        "qjax_matmul",
        [jax.ShapeDtypeStruct((rows, spec.shape[0]), jnp.float32) for spec, _ in outputs],
        vmap_method="sequential",
    )
    return tuple(
        call(
            x, num_rows, *(arrays.qvalue for _, arrays in weights), *given, *extra,
            types=np.array(types, np.int32),
            biases=np.int32(sum((b is not None) << i for i, b in enumerate(biases))),
            flags=np.int32(flags),
            activation=np.int32(_ACTIVATION[activation]),
            precision=np.int32(_PRECISION[activation_dtype]),
            eps=np.float32(norm_eps),
            **_act_attributes(act),
        )
    )  # fmt: skip


# Bits of mantissa, exponents of the smallest normal and of the largest number, largest number.
_FLOATS = {
    "fp8_e4m3": (3, -6, 8, 448.0),
    "fp8_e5m2": (2, -14, 15, 57344.0),
    "fp6_e2m3": (3, 0, 2, 7.5),
    "fp6_e3m2": (2, -2, 4, 28.0),
    "fp4_e2m1": (1, 0, 2, 6.0),
}
_SCALES = (
    *("float32", "bfloat16", "float16", "e8m0", "e8m0_ceil", "fp8_e4m3", "e8m0_even", "e8m0_even4"),
)
_INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))


def rounds_inputs(act: ActSpec) -> bool:
    """Whether the kernel itself can round its inputs so: row by row, to a type that it knows."""
    return (
        act.dtype in (*_FLOATS, *_INTEGERS)
        and act.scale in _SCALES
        and act.outliers is None
        and not (act.dynamic and act.strategy == "tensor")
        and (act.symmetric or act.scale == "float32")
    )


def takes_inputs(specs: Sequence[WeightSpec], act: ActSpec | None) -> bool:
    """Whether `matmul` takes these weights together with what is to happen to their inputs."""
    return all(spec.layout == LAYOUT for spec in specs) and (act is None or rounds_inputs(act))


def _input_arrays(inputs: Inputs | None) -> list[jax.Array | None]:
    if inputs is None:
        return []
    *floats, perm = inputs
    return [*(None if each is None else each.astype(jnp.float32) for each in floats), perm]


def _act_attributes(act: ActSpec | None) -> dict[str, np.ndarray]:
    """What native/ffi.cc reads as `Inputs`."""
    if act is None:
        return {"act": np.zeros(0, np.int32), "act_values": np.zeros(0, np.float32)}
    if act.dtype in _FLOATS:
        mantissa, least, most, top = _FLOATS[act.dtype]
        bottom = -top
    else:
        half = 1 << (int(act.dtype.removeprefix("int")) - 1)
        mantissa = least = most = 0
        bottom, top = -half, half - 1
    kind = _SCALES.index(act.scale)
    group = act.group_size or 0
    return {
        "act": np.array(
            [act.dtype in _FLOATS, act.dynamic, act.symmetric, mantissa, least, most, kind, group],
            np.int32,
        ),
        "act_values": np.array([bottom, top, act.divisor or top, act.upper_bound or 0], np.float32),
    }


def prepare(spec: WeightSpec, arrays: WeightArrays) -> tuple[WeightSpec, WeightArrays] | None:
    """Tiles a canonical weight; None where the native kernels do not run.

    The bytes are in memory of their own, which jax takes over without a copy.
    """
    try:
        library = native.require()
    except NotImplementedError:
        return None
    if spec.qtype not in native.TYPE_IDS:
        return None
    kind, (n, k) = native.TYPE_IDS[spec.qtype], spec.shape
    raw = np.ascontiguousarray(arrays.qvalue)
    tiles = _arena.take(library.qjax_tile_bytes(kind, n, k))
    library.qjax_pack(kind, raw.ctypes.data, n, k, tiles.ctypes.data)
    tiles = tiles.reshape(-(-n // 16), -1)
    return WeightSpec(spec.qtype, spec.shape, LAYOUT), WeightArrays(tiles)


def unprepare(spec: WeightSpec, arrays: WeightArrays) -> tuple[WeightSpec, WeightArrays]:
    """The canonical bytes that `prepare` was given."""
    kind, (n, k) = require_tiles(spec), spec.shape
    canonical = WeightSpec(spec.qtype, spec.shape, CANONICAL)
    raw = np.empty(canonical.canonical_shape, np.uint8)
    tiles = np.ascontiguousarray(arrays.qvalue)
    native.require().qjax_unpack(kind, tiles.ctypes.data, n, k, raw.ctypes.data)
    return canonical, WeightArrays(raw)


class _Arena:
    """Memory for tiles, cut from large blocks that the system may back by huge pages.

    Tiles are small and read once a step from end to end: with pages of 4 KiB the processor would
    spend its time on looking up addresses. A block lives as long as one of its tiles does.
    """

    BLOCK, ALIGNMENT = 1 << 25, 64

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """uint8 [size] at a multiple of 64 bytes, which lets jax take it over without a copy."""
        step = -(-size // self.ALIGNMENT) * self.ALIGNMENT
        with self._lock:
            if step > self._block.size:
                self._block = _huge(max(step, self.BLOCK))
            taken, self._block = self._block[:size], self._block[step:]
        return taken


def _huge(size: int, page: int = 1 << 21) -> np.ndarray:
    """Zeroed memory that starts at a huge page. What is not written to takes no memory."""
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = np.frombuffer(memory, np.uint8)
    start = -block.ctypes.data % page
    return block[start : start + size]


_arena = _Arena()
