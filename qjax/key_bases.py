"""In which bases the keys and queries of a model are rounded with the least harm.

A key k is cached in few bits, with one scale for its channels. Taken to another basis first, k M,
and queries to q N with N = M^-T, scores are the same, q N (k M)^T = q k^T, but what rounding adds
to them is not: about |q N|^2 |k M|^2, on the average tr(S C_k) tr(S^-1 C_q) with S = M M^T, where
C_k and C_q are the second moments of keys and queries. That is least where S is the geometric mean
of C_k^-1 and C_q (S C_k S = C_q; Pusz and Woronowicz, Rep. Math. Phys. 8, 1975), which leaves an
orthogonal matrix to choose: it takes the direction in which both now are longest to the vector of
ones, along which an int4 key's zero point leaves next to no error, and a Hadamard matrix makes all
channels alike.

The moments are those of one prompt of random tokens, which costs no text and little time. Which
tokens a model sees matters little to them: most of a key's length is the same for all.

Keys are rotated by their positions before they are cached. So the moments are averages over
positions, as many of them between 1 and 2 as between 1000 and 2000: what holds for short sequences
is not to be lost for the longest ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_update.pages import FP8, turned
from qjax import ops
from qjax.errors import RequestError
from qjax.kv_cache import PAGE_SIZE, Basis, init_cache, whole_sequences
from qjax.layers.rope import rope_tables
from qjax.models import parts
from qjax.models.config import ModelConfig
from qjax.params import Params

_TOKENS = 256  # of the prompt
_POSITIONS = 8  # that each token's heads are rotated by
# Of the mean of the moments' eigenvalues, added to all of them: so much is left to chance.
_UNSEEN = 0.3


def key_bases(
    params: Params, dtypes: str | Sequence[str], numerics: str = "exact"
) -> tuple[Basis | None, ...]:
    """A basis for each layer whose cache gains by it, to make a cache with.

    The model runs once, over 256 tokens, outside `jax.jit`; what was found is kept with
    `params.host`.

    Args:
      dtypes: of the cache, one for all layers or one for each. Those of 4 bits gain, and 8-bit
        floats where no scales came with the model.
      numerics: as in `Batch`.

    Raises:
      RequestError: the model gives keys or queries that are not finite.
    """
    config = params.config
    names = [dtypes] * config.num_layers if isinstance(dtypes, str) else dtypes
    gains = [gains_by_basis(dtype, config.kv_scales) for dtype in names]
    if not any(gains):
        return (None,) * config.num_layers
    found, which = params.host.key_bases, (config, params.mesh, numerics)
    if which not in found:
        found[which] = _find(params, numerics)
    return tuple(basis if gain else None for basis, gain in zip(found[which], gains, strict=True))


def gains_by_basis(dtype: str, kv_scales: int = 0) -> bool:
    """Whether a cache of `dtype` gets a basis; `kv_scales` scales came with the model. int8 could,
    but is near enough to spare a model the run."""
    return dtype == "int4" or (dtype in FP8 and not kv_scales)


def _find(params: Params, numerics: str) -> tuple[Basis, ...]:
    """The basis of every layer, on the host."""
    config = params.config
    # Devices that are more than there are heads of keys have copies of them, one after another.
    copies = parts.cache_config(params).num_kv_heads // config.num_kv_heads
    random = np.random.default_rng(0)
    length = min(_TOKENS, config.max_position_embeddings)
    tokens = random.integers(0, config.vocab_size, length, np.int32)
    records = jax.device_get(_record(numerics, params, tokens))
    share = random.random(length * _POSITIONS)
    positions = np.exp(share * np.log(config.max_position_embeddings)).astype(np.int32) - 1
    bases = []
    for layer, heads in enumerate(records):
        if not all(np.isfinite(x).all() for x in heads):
            raise RequestError(
                f"layer {layer} gives keys or queries that are not finite: no cache of 4 bits, nor "
                "of 8-bit floats, can be made for this model; check its weights."
            )
        keys, queries = heads
        of = partial(_moments, config=config, layer=layer, positions=positions)
        basis = _basis(of(keys[:, ::copies]), of(queries))
        bases.append(Basis(*(np.repeat(matrix, copies, 0) for matrix in basis)))
    return tuple(bases)


@partial(jax.jit, static_argnums=0)
def _record(numerics: str, params: Params, tokens: jax.Array) -> list[tuple[jax.Array, ...] | None]:
    """Keys and queries of every layer, before they are rotated: float32 [T, H, D]."""
    batch = whole_sequences(1, len(tokens), numerics)
    config = parts.cache_config(params)
    cache = init_cache(config, batch.block_table.size, PAGE_SIZE, "float32")
    asking = tuple(layer._replace(seen=()) for layer in cache)
    return [layer.seen for layer in parts.run(params, tokens, batch, asking)[1]]


def _moments(
    heads: np.ndarray, config: ModelConfig, layer: int, positions: np.ndarray
) -> np.ndarray:
    """Second moments of heads [T, H, D] for each KV head, float64 [num_kv_heads, D, D], of trace 1
    but for what is added to them. Of latent attention the heads were rotated already."""
    if config.mla is None:
        tables = rope_tables(config.rope_for(config.layer_types[layer]), jnp.asarray(positions))
        heads = np.asarray(ops.rotate(jnp.asarray(np.repeat(heads, _POSITIONS, 0)), tables))
    runs = heads.astype(np.float64).reshape(len(heads), config.num_kv_heads, -1, heads.shape[-1])
    rows = runs.swapaxes(0, 1).reshape(runs.shape[1], -1, runs.shape[-1])
    moments = rows.swapaxes(1, 2) @ rows
    size = moments.shape[-1]
    trace = np.trace(moments, axis1=1, axis2=2)[:, None, None]
    moments = moments / np.where(trace > 0, trace, 1)
    return moments + np.eye(size) * _UNSEEN / size


def _basis(keys: np.ndarray, queries: np.ndarray) -> Basis:
    """Of their second moments, [H, D, D] each and positive definite."""
    root, inverse = _power(keys, 0.5), _power(keys, -0.5)
    mean = inverse @ _power(root @ queries @ root, 0.5) @ inverse
    forth, back = _power(mean, 0.5), _power(mean, -0.5)
    longest = np.linalg.eigh(forth @ keys @ forth)[1][..., -1]
    turn = _to_ones(longest)
    return Basis(*((matrix @ turn).astype(np.float32) for matrix in (forth, back)))


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """Of symmetric positive definite matrices [H, D, D]."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values[:, None] ** exponent) @ vectors.swapaxes(1, 2)


def _to_ones(direction: np.ndarray) -> np.ndarray:
    """Orthogonal matrices [H, D, D] that take the unit vectors `direction` [H, D] to equal
    channels: a reflection, then what spreads each channel over all."""
    size = direction.shape[-1]
    spread = np.asarray(turned(jnp.eye(size)), np.float64)
    ones = np.ones(size) / np.sqrt(size)
    first = ones @ spread.T  # what comes out as ones
    sign = np.where(direction @ first < 0, -1.0, 1.0)[:, None]
    between = sign * direction - first
    length = np.linalg.norm(between, axis=-1, keepdims=True)
    between = between / np.where(length < 1e-9, 1, length)
    reflection = np.eye(size) - 2 * between[:, :, None] * between[:, None]
    return reflection @ spread
