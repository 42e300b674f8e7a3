"""The kernel of cache updates on TPUs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def blend(
    page: jax.Array,
    low: jax.Array,
    high: jax.Array,
    new: Sequence[jax.Array],
    pages: Sequence[jax.Array],
    interpret: bool,
) -> Sequence[jax.Array]:
    """Slots low to high of some pages get new values, in place.

    Args:
      page, low, high: int32 [W]. A page comes up in one window only, or again right after it with
        nothing new.
      new: some arrays [W, H, page_size, ...].
      pages: as many [P, H, page_size, ...].
    """

    def block(x: jax.Array, of_page: bool) -> pl.BlockSpec:
        rest = (0,) * (x.ndim - 1)
        return pl.BlockSpec(
            (None, *x.shape[1:]),
            lambda w, page, low, high: (page[w] if of_page else w, *rest),
        )

    return pl.pallas_call(
        partial(_kernel, arrays=len(new)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(len(page),),
            in_specs=[*(block(x, False) for x in new), *(block(x, True) for x in pages)],
            out_specs=[block(x, True) for x in pages],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pages],
        input_output_aliases={3 + len(new) + i: i for i in range(len(new))},
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="kv_update",
    )(page, low, high, *new, *pages)


def _kernel(page_ref, low_ref, high_ref, *refs, arrays):
    del page_ref  # what the blocks are found by
    window = pl.program_id(0)
    low, high = low_ref[window], high_ref[window]

    # The first one writes its page even with nothing new: otherwise it would write garbage.
    @pl.when((high > 0) | (window == 0))
    def _():
        groups = (refs[i * arrays : (i + 1) * arrays] for i in range(3))
        for new, old, out in zip(*groups, strict=True):
            slot = lax.broadcasted_iota(jnp.int32, out.shape, 1)
            wide = jnp.float32 if jnp.issubdtype(out.dtype, jnp.floating) else jnp.int32
            fresh = (slot >= low) & (slot < high)
            out[...] = jnp.where(fresh, new[...].astype(wide), old[...].astype(wide)).astype(
                out.dtype
            )
