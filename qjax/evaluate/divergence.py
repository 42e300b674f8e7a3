"""How far the predictions of one model lie from those of another, on the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import RequestError
from qjax.evaluate.logits import ROWS, Logits, logits_of
from qjax.evaluate.perplexity import Perplexity, Progress, row_losses, summary, targets_of
from qjax.evaluate.windows import scored, windows
from qjax.params import Params


@dataclass(frozen=True)
class Divergence:
    """What `llama-perplexity --kl-divergence` tells; p is the base's probability, q the other's.

    Attributes:
      base, other: their perplexities.
      mean, error: of KL(p || q) = sum p log(p / q) over the vocabulary, nats, and its standard
        error.
      quantiles: of KL(p || q), by the share of tokens that have less: 0.5, 0.9, 0.99, 0.999, 1.
      same_top: share of tokens where both find the same one likeliest.
      delta_rms: root mean square of q - p of the token that follows in the text.
      tokens: how many were predicted.
    """

    base: Perplexity
    other: Perplexity
    mean: float
    error: float
    quantiles: dict[float, float]
    same_top: float
    delta_rms: float
    tokens: int


QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)


def kl_divergence(
    base: Params,
    other: Params,
    text: str,
    *,
    window: int = 512,
    max_windows: int | None = None,
    numerics: str = "exact",
    kv_cache_dtype: str = "auto",
    kv_cache_dtype_skip_layers: Sequence[int | str] = (),
    progress: Progress = iter,
) -> Divergence:
    """How far `other` lies from `base`, whose activations and cache are exact.

    Args:
      window, max_windows, progress: see `perplexity`.
      numerics, kv_cache_dtype, kv_cache_dtype_skip_layers: of `other`, which may be the same model.

    Raises:
      RequestError: an argument is out of range, the text is too short, or the models do not have
        the same tokens.
    """
    ids = windows(base, text, window, max_windows)
    sizes = base.config.vocab_size, other.config.vocab_size
    if other is not base and (
        sizes[0] != sizes[1] or not np.array_equal(ids, windows(other, text, window, max_windows))
    ):
        raise RequestError(
            f"the models do not have the same tokens (vocabularies of {sizes[0]} and {sizes[1]}): "
            "their predictions cannot be compared."
        )
    exactly = logits_of(base)
    rounded = logits_of(other, numerics, kv_cache_dtype, kv_cache_dtype_skip_layers)
    found = np.concatenate([compare(exactly, rounded, tokens) for tokens in progress(ids)], axis=1)
    divergence, same, *losses = found
    chances = np.exp(-np.array(losses))
    error = divergence.std(ddof=1) / np.sqrt(len(divergence)) if len(divergence) > 1 else np.nan
    return Divergence(
        *(summary(loss, ids) for loss in losses),
        mean=float(divergence.mean()),
        error=float(error),
        quantiles={q: float(np.quantile(divergence, q)) for q in QUANTILES},
        same_top=float(same.mean()),
        delta_rms=float(np.sqrt(((chances[1] - chances[0]) ** 2).mean())),
        tokens=len(divergence),
    )


def compare(base: Logits, other: Logits, tokens: np.ndarray) -> np.ndarray:
    """Of each position of a window that is scored: KL divergence, whether the likeliest token is
    the same, and -log of the chance that each gives to the token that follows; float64 [4, R]."""
    parts = []
    firsts = range(0, len(tokens), ROWS)
    for first, p, q in zip(firsts, base(tokens), other(tokens), strict=True):
        targets = jnp.asarray(targets_of(tokens, first))
        parts.append((*row_divergence(p, q), row_losses(p, targets), row_losses(q, targets)))
    found = np.array([np.concatenate(each) for each in zip(*parts, strict=True)], np.float64)
    return found[:, scored(len(tokens))]


@jax.jit
def row_divergence(base: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL(base || other) in nats, and whether the likeliest token is the same, both [R], of logits
    [R, V]."""
    log_p, log_q = jax.nn.log_softmax(base), jax.nn.log_softmax(other)
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return divergence, base.argmax(-1) == other.argmax(-1)
