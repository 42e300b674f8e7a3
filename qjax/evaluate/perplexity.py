"""Perplexity of a text: exp of the mean negative log-likelihood of its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.evaluate.logits import Reader, reader
from qjax.evaluate.windows import scored, targets_of, windows
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

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


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
    model = reader(params, numerics, kv_cache_dtype, kv_cache_dtype_skip_layers)
    read = zip(progress(ids), model.read(ids), strict=True)
    losses = [window_losses(model, tokens, hidden) for tokens, hidden in read]
    return summary(np.concatenate(losses), ids)


def window_losses(model: Reader, tokens: np.ndarray, hidden: jax.Array) -> np.ndarray:
    """float64 [R]: -log p of each token of a window that is predicted, by its hidden states."""
    return scored_losses(model, tokens, hidden[scored(len(tokens))])


def scored_losses(model: Reader, tokens: np.ndarray, hidden: Any) -> np.ndarray:
    """The same, of the hidden states at the positions that are scored and the last one."""
    targets, rows = targets_of(tokens), []
    for block in model.rows(hidden):
        own, targets = targets[: len(block)], targets[len(block) :]
        rows.append(row_losses(block, jnp.asarray(own)))
    return np.concatenate(jax.device_get(rows)).astype(np.float64)[:-1]


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
