"""Rotations folded into weights (QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406).

With an orthogonal Q, a residual stream x Q instead of x carries the same, and no channel of it is
an outlier any more. RMS norms commute with Q once their weights are folded into the layers that
read them; those then become W Q, and the layers that write to the stream Q^T W (R1). In the same
way the values of each head can be rotated (R2), between `v_proj` and `o_proj`. The model computes
what it did, and runs as it did.

Q is a Hadamard matrix where the size is a power of two. Another size is 2^a * m: there Q is the
Kronecker product of the orthonormal DCT-II of order m and the Hadamard matrix of order 2^a, whose
entries are all of about the same size, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hadamard import hadamard
from qjax.compress.mappings import scalings
from qjax.errors import UnsupportedError
from qjax.models.config import ModelConfig

_WRITERS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q [size, size].

    Attributes:
      run: columns that a Hadamard matrix mixes, a power of two that divides `size`.
      mixed: whether the runs are mixed with each other, too.
      seed: of the random signs that the rows of Q are multiplied with; None for none.
    """

    size: int
    run: int
    mixed: bool
    seed: int | None = None

    @staticmethod
    def of(size: int, block: int | None = None, seed: int | None = None) -> Rotation:
        """The rotation of a size; or of blocks of it, each for itself.

        Raises:
          UnsupportedError: a block that is no power of two, or does not divide the size.
        """
        run = size & -size if block is None else block
        if run < 1 or run & (run - 1) or size % run:
            fitting = [1 << i for i in range(1, size.bit_length()) if size % (1 << i) == 0]
            raise UnsupportedError(
                f"blocks of {run} do not fit {size} channels; these powers of two do: "
                f"{', '.join(map(str, fitting))}"
            )
        return Rotation(size, run, block is None and run < size, seed)


@partial(jax.jit, static_argnames="rotation")
def rotated(x: jax.Array, rotation: Rotation) -> jax.Array:
    """x Q, float32 [..., size]."""
    x = jnp.asarray(x, jnp.float32)
    if rotation.seed is not None:
        signs = np.random.default_rng(rotation.seed).integers(0, 2, rotation.size) * 2 - 1
        x = x * signs.astype(np.float32)
    x = hadamard(x, rotation.run)
    if not rotation.mixed:
        return x
    count = rotation.size // rotation.run
    runs = x.reshape(*x.shape[:-1], count, rotation.run)
    mixed = jnp.einsum("...ir,ij->...jr", runs, _cosines(count), precision="highest")
    return mixed.reshape(x.shape)


def _cosines(order: int) -> np.ndarray:
    """The orthonormal DCT-II, float32 [order, order]."""
    place, frequency = np.arange(order)[:, None], np.arange(order)[None]
    matrix = np.cos(np.pi * (place + 0.5) * frequency / order) * np.sqrt(2 / order)
    matrix[:, 0] /= np.sqrt(2)
    return matrix.astype(np.float32)


def check(config: ModelConfig, heads: bool = False) -> None:
    """Raises UnsupportedError where a model's residual stream (or, asked for, its heads) cannot be
    rotated by folding.
    """
    if config.post_norms:
        raise UnsupportedError(
            f"{config.model_type} norms what attention and feed-forward add to the residual "
            "stream, with weights that a rotation (R1) cannot pass; leave the rotation out"
        )
    if heads and config.mla is not None:
        raise UnsupportedError(
            f"{config.model_type} has latent attention, whose values are not rotated (R2); "
            "leave R2 out"
        )


def rotate_layer(
    config: ModelConfig, layer: Mapping[str, Any], rotation: Rotation
) -> dict[str, Any]:
    """R1 of a decoder layer, its norms folded.

    Args:
      layer: float32 weights and biases by name, see `compress.mappings`.
      rotation: of the hidden size.

    Returns:
      name -> the weights that change.

    Raises:
      UnsupportedError: see `check`.
    """
    check(config)
    changed: dict[str, Any] = {}
    for scaling in scalings(config, layer):
        if scaling.smooth not in ("input_layernorm", "post_attention_layernorm"):
            continue
        norm = layer[f"{scaling.smooth}.weight"]
        changed[f"{scaling.smooth}.weight"] = jnp.ones_like(norm)
        for name in scaling.balance:
            changed[f"{name}.weight"] = rotated(layer[f"{name}.weight"] * norm, rotation)
    for name, value in layer.items():
        module, _, kind = name.rpartition(".")
        if module.rpartition(".")[2] in _WRITERS:
            changed[name] = (
                rotated(value, rotation) if kind == "bias" else _outputs(value, rotation)
            )
    return changed


@partial(jax.jit, static_argnames="rotation")
def _outputs(w: jax.Array, rotation: Rotation) -> jax.Array:
    """Q^T W of [..., N, K], whose outputs are then rotated."""
    return jnp.swapaxes(rotated(jnp.swapaxes(w, -1, -2), rotation), -1, -2)


def rotate_heads(
    config: ModelConfig, layer: Mapping[str, Any], seed: int | None = None
) -> dict[str, Any]:
    """R2 of a decoder layer: the values of each head. Arguments and errors as in `rotate_layer`."""
    check(config, heads=True)
    rotation = Rotation.of(config.head_dim, seed=seed)
    value, output = layer["self_attn.v_proj.weight"], layer["self_attn.o_proj.weight"]
    each_head = value.reshape(-1, config.head_dim, value.shape[-1])
    changed = {"self_attn.v_proj.weight": _outputs(each_head, rotation).reshape(value.shape)}
    if "self_attn.v_proj.bias" in layer:
        bias = layer["self_attn.v_proj.bias"]
        by_head = rotated(bias.reshape(-1, config.head_dim), rotation)
        changed["self_attn.v_proj.bias"] = by_head.reshape(bias.shape)
    columns = output.reshape(len(output), -1, config.head_dim)
    changed["self_attn.o_proj.weight"] = rotated(columns, rotation).reshape(output.shape)
    return changed


def rotate_ends(
    embedding: jax.Array, head: jax.Array | None, norm: jax.Array, rotation: Rotation
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R1 of what lies around the layers.

    A model whose head is its embedding gets a head of its own, for the last norm's weights go into
    the head alone: set `tie_word_embeddings` of its config to False.

    Args:
      embedding: float [V, size].
      head: float [V, size], or None where the embedding serves as such.
      norm: float [size], of the last norm.

    Returns:
      Embedding, head and norm.
    """
    own = embedding if head is None else head
    return rotated(embedding, rotation), rotated(own * norm, rotation), jnp.ones_like(norm)
