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
from jax.sharding import NamedSharding

from pallas_kernels import platform
from qjax.kv_cache import Basis, KVCache, init_cache
from qjax.models.parts import Parts, cache_config
from qjax.params import Params


def device_cache(
    params: Params,
    num_pages: int,
    page_size: int,
    dtypes: str | Sequence[str],
    bases: Sequence[Basis | None] | None = None,
) -> tuple[KVCache, Any]:
    """An empty cache for a model where its weights are, and the cache's `cache_formats`."""
    make = partial(init_cache, cache_config(params), num_pages, page_size, dtypes)
    if params.mesh is not None:
        shapes = make(jax.ShapeDtypeStruct, bases)
        parts = Parts(params.mesh, params.config)
        shardings = parts.placed(parts.cache_specs(shapes))
        formats = cache_formats(shapes, shardings)
        made = jax.jit(lambda: make(bases=bases), out_shardings=formats or shardings)()
        return made, formats
    shapes, one = make(jax.ShapeDtypeStruct, bases), jax.device_put(0).sharding
    formats = cache_formats(shapes, one)
    if formats is None:
        # Copied, since a donated array must be the device's own.
        return jax.device_put(make(np.zeros, bases), may_alias=False), None
    return jax.jit(lambda bases: make(bases=bases), out_shardings=formats)(bases), formats


def cache_formats(cache: KVCache, shardings: Any) -> Any:
    """A Format for each array of a cache, or None where the device's own way is right.

    Args:
      cache: of jax.Array or jax.ShapeDtypeStruct.
      shardings: which devices have it; one, or one for each of its arrays.
    """
    if platform.device_kind() != "tpu":
        return None

    def row_major(x: Any, sharding: Any) -> Format:
        return Format(Layout(major_to_minor=tuple(range(len(x.shape)))), sharding)

    return jax.tree.map(row_major, cache, jax.tree.broadcast(shardings, cache))


def cache_shapes(cache: KVCache, formats: Any) -> Any:
    """The jax.ShapeDtypeStruct of each array of a cache of these formats, to compile for."""
    if formats is None:
        return jax.tree.map(shape_of, cache)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)
    return jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), structs, formats
    )


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """What a program is compiled for: where an array lies counts where several devices have it."""
    several = isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if several else None)
