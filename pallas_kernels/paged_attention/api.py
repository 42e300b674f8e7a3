"""The one entry to attention: checks the call, then dispatches it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, platform, tuning
from pallas_kernels.kv_update import api as kv_update
from pallas_kernels.kv_update.pages import FP8, Basis, Pages, empty, turns_keys
from pallas_kernels.paged_attention import native, ref, tpu, triton, xla
from pallas_kernels.paged_attention.after_update import after_update
from pallas_kernels.paged_attention.spec import AttentionSpec

_ATTEND = {"triton": triton.attend, "tpu": tpu.attend, "xla": xla.attend, "ref": ref.attend}
IMPLEMENTATIONS: dispatch.Implementations = (
    ("native", native.paged_attention),
    *((name, after_update(update, _ATTEND[name])) for name, update in kv_update.IMPLEMENTATIONS),
)


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    *,
    spec: AttentionSpec,
    block_table: jax.Array,
    query_start_loc: jax.Array,
    seq_lens: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None = None,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    norm_eps: float = 0.0,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    basis: Basis | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Pages, Pages]:
    """Writes the keys and values of new tokens into the cache, then attends with their queries.

    Token t of sequence s, query_start_loc[s] <= t < query_start_loc[s + 1], stands at position
    p = seq_lens[s] - (query_start_loc[s + 1] - t), in slot p % page_size of page
    block_table[s, p // page_size], and sees the positions up to its own. Prefill, chunked prefill
    and decode may be mixed in one call. Tokens from query_start_loc[S] on are padding: they write
    nothing and their outputs are unspecified.

    Args:
      q: float32 [T, num_heads * head_dim]. k, v: float32 [T, num_kv_heads * head_dim].
      k_pages, v_pages: both of the same dtype, see `Pages`. How a page is laid out inside is
        private to the implementation: a cache belongs to the one that wrote it.
      block_table: int32 [S, B]. query_start_loc: int32 [S + 1]. seq_lens: int32 [S], new tokens
        included.
      rope: (cos, sin), float32 [T, rotary_dim / 2]. The two halves (x1, x2) of the rotary
        dimensions become (x1 cos - x2 sin, x2 cos + x1 sin) (RoFormer, arXiv 2104.09864, in the
        half-split order of Hugging Face).
      q_norm, k_norm: float32 [head_dim], RMSNorm of each head before rope, with `norm_eps`.
      sinks: float32 [num_heads]. A score of each head that enters the sum of its softmax, and has
        no value (attention sinks, arXiv 2309.17453, as gpt-oss learns them).
      k_scale, v_scale: float32 [1] or [num_kv_heads], of float8 pages; None is 1.
      basis: what keys and queries are multiplied by in place of a Hadamard matrix, for pages whose
        keys are turned. All calls on a cache take the same.
      implementation: "native", "triton", "tpu", "xla" or "ref"; None for the first that takes it.

    Returns:
      (float32 [T, num_heads * head_dim], k_pages, v_pages), the pages updated.

    Raises:
      ValueError: shapes contradict each other.
      NotImplementedError: no implementation, or not the named one, takes the call.
    """
    tokens = q.shape[0]
    expected: dict[str, tuple[jax.Array, tuple[int, ...]]] = {
        "q": (q, (tokens, spec.num_heads * spec.head_dim)),
        "k": (k, (tokens, spec.num_kv_heads * spec.head_dim)),
        "v": (v, (tokens, spec.num_kv_heads * spec.head_dim)),
    }
    if rope is not None:
        expected |= {"cos": (rope[0], (tokens, spec.rotary_dim // 2))}
        expected |= {"sin": (rope[1], (tokens, spec.rotary_dim // 2))}
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            expected[name] = weight, (spec.head_dim,)
    if sinks is not None:
        expected["sinks"] = sinks, (spec.num_heads,)
    for name, array in {} if basis is None else basis._asdict().items():
        expected[f"basis of {name}"] = array, (spec.num_kv_heads, spec.head_dim, spec.head_dim)
    for name, (array, shape) in expected.items():
        if array.shape != shape or array.dtype != jnp.float32:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, expected float32 {shape}")
    _check_pages(k_pages, v_pages, spec)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        if k_pages.dtype not in FP8:
            raise ValueError(f"{name} belongs to float8 pages, these are {k_pages.dtype}")
        if scale.shape not in ((1,), (spec.num_kv_heads,)) or scale.dtype != jnp.float32:
            raise ValueError(
                f"{name} is {scale.dtype} {scale.shape}, expected float32 (1,) or "
                f"({spec.num_kv_heads},)"
            )
    if basis is not None and not turns_keys(k_pages.dtype, k_scale):
        raise ValueError(f"a basis for keys that {k_pages.dtype} pages hold as they are")
    sequences = seq_lens.shape[0]
    if query_start_loc.shape != (sequences + 1,) or block_table.shape[0] != sequences:
        raise ValueError(
            f"{sequences} sequence lengths with query_start_loc {query_start_loc.shape} and "
            f"block_table {block_table.shape}"
        )
    return dispatch.call(
        "paged_attention",
        IMPLEMENTATIONS,
        q,
        k,
        v,
        k_pages,
        v_pages,
        spec=spec,
        block_table=block_table,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        rope=rope,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=norm_eps,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        basis=basis,
        implementation=implementation,
        preferred=_preferred(tokens, k_pages, spec, block_table),
    )


def _preferred(
    tokens: int, k_pages: Pages, spec: AttentionSpec, block_table: jax.Array
) -> str | None:
    """The implementation measured fastest; none on a CPU, where a cache belongs to the one that
    wrote it, whatever would be faster for the call at hand."""
    if platform.device_kind() == "cpu":
        return None
    slots = max(block_table.shape[1], 1) * k_pages.page_size
    kind = tuning.attention_kind(k_pages.dtype, spec.head_dim)
    return tuning.preferred("paged_attention", kind, max(tokens, 1), spec.num_kv_heads, slots)


def _check_pages(k_pages: Pages, v_pages: Pages, spec: AttentionSpec) -> None:
    """Raises ValueError where the pages are not those of this layer."""
    count, _, page_size = k_pages.values.shape[:3]
    shape = (count, spec.num_kv_heads, page_size, spec.head_dim)
    expected = empty(shape, k_pages.dtype, jax.ShapeDtypeStruct)
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        for field, found, wanted in zip(Pages._fields, pages, expected, strict=True):
            got = None if found is None else (jnp.dtype(found.dtype).name, found.shape)
            right = None if wanted is None else (jnp.dtype(wanted.dtype).name, wanted.shape)
            if got != right:
                raise ValueError(f"{field} of {name} is {got}, expected {right}")
