"""Which implementation would take a weight, asked without running anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import codes, dispatch, platform
from pallas_kernels.inputs import ActSpec
from pallas_kernels.matmul import api
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec


@dataclass(frozen=True)
class Support:
    """An answer.

    Attributes:
      implementation: that runs the product.
      treats_inputs: whether it rounds inputs as the method says, or jax does so beforehand; None
        where they are left as they are.
      refused: why each implementation that is preferred to it does not run.
    """

    implementation: str
    treats_inputs: bool | None
    refused: Mapping[str, str]


def supports(
    spec: WeightSpec, act: ActSpec | None = None, device_kind: str | None = None
) -> Support:
    """What would run for a canonical weight.

    A weight of zeros is laid out as a stored one would be, and the product is traced.

    Args:
      spec: of the weight; its shape may be small, as long as groups fit.
      act: what its method does to inputs.
      device_kind: "cpu", "gpu" or "tpu"; None for the device of this process.

    Raises:
      NotImplementedError: nothing takes it.
    """
    with platform.assume(device_kind):
        spec, arrays = api.prepare(spec, _zeros(spec))
        treats = None if act is None else api.takes_inputs([spec], act)
        x = jax.ShapeDtypeStruct((1, spec.shape[1]), jnp.float32)
        name = f"matmul {spec.qtype}"
        jax.eval_shape(lambda x: api.matmul(x, [(spec, arrays)]), x)
        implementation, refused = dispatch.chosen()[name]
    return Support(implementation, treats, refused)


def _zeros(spec: WeightSpec) -> WeightArrays:
    def zeros(dtype: str | None) -> np.ndarray | None:
        return None if dtype is None else np.zeros(spec.scale_shape, jnp.dtype(dtype))

    lookup = not spec.is_blocks and codes.CODES[spec.qtype].kind == "lookup"
    entries = 1 << codes.CODES[spec.qtype].bits if lookup else 0
    return WeightArrays(
        np.zeros(spec.canonical_shape, np.uint8),
        zeros(spec.scale),
        zeros(spec.zero_point),
        np.ones((1, 1), np.float32) if spec.has_global_scale else None,
        np.zeros((1, entries), np.float32) if lookup else None,
    )
