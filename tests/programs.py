"""`qjax.forward` as one program: by itself, each operation on each shape would be one."""

import jax

import qjax

forward = jax.jit(
    qjax.forward, static_argnames=("numerics", "kv_cache_dtype", "kv_cache_dtype_skip_layers")
)
