"""Perplexity of a text: exp of the mean negative log-likelihood of its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from qjax.evaluate.logits import ROWS, Logits, logits_of
from qjax.evaluate.windows import scored, windows
from qjax.params import Params

Progress = Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]]


@dataclass(frozen=True)
class Perplexity:
    """Attributes:
    value: exp(mean negative log-likelihood), nats.
    error: its standard error, as `llama-perplexity` prints it.
    tokens: how many were predicted.
    windows, window: how many windows of how many tokens.
    """

    value: float
    error: float
    tokens: int
    windows: int
    window: int


def perplexity(
    params: Params,
    text: str,
    *,
    window: int = 512,
    max_windows: int | None = None,
    numerics: str = "exact",
    kv_cache_dtype: str = "auto",
    kv_cache_dtype_skip_layers: Sequence[int | str] = (),
    progress: Progress = iter,
) -> Perplexity:
    """Perplexity of a text, by the convention of llama.cpp's `llama-perplexity`, see `windows`.

    Args:
      window: tokens of a window.
      max_windows: only so many, from the start of the text.
      numerics, kv_cache_dtype, kv_cache_dtype_skip_layers: see `qjax.generate`.
      progress: goes over the windows, and may tell how far it is.

    Raises:
      RequestError: an argument is out of range, or the text is too short.
    """
    ids = windows(params, text, window, max_windows)
    logits = logits_of(params, numerics, kv_cache_dtype, kv_cache_dtype_skip_layers)
    losses = np.concatenate([window_losses(logits, tokens) for tokens in progress(ids)])
    return summary(losses, ids)


def window_losses(logits: Logits, tokens: np.ndarray) -> np.ndarray:
    """float64 [R]: -log p of each token of a window that is scored."""
    rows = [
        row_losses(part, jnp.asarray(targets_of(tokens, first)))
        for first, part in zip(range(0, len(tokens), ROWS), logits(tokens), strict=True)
    ]
    return np.concatenate(jax.device_get(rows)).astype(np.float64)[scored(len(tokens))]


def targets_of(tokens: np.ndarray, first: int) -> np.ndarray:
    """The token after each of `ROWS` positions from `first` on; of the last one, the first token,
    which is not scored."""
    return np.roll(tokens, -1)[first : first + ROWS]


def summary(losses: np.ndarray, ids: np.ndarray) -> Perplexity:
    """Of the losses of all windows `ids` [N, T] together."""
    value = math.exp(losses.mean())
    error = value * math.sqrt(losses.var() / (len(losses) - 1)) if len(losses) > 1 else math.nan
    return Perplexity(value, error, len(losses), *ids.shape)


@jax.jit
def row_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p [R] of tokens int32 [R], by logits [R, V]."""
    own = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - own
