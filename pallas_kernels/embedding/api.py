"""The one entry to table look-ups: checks the call, then dispatches it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.embedding import native, ref, xla
from pallas_kernels.matmul.api import as_arrays, check_weight
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec

IMPLEMENTATIONS: dispatch.Implementations = (
    ("native", native.embedding),
    ("xla", xla.embedding),
    ("ref", ref.embedding),
)


def embedding(
    ids: jax.Array,
    table: tuple[WeightSpec, WeightArrays | jax.Array],
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Decodes the rows `ids` of a table.

    Args:
      ids: int32 [T]. Ids outside the table are clipped to it.
      table: spec with shape (N, K), and its arrays.
      implementation: "native", "xla" or "ref"; None for the first that takes the call.

    Returns:
      float32 [T, K].

    Raises:
      ValueError: ids are not int32 [T].
      NotImplementedError: no implementation, or not the named one, takes the call.
    """
    if ids.ndim != 1 or ids.dtype != jnp.int32:
        raise ValueError(f"ids are {ids.dtype} {ids.shape}, expected int32 (T,)")
    spec, arrays = table[0], as_arrays(table[1])
    check_weight(spec, arrays)
    op = f"embedding {spec.qtype}"
    return dispatch.call(op, IMPLEMENTATIONS, ids, (spec, arrays), implementation=implementation)
