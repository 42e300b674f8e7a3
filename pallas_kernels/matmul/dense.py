"""The layout of plain floats on accelerators: an array [N, K] of their own dtype.

Bytes that are joined in every step cost a GPU a copy of the weight, and a TPU, whose registers are
rows of 128 numbers, far more.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul.spec import CANONICAL, WeightArrays, WeightSpec

LAYOUT = "dense"
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def prepare(spec: WeightSpec, arrays: WeightArrays) -> tuple[WeightSpec, WeightArrays]:
    """A canonical weight (numpy) of one of `DTYPES` in this layout, without a copy.

    Raises:
      NotImplementedError: it is of another type.
    """
    if spec.qtype not in DTYPES:
        raise NotImplementedError(f"{spec.qtype} weights are not plain floats")
    floats = np.ascontiguousarray(arrays.qvalue).view(jnp.dtype(DTYPES[spec.qtype]))
    return replace(spec, layout=LAYOUT), WeightArrays(floats)


def unprepare(spec: WeightSpec, arrays: WeightArrays) -> tuple[WeightSpec, WeightArrays]:
    """The canonical weight that `prepare` was given."""
    raw = np.ascontiguousarray(arrays.qvalue).view(np.uint8)
    return replace(spec, layout=CANONICAL), WeightArrays(raw)
