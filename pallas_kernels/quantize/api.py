"""The one entry to quantization of activations: checks the call, then dispatches it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.inputs import ActSpec, Inputs
from pallas_kernels.quantize import ref, tpu, triton, xla
from pallas_kernels.quantize.spec import Quantized

IMPLEMENTATIONS: dispatch.Implementations = (
    ("triton", triton.quantize),
    ("tpu", tpu.quantize),
    ("xla", xla.quantize),
    ("ref", ref.quantize),
)


def quantize(
    x: jax.Array,
    act: ActSpec,
    inputs: Inputs | None = None,
    *,
    num_rows: jax.Array | None = None,
    implementation: str | None = None,
) -> Quantized:
    """The codes with which x is nearest to (codes - zero_point) * scale, and these.

    Args:
      x: float32 or bfloat16 [T, K].
      act: what to quantize to.
      inputs: static scales, or the global scale of computed ones, where `act` wants them; other
        fields are not looked at.
      num_rows: int32 [1]. Rows from num_rows[0] on are padding, which no scale depends on.
      implementation: "triton", "tpu", "xla" or "ref"; None for the first that takes the call.

    Raises:
      ValueError: shapes or dtypes are others, a scale is missing, or `act` leaves outliers as they
        are: such inputs have no codes.
      NotImplementedError: no implementation, or not the named one, takes the call.
    """
    if x.ndim != 2 or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x is {x.dtype} {x.shape}, expected float32 or bfloat16 (T, K)")
    if reason := refused(act):
        raise ValueError(f"activations {reason} have no codes")
    inputs = inputs or Inputs()
    for name, wanted in ("scale", not act.dynamic), ("global_scale", act.scale == "fp8_e4m3"):
        array = getattr(inputs, name)
        if wanted and (array is None or array.shape != (1, 1)):
            found = None if array is None else array.shape
            raise ValueError(f"quantize: {name} is {found}, expected (1, 1)")
    return dispatch.call(
        f"quantize {act.dtype}",
        IMPLEMENTATIONS,
        x,
        act,
        inputs,
        num_rows=num_rows,
        implementation=implementation,
    )


def refused(act: ActSpec) -> str | None:
    """Why activations quantized so have no codes, or None where they have."""
    return None if act.outliers is None else "of which outliers stay as they are"
