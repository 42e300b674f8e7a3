"""The oracle: every row with the weight of its own expert, all of them decoded."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import ref
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec, require_canonical


def matmul_grouped(
    x: jax.Array,
    group_sizes: jax.Array,
    weight: tuple[WeightSpec, WeightArrays],
    *,
    bias: jax.Array | None,
    activation_dtype: str,
) -> jax.Array:
    """See `pallas_kernels.matmul_grouped.api.matmul_grouped`."""
    spec, arrays = weight
    require_canonical(spec)
    if activation_dtype != "float32":
        raise NotImplementedError(f"activations rounded to {activation_dtype}")
    experts = len(group_sizes)
    owner = jnp.repeat(
        jnp.arange(experts + 1),
        jnp.append(group_sizes, len(x) - group_sizes.sum()),
        total_repeat_length=len(x),
    )
    owner = jnp.minimum(owner, experts - 1)
    decoded = jnp.stack([ref.decode(spec, _of(arrays, expert)) for expert in range(experts)])
    y = jnp.einsum("tk,tnk->tn", x, decoded[owner], precision="highest")
    return y if bias is None else y + bias[owner]


def _of(arrays: WeightArrays, expert: int) -> WeightArrays:
    return WeightArrays(*(None if array is None else array[expert] for array in arrays))
