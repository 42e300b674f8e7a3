"""The Hadamard transform of runs of columns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import platform


def hadamard(x: jax.Array, size: int) -> jax.Array:
    """Runs of `size` columns of x [..., K], each multiplied by a normalized Hadamard matrix.

    Sylvester's construction, H_2n = [[H_n, H_n], [H_n, -H_n]], one doubling a step: the fast
    Walsh-Hadamard transform.
    """
    if platform.device_kind() != "cpu":
        # Steps on narrow arrays cost an accelerator more than a product does.
        runs = x.reshape(*x.shape[:-1], -1, size)
        return jnp.matmul(runs, _matrix(size), precision=lax.Precision.HIGHEST).reshape(x.shape)
    runs = x.reshape(-1, size)
    half = 1
    while half < size:
        pairs = runs.reshape(-1, 2, half)
        runs = jnp.concatenate([pairs[:, :1] + pairs[:, 1:], pairs[:, :1] - pairs[:, 1:]], axis=1)
        half *= 2
    return runs.reshape(x.shape) * np.float32(size**-0.5)


def _matrix(size: int) -> np.ndarray:
    matrix = np.full((1, 1), size**-0.5, np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
