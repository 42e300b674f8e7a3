"""SpinQuant and QuaRot in the walk: rotations are folded into each layer before it is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.checkpoint.places import leaf_of
from qjax.compress.algorithms import hadamard
from qjax.compress.algorithms.hadamard import Rotation
from qjax.compress.layers import EMBEDDING, HEAD, NORM, Flat, dense
from qjax.compress.modifiers import Modifier, QuIPModifier, SpinQuantModifier
from qjax.errors import RecipeError, UnsupportedError
from qjax.models.config import ModelConfig
from qjax.params import Params
from qjax.qarray import QArray

_SEED = 0  # of random signs


@dataclass(frozen=True)
class Folded:
    """Attributes:
    stream: what the residual stream is rotated by (R1), or None.
    heads: whether the values of each head are (R2).
    """

    stream: Rotation | None
    heads: bool

    def layer(self, config: ModelConfig, floats: Flat) -> Flat:
        """A layer's parameters, rotated."""
        if self.stream is not None:
            floats = floats | hadamard.rotate_layer(config, floats, self.stream)
        if self.heads:
            floats = floats | hadamard.rotate_heads(config, floats)
        return floats

    def hidden(self, x: np.ndarray) -> np.ndarray:
        """What embeddings float32 [..., E] become; an array that can be written to, as they are."""
        if self.stream is None:
            return x
        return np.array(hadamard.rotated(jnp.asarray(x), self.stream))

    def ends(self, params: Params) -> dict[str, Any]:
        """Embedding, head and last norm, by name; a head that was the embedding is one of its own
        then."""
        if self.stream is None:
            return {}
        names = [f"{EMBEDDING}.weight", f"{HEAD}.weight", f"{NORM}.weight"]
        head = None if params.config.tie_word_embeddings else dense(leaf_of(params, names[1]))
        table, head, norm = hadamard.rotate_ends(
            dense(leaf_of(params, names[0])), head, leaf_of(params, names[2]), self.stream
        )
        tables = [QArray.from_dense(np.asarray(each)) for each in (table, head)]
        return dict(zip(names, (*tables, norm), strict=True))


def folded(modifiers: Sequence[Modifier], config: ModelConfig) -> Folded | None:
    """The rotations of a recipe; None where it has none.

    Raises:
      RecipeError: they do not come first.
      UnsupportedError: the model cannot be rotated so, or not by what goes into its weights.
    """
    for number, modifier in enumerate(modifiers):
        if isinstance(modifier, QuIPModifier):
            raise UnsupportedError(
                "QuIPModifier rotates while the model runs, which qjax reads but does not make; "
                "SpinQuantModifier's R1 and R2 go into the weights"
            )
        if isinstance(modifier, SpinQuantModifier) and number:
            raise RecipeError("SpinQuantModifier changes what all others see: put it first")
    first = modifiers[0]
    if not isinstance(first, SpinQuantModifier):
        return None
    if "R4" in first.rotations:
        raise UnsupportedError(
            "rotations: R4 is done while the model runs, which qjax reads but does not make; R1 "
            "and R2 go into the weights"
        )
    heads = "R2" in first.rotations
    stream = None
    if "R1" in first.rotations:
        seed = _SEED if first.transform_type == "random-hadamard" else None
        stream = Rotation.of(config.hidden_size, first.transform_block_size, seed)
        hadamard.check(config)
    if heads:
        hadamard.check(config, heads=True)
    return Folded(stream, heads)
