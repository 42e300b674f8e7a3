"""What a device's memory has to hold: weights, cache, and what the largest step works with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.kv_update.pages import Basis
from qjax.engine.engine import BLOCK_SIZE
from qjax.key_bases import gains_by_basis
from qjax.kv_cache import init_cache
from qjax.models.config import ModelConfig

_LANES = 128  # of a TPU: see `qjax.engine.device_cache`


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      weights, cache, workspace: what it is to hold.
      usable: what it may hold.
      max_num_seqs: sequences of the greatest length whose cache would fit beside the rest.
      max_tokens: likewise, tokens of all sequences together.
    """

    weights: int
    cache: int
    workspace: int
    usable: int
    max_num_seqs: int
    max_tokens: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace

    @property
    def fits(self) -> bool:
        return self.total <= self.usable


def memory(
    local: ModelConfig,
    weights: int,
    dtypes: Sequence[str],
    usable: int,
    *,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> Memory:
    """What a device holds that has `weights` bytes of a model's weights.

    Args:
      local: config of its part.
      dtypes: of the cache of each layer.
    """
    pages = -(-max_model_len // BLOCK_SIZE)
    cache = Cache.of(local, dtypes)
    work = workspace(local, max_model_len, max_num_seqs, max_num_batched_tokens)
    room = max(0, usable - weights - work - cache.fixed) // cache.page
    return Memory(
        weights,
        cache.nbytes(pages * max_num_seqs),
        work,
        usable,
        room // pages,
        room * BLOCK_SIZE,
    )


@dataclass(frozen=True)
class Cache:
    """Bytes of one device's cache.

    Attributes:
      fixed: of what turns keys and queries, see `qjax.key_bases`.
      pages: of one page, for each layer.
    """

    fixed: int
    pages: tuple[int, ...]

    @classmethod
    def of(cls, local: ModelConfig, dtypes: Sequence[str]) -> Cache:
        """Of a device's config."""
        matrices = jax.ShapeDtypeStruct(
            (local.num_kv_heads, local.head_dim, local.head_dim), jnp.float32
        )
        basis = Basis(matrices, matrices)
        bases = [basis if gains_by_basis(dtype, local.kv_scales) else None for dtype in dtypes]
        cache = init_cache(local, 1, BLOCK_SIZE, dtypes, jax.ShapeDtypeStruct, bases)
        pages = tuple(_bytes_of((layer.keys, layer.values)) for layer in cache)
        return cls(sum(_bytes_of(layer.basis) for layer in cache), pages)

    @property
    def page(self) -> int:
        """Bytes of one page in all layers."""
        return sum(self.pages)

    def nbytes(self, pages: int) -> int:
        return self.fixed + pages * self.page


def _bytes_of(tree: Any) -> int:
    return sum(map(_array_bytes, jax.tree.leaves(tree)))


def _array_bytes(array: Any) -> int:
    *outer, inner = array.shape
    if platform.device_kind() == "tpu":  # whose rows are whole
        inner = -(-inner // _LANES) * _LANES
    return math.prod((*outer, inner)) * jnp.dtype(array.dtype).itemsize


def workspace(
    local: ModelConfig, max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int
) -> int:
    """Of the largest step: float32 activations around its widest layer, or its logits.

    The stream, what of it is normed, what is added to it, here and by all devices; beside these the
    heads of a layer, or its hidden units (gate, up and their product; of experts, for each that a
    token goes to). The logits of all sequences, their copy with filters and what is drawn from. An
    estimate: XLA may hold more where no kernel of ours runs, and weights are decoded outside of it.
    """
    tokens = min(max_num_batched_tokens, max_model_len * max_num_seqs)
    heads = 2 * (local.num_heads + local.num_kv_heads) * local.head_dim
    hidden = 3 * local.intermediate_size
    moe = local.moe
    if moe is not None and any(moe.layers):
        each = 2 * local.hidden_size + 3 * moe.intermediate_size
        hidden = max(hidden, moe.router.top_k * each + 3 * moe.shared_size)
    layer = tokens * (4 * local.hidden_size + max(heads, hidden))
    return 4 * max(layer, 3 * max_num_seqs * local.vocab_size)
