"""A stored weight as the plain matrix that it means for unrounded inputs."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.hadamard import hadamard
from qjax.qarray import QArray


def dequantized(weight: QArray) -> np.ndarray:
    """float32 [..., N, K] of a canonical weight: columns and rows in their usual order, scales of
    inputs, rotations and low-rank terms multiplied in. Not to be written to.

    What is rounded of its inputs has no place in a matrix and is left out.
    """
    aux = weight.aux
    w = weight.to_numpy()
    if "perm" in aux:
        stored, order = w, np.broadcast_to(aux["perm"], (*w.shape[:-2], 1, w.shape[-1]))
        w = np.empty_like(stored)
        np.put_along_axis(w, np.broadcast_to(order, w.shape), stored, axis=-1)
    if "output_perm" in aux:
        w = w[..., np.asarray(aux["output_perm"])[0], :]
    # Inputs are scaled first and then rotated; a normalized Hadamard matrix is symmetric.
    if weight.hadamard[0]:
        w = np.asarray(hadamard(jnp.asarray(w), weight.hadamard[0]))
    if "lora_a" in aux:
        w = w + np.asarray(aux["lora_b"], np.float32) @ np.asarray(aux["lora_a"], np.float32)
    if "act_pre_scale" in aux:
        w = w * np.asarray(aux["act_pre_scale"], np.float32)
    if weight.hadamard[1]:
        columns = jnp.asarray(w).swapaxes(-1, -2)
        w = np.asarray(hadamard(columns, weight.hadamard[1])).swapaxes(-1, -2)
    return np.ascontiguousarray(w)
