"""A vocabulary of which each device has a part, in order; or, in one part, all of it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from qjax.sharding import MODEL, Parallel


@dataclass(frozen=True)
class Vocabulary:
    """Attributes:
    parts: devices that share it.
    """

    parts: int = 1

    @classmethod
    def of(cls, parallel: Parallel | None) -> Vocabulary:
        return cls(parallel.size if parallel is not None and parallel.vocabulary else 1)

    def offset(self, size: int) -> jax.Array | int:
        """The first token of this device's part, of `size` tokens."""
        return 0 if self.parts == 1 else lax.axis_index(MODEL) * size

    def own(self, ids: jax.Array, size: int) -> jax.Array:
        """Where tokens stand in this part, int32; `size` for those that are not in it."""
        if self.parts == 1:
            return ids
        own = ids - self.offset(size)
        return jnp.where((own >= 0) & (own < size), own, size)

    def gathered(self, x: jax.Array) -> jax.Array:
        """[S, n] of each part, one after another: [S, parts * n]."""
        return x if self.parts == 1 else lax.all_gather(x, MODEL, axis=1, tiled=True)

    def total(self, x: jax.Array) -> jax.Array:
        return x if self.parts == 1 else lax.psum(x, MODEL)

    def largest(self, x: jax.Array) -> jax.Array:
        return x if self.parts == 1 else lax.pmax(x, MODEL)
