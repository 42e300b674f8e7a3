"""bitsandbytes: 4-bit codebooks (nf4, fp4; QLoRA, arXiv 2305.14314) and LLM.int8 (2208.07339).

4-bit weights are blocks of the flattened matrix: W.flat[i] = code[q[i]] * absmax[i // blocksize],
the first of two codes in the high half of a byte. absmax may itself be quantized ("double
quantization"); it is decoded to float32 when it is read, which costs 0.37 bits a weight in blocks
of 64. 8-bit weights have a scale for each output; inputs are rounded to int8 row by row, but for
columns in which a value reaches the threshold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats import weights
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
)
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
    """

    threshold: float
    values: Mapping[str, Any]
    checkpoint: Checkpoint

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
        return cls(threshold, config, checkpoint)

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        states = [suffix for suffix in stored if suffix.startswith(_STATE)]
        if states:
            return self._four_bits(module, stored, shape, states)
        record = expect(module, stored, "weight")
        if record.qtype == "i8":
            return self._eight_bits(module, stored, shape)
        if record.qtype in PLAIN:
            return None
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
        group, times = weights.flat_group(where, (n, k), state.blocksize)
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
            absmax = arrays["weight.absmax"]
            if state.nested_blocksize is not None:
                outer = np.repeat(arrays["weight.nested_absmax"], state.nested_blocksize)[:blocks]
                absmax = arrays["weight.nested_quant_map"][absmax] * outer
                absmax = absmax + np.float32(state.nested_offset)
            if times > 1:  # the last block may be shorter
                absmax = np.repeat(absmax, times)[: n * k // group[1]]
            raw = np.ascontiguousarray(arrays["weight"]).view(np.uint8).reshape(n, k // 2)
            swapped = (raw << np.uint8(4)) | (raw >> np.uint8(4))
            aux = {"codebook": arrays["weight.quant_map"].reshape(1, 16)}
            weight = weights.coded(swapped, "lookup4", (n, k), absmax, group, aux=aux)
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

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        n, k = weight.shape
        scale = np.asarray(weight.scale)
        if weight.qtype == "int8" and weight.group == (1, k) and weight.qvalue.ndim == 2:
            return {
                "weight": np.asarray(weight.qvalue).view(np.int8),
                "SCB": (scale * np.float32(127)).reshape(n),
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


# Of weights that the tool has dequantized.
_DTYPES = {"float32": None, "bfloat16": "bfloat16", "float16": "float16"}


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
