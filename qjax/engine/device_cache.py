"""Where a cache lies, and how: a TPU is told to keep its rows as they are.

A TPU has rows of 128 lanes. Of an array with fewer in its last axis, XLA makes pages the last one,
to fill them; its kernels, which take pages whole, would then get a copy of the cache, and the cache
a copy of what they return. So the last axis is kept, and the rest of its lanes stays empty: heads
of 64 dimensions take the memory of 128, and those of 128 in 4 bits, two to a byte, that of 8 bits.
The copies would take as much, beside the cache itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout

from pallas_kernels import platform
from qjax.kv_cache import Basis, KVCache, init_cache
from qjax.models.config import ModelConfig


def device_cache(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtypes: str | Sequence[str],
    bases: Sequence[Basis | None] | None = None,
) -> tuple[KVCache, Any]:
    """An empty cache on the default device, and its `cache_formats`."""
    make = partial(init_cache, config, num_pages, page_size, dtypes)
    formats = cache_formats(make(jax.ShapeDtypeStruct, bases), jax.device_put(0).sharding)
    if formats is None:
        # Copied, since a donated array must be the device's own.
        return jax.device_put(make(np.zeros, bases), may_alias=False), None
    return jax.jit(lambda bases: make(bases=bases), out_shardings=formats)(bases), formats


def cache_formats(cache: KVCache, sharding: Any) -> Any:
    """A Format for each array of a cache, or None where the device's own way is right.

    Args:
      cache: of jax.Array or jax.ShapeDtypeStruct.
      sharding: which devices have it.
    """
    if platform.device_kind() != "tpu":
        return None

    def row_major(x: Any) -> Format:
        return Format(Layout(major_to_minor=tuple(range(len(x.shape)))), sharding)

    return jax.tree.map(row_major, cache)


def cache_shapes(cache: KVCache, formats: Any) -> Any:
    """The jax.ShapeDtypeStruct of each array of a cache of these formats, to compile for."""
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)
    if formats is None:
        return structs
    return jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), structs, formats
    )
