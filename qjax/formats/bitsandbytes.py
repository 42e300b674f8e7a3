"""bitsandbytes: 4-bit codebooks (nf4, fp4; QLoRA, arXiv 2305.14314) and LLM.int8 (2208.07339).

4-bit weights are blocks of the flattened matrix: W.flat[i] = code[q[i]] * absmax[i // blocksize],
the first of two codes in the high half of a byte. absmax may itself be quantized ("double
quantization"); it is decoded to float32 when it is read, which costs 0.37 bits a weight in blocks
of 64. 8-bit weights have a scale for each output; inputs are rounded to int8 row by row, but for
columns in which a value reaches the threshold.

A full-precision checkpoint becomes nf4 in blocks of 64 as it is read, as with vLLM's
`quantization="bitsandbytes"`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from pallas_kernels import codes
from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats import online, weights
from qjax.formats.base import (
    PLAIN,
    Arrays,
    Checkpoint,
    Keys,
    Layer,
    QuantizationConfig,
    Stored,
    expect,
    fault,
    is_embedding,
    is_plain,
    no_checkpoint,
)
from qjax.lazy import LazyArray, as_bytes
from qjax.qarray import ActSpec, QArray
from qjax.registry import register_quantization_config

_STATE = "weight.quant_state.bitsandbytes__"
_BYTES = ("u8", "i8", "bf16", "f16", "f32", "i16", "i32", "f64", "i64")
_INT8 = ActSpec("int8", "token", True)


@dataclass(frozen=True)
class _State:
    """The quant_state of one 4-bit weight."""

    blocksize: int
    shape: tuple[int, ...]
    nested_blocksize: int | None
    nested_offset: float
    rounded: str | None


@register_quantization_config("bitsandbytes")
@dataclass(frozen=True)
class BitsAndBytes(QuantizationConfig):
    """Settings of one checkpoint.

    Attributes:
      threshold: of outliers among the inputs of 8-bit weights; 0 for none.
      values: the configuration as it was read.
      checkpoint: where quant_states are read from.
      online: the checkpoint is in full precision, and weights are rounded as they are read.
    """

    threshold: float
    values: Mapping[str, Any]
    checkpoint: Checkpoint
    online: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        keys.ignore("quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit")
        keys.ignore("_load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")
        keys.ignore("bnb_4bit_use_double_quant", "llm_int8_skip_modules")
        keys.choice("bnb_4bit_quant_type", ("fp4", "nf4"), "fp4")  # tensors say it themselves
        keys.ignore("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight")
        threshold = float(keys.get("llm_int8_threshold", (int, float), 6.0))
        keys.done()
        return cls(threshold, config or _ONLINE, checkpoint, online=not config)

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        states = [suffix for suffix in stored if suffix.startswith(_STATE)]
        if states:
            return self._four_bits(module, stored, shape, states)
        record = expect(module, stored, "weight")
        if record.qtype == "i8":
            return self._eight_bits(module, stored, shape)
        if record.qtype in PLAIN:
            if not (self.online and online.rounded(module) and len(shape) == 2):
                return None
            expect(module, stored, "weight", PLAIN, shape)
            if shape[1] % _BLOCK:
                raise fault(record, f"has rows of {shape[1]}, which blocks of {_BLOCK} do not fill")
            return Layer(("weight",), lambda arrays: online.by_rows(arrays["weight"], to_nf4))
        raise fault(record, f"has dtype {record.qtype}, but neither quant_state nor SCB beside it")

    def _four_bits(
        self, module: str, stored: Stored, shape: tuple[int, ...], states: list[str]
    ) -> Layer:
        n, k = shape[-2:]
        if len(states) > 1 or len(shape) != 2:
            raise fault(stored[states[0]], "is one of several quant_states, or of stacked experts")
        record = stored[states[0]]
        state = _read_state(record.file, record.name, self.checkpoint.read(record.name))
        if state.shape != (n, k):
            raise fault(record, f"says shape {state.shape}, the model's sizes ask for {(n, k)}")
        weight = expect(module, stored, "weight", _BYTES)
        if int(np.prod(weight.shape)) * weights.width(weight) // 8 != n * k // 2:
            raise fault(
                weight, f"holds {weight.shape}, {(n, k)} 4-bit weights take {n * k // 2} bytes"
            )
        blocks = -(-n * k // state.blocksize)
        where = f"{record.file}, {record.name}"
        # Of a block that lies across two rows, some groups in a row share the scale.
        group, times = weights.flat_group(where, (n, k), state.blocksize)
        grid = weights.grid((n, k), group)
        nested = state.nested_blocksize is not None
        expect(module, stored, "weight.absmax", "u8" if nested else "f32", (blocks,))
        expect(module, stored, "weight.quant_map", "f32", (16,))
        reads = ["weight", "weight.absmax", "weight.quant_map"]
        if state.nested_blocksize is not None:
            count = -(-blocks // state.nested_blocksize)
            expect(module, stored, "weight.nested_absmax", "f32", (count,))
            expect(module, stored, "weight.nested_quant_map", "f32", (256,))
            reads += ["weight.nested_absmax", "weight.nested_quant_map"]

        def decode(arrays: Arrays) -> QArray:
            raw = as_bytes(arrays["weight"]).reshape(n, k // 2)
            if state.nested_blocksize is not None:
                nested = np.asarray(arrays["weight.nested_absmax"])
                nested_map = np.asarray(arrays["weight.nested_quant_map"])

            def absmax(rows: slice, columns: slice) -> np.ndarray:
                if times == 1 and state.nested_blocksize is None:
                    return arrays["weight.absmax"].reshape(grid)[rows, columns]
                row = np.arange(rows.start, rows.stop)[:, None]
                block = (row * grid[1] + np.arange(columns.start, columns.stop)) // times
                found = arrays["weight.absmax"][block]
                if state.nested_blocksize is not None:
                    found = nested_map[found] * nested[block // state.nested_blocksize]
                    found = found + np.float32(state.nested_offset)
                return found

            packed = weights.bytewise(raw, lambda b: (b << np.uint8(4)) | (b >> np.uint8(4)))
            scale = LazyArray(absmax, grid, np.dtype(np.float32))
            aux = {"codebook": arrays["weight.quant_map"].reshape(1, 16)}
            weight = weights.coded(packed, "lookup4", (n, k), scale, group, aux=aux)
            return replace(weight, rounded=state.rounded)

        return Layer(tuple(reads), decode, (states[0],))

    def _eight_bits(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer:
        n, k = shape[-2:]
        expect(module, stored, "weight", "i8", shape)
        suffix = "weight.SCB" if "weight.SCB" in stored else "SCB"
        expect(module, stored, suffix, "f32", (*shape[:-2], n), (*shape[:-2], n, 1))
        formats = tuple(s for s in ("weight_format", "weight.weight_format") if s in stored)
        act = ActSpec("int8", "token", True, outliers=self.threshold) if self.threshold else _INT8

        def decode(arrays: Arrays) -> QArray:
            for name in formats:
                if arrays[name].any():
                    raise UnsupportedError(
                        f"{module}.{name}: only the row-major layout (0) of int8 is supported"
                    )
            scale = arrays[suffix] / np.float32(127)
            return weights.coded(arrays["weight"], "int8", shape, scale, (1, k), act=act)

        return Layer(("weight", suffix, *formats), decode)

    def to_config(self) -> dict[str, Any]:
        return dict(self.values)

    @classmethod
    def for_weights(cls, weights: Mapping[str, QArray], kv_scales: int = 0) -> Self:
        if kv_scales:
            raise UnsupportedError("bitsandbytes: has no place for scales of a key-value cache")
        kinds = {m: _kind_of(m, w) for m, w in weights.items() if not is_plain(w)}
        if not kinds:
            raise UnsupportedError("bitsandbytes: no weight of this model is quantized")
        first, kind = next(iter(kinds.items()))
        for module, other in kinds.items():
            if other != kind:
                raise UnsupportedError(
                    f"{module}: bitsandbytes holds weights of one kind, but this is {other[0]} and "
                    f"{first} is {kind[0]}"
                )
        name, threshold, rounded = kind
        plain = [m for m, w in weights.items() if is_plain(w) and not is_embedding(m)]
        config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": name != "int8",
            "load_in_8bit": name == "int8",
            "llm_int8_threshold": threshold,
            # The head is left alone where nothing is said.
            "llm_int8_skip_modules": None if plain in ([], ["lm_head"]) else plain,
        }
        if name != "int8":
            config |= {
                "bnb_4bit_quant_type": name,
                "bnb_4bit_use_double_quant": False,
                "bnb_4bit_compute_dtype": rounded or "float32",
                "bnb_4bit_quant_storage": "uint8",
            }
        return cls.from_config(config, no_checkpoint())

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        n, k = weight.shape
        scale = np.asarray(weight.scale)
        if weight.qtype == "int8" and weight.group == (1, k) and weight.qvalue.ndim == 2:
            return {
                "weight": np.asarray(weight.qvalue).view(np.int8),
                "SCB": _largest(scale).reshape(n),
                "weight_format": np.zeros((), np.uint8),
            }
        if weight.qtype != "lookup4" or weight.group is None or weight.qvalue.ndim != 2:
            raise UnsupportedError(f"{module}: bitsandbytes has no layout for {weight.qtype}")
        kind = str(self.values.get("bnb_4bit_quant_type", "fp4"))
        state = {
            "quant_type": kind,
            "blocksize": weight.group[0] * weight.group[1],
            "dtype": weight.rounded or "float32",
            "shape": [n, k],
        }
        raw = np.asarray(weight.qvalue)
        text = json.dumps(state).encode()
        return {
            "weight": ((raw << np.uint8(4)) | (raw >> np.uint8(4))).reshape(-1, 1),
            "weight.absmax": scale.reshape(-1).astype(np.float32),
            "weight.quant_map": np.asarray(weight.aux["codebook"]).reshape(16),
            _STATE + kind: np.frombuffer(text, np.uint8),
        }


def to_nf4(dense: np.ndarray) -> QArray:
    """A plain weight [N, K] in the nearest values of nf4, blocks of 64 sharing their largest."""
    values = np.asarray(dense, np.float32).reshape(len(dense), -1, _BLOCK)
    largest = np.abs(values).max(-1, keepdims=True)
    table = np.array(_NF4, np.float32)
    near = values / np.where(largest > 0, largest, np.float32(1))
    found = np.searchsorted((table[1:] + table[:-1]) / 2, near).reshape(dense.shape)
    return weights.coded(
        codes.pack(found.astype(np.uint8), 4),
        "lookup4",
        dense.shape,
        largest[..., 0],
        (1, _BLOCK),
        aux={"codebook": table[None]},
        rounded=_DTYPES[dense.dtype.name],
    )


def _kind_of(module: str, weight: QArray) -> tuple[str, float, str | None]:
    """ "nf4", "fp4" or "int8", the threshold of outliers, and what weights are rounded to.

    Raises:
      UnsupportedError: bitsandbytes has no such weights.
    """
    k = weight.shape[1]
    odd = weight.zero_point is not None or weight.additive or any(weight.hadamard)
    if not odd and weight.qtype == "int8" and weight.group == (1, k) and not weight.aux:
        outliers = None if weight.act is None else weight.act.outliers
        if weight.act == replace(_INT8, outliers=outliers):
            return "int8", outliers or 0.0, None
    if not odd and weight.qtype == "lookup4" and set(weight.aux) == {"codebook"} and not weight.act:
        book = np.asarray(weight.aux["codebook"], np.float32).reshape(-1)
        for name, values in _CODEBOOKS.items():
            if np.allclose(book, values, rtol=0, atol=1e-6):
                return name, 6.0, weight.rounded
    inputs = "" if weight.act is None else f" with inputs in {weight.act.dtype}"
    raise UnsupportedError(
        f"{module}: bitsandbytes has no layout for {weight.qtype} in groups of {weight.group}"
        f"{inputs}; it has nf4 and fp4 codebooks, and int8 rows whose inputs are int8 too"
    )


def _largest(scale: np.ndarray) -> np.ndarray:
    """The largest values of rows, whose 127th parts are these scales, to the bit where there are
    such numbers."""
    scale = scale.astype(np.float32)
    result = scale * np.float32(127)
    for direction in (np.inf, -np.inf):
        near = np.nextafter(result, np.float32(direction))
        fits = (result / np.float32(127) != scale) & (near / np.float32(127) == scale)
        result = np.where(fits, near, result)
    return result


# QLoRA, appendix E; and the sign, 2 bits of exponent and 1 of mantissa of fp4, by its largest.
_NF4 = (
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
_CODEBOOKS = {"nf4": np.array(_NF4), "fp4": np.array([*_FP4, *(-value for value in _FP4)])}
# Of weights that the tool has dequantized.
_DTYPES = {"float32": None, "bfloat16": "bfloat16", "float16": "float16"}
_BLOCK = 64
_ONLINE = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
}


def _read_state(file: str, name: str, raw: np.ndarray) -> _State:
    try:
        state = json.loads(np.asarray(raw, np.uint8).tobytes())
        nested = state.get("nested_blocksize")
        found = _State(
            int(state["blocksize"]),
            tuple(int(size) for size in state["shape"]),
            None if nested is None else int(nested),
            float(state.get("nested_offset", 0.0)),
            _DTYPES[state.get("dtype", "float32")],
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"is no quant_state: {error!r:.80}", file=file, field=name) from error
    sizes = (found.blocksize, found.nested_blocksize or 1)
    if min(sizes) < 1 or not np.isfinite(found.nested_offset):
        raise CheckpointError(f"has sizes {sizes} out of range", file=file, field=name)
    return found
