"""How far the predictions of one model lie from those of another, on the same text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import RequestError
from qjax.evaluate.logits import Reader, reader
from qjax.evaluate.perplexity import (
    Perplexity,
    Progress,
    row_losses,
    scored_losses,
    summary,
)
from qjax.evaluate.windows import scored, targets_of, windows
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
      logit_error: root mean square of the difference of all logits, over that of the base's.
      logit_max: the largest difference of a logit.
      tokens: how many were predicted.
    """

    base: Perplexity
    other: Perplexity
    mean: float
    error: float
    quantiles: dict[float, float]
    same_top: float
    delta_rms: float
    logit_error: float
    logit_max: float
    tokens: int


QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)


@dataclass(frozen=True, eq=False)
class Reference:
    """What a base model says of a text, for any number of models to be compared with.

    Kept are the hidden states, which take a fraction of the memory of logits; these are made again
    for each comparison, without another run of the layers.

    Attributes:
      text: that the windows were cut from.
      ids: int32 [N, T], the windows.
      hidden: float32 [N, T - T // 2, E], at the positions that are scored and the last one.
      reader: of the base.
      vocab_size: of the base.
      max_windows: that the text was limited to.
    """

    text: str
    ids: np.ndarray
    hidden: np.ndarray
    reader: Reader
    vocab_size: int
    max_windows: int | None

    def perplexity(self) -> Perplexity:
        """Of the base, on the text."""
        pairs = zip(self.ids, self.hidden, strict=True)
        losses = [scored_losses(self.reader, tokens, hidden) for tokens, hidden in pairs]
        return summary(np.concatenate(losses), self.ids)


def reference(
    base: Params,
    text: str,
    *,
    window: int = 512,
    max_windows: int | None = None,
    progress: Progress = iter,
) -> Reference:
    """Runs a base model over a text, with exact activations and cache.

    Args:
      window, max_windows, progress: see `perplexity`.

    Raises:
      RequestError: an argument is out of range, or the text is too short.
    """
    ids = windows(base, text, window, max_windows)
    exactly = reader(base)
    read = zip(progress(ids), exactly.read(ids), strict=True)
    hidden = [np.asarray(states[scored(window)]) for _, states in read]
    return Reference(text, ids, np.stack(hidden), exactly, base.config.vocab_size, max_windows)


def divergence(
    base: Reference,
    other: Params,
    *,
    numerics: str = "exact",
    kv_cache_dtype: str = "auto",
    kv_cache_dtype_skip_layers: Sequence[int | str] = (),
    progress: Progress = iter,
) -> Divergence:
    """How far `other` lies from what a base model said of a text.

    Args:
      numerics, kv_cache_dtype, kv_cache_dtype_skip_layers: of `other`, see `qjax.generate`.
      progress: goes over the windows, and may tell how far it is.

    Raises:
      RequestError: an argument is out of range, or the models do not have the same tokens.
    """
    ids = base.ids
    sizes = base.vocab_size, other.config.vocab_size
    if sizes[0] != sizes[1] or not np.array_equal(
        ids, windows(other, base.text, ids.shape[1], base.max_windows)
    ):
        raise RequestError(
            f"the models do not have the same tokens (vocabularies of {sizes[0]} and {sizes[1]}): "
            "their predictions cannot be compared."
        )
    rounded = reader(other, numerics, kv_cache_dtype, kv_cache_dtype_skip_layers)
    parts = []
    for tokens, kept, hidden in zip(progress(ids), base.hidden, rounded.read(ids), strict=True):
        rows = rounded.rows(hidden[scored(len(tokens))])
        pairs = zip(base.reader.rows(kept), rows, strict=True)
        parts.append(compare(pairs, targets_of(tokens)))
    kl, same, base_loss, other_loss, squares, base_squares, largest = np.concatenate(parts, axis=1)
    chances = np.exp(-base_loss), np.exp(-other_loss)
    error = kl.std(ddof=1) / np.sqrt(len(kl)) if len(kl) > 1 else np.nan
    return Divergence(
        summary(base_loss, ids),
        summary(other_loss, ids),
        mean=float(kl.mean()),
        error=float(error),
        quantiles={q: float(np.quantile(kl, q)) for q in QUANTILES},
        same_top=float(same.mean()),
        delta_rms=float(np.sqrt(((chances[1] - chances[0]) ** 2).mean())),
        logit_error=float(np.sqrt(squares.sum() / base_squares.sum())),
        logit_max=float(largest.max()),
        tokens=len(kl),
    )


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
    """How far `other` lies from `base`, whose activations and cache are exact: `divergence` from
    the `reference` of a text, which serve where there are several models.

    Args:
      window, max_windows, progress: see `perplexity`.
      numerics, kv_cache_dtype, kv_cache_dtype_skip_layers: of `other`, which may be the same model.

    Raises:
      RequestError: see `reference` and `divergence`.
    """
    return divergence(
        reference(base, text, window=window, max_windows=max_windows, progress=progress),
        other,
        numerics=numerics,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers,
        progress=progress,
    )


def divergence_table(base: str, found: Mapping[str, Divergence]) -> str:
    """Models by name, compared with one base, as a table in Markdown."""
    first = next(iter(found.values()))
    lines = [
        f"{first.tokens} tokens, {first.base.windows} windows of {first.base.window}; divergence "
        "in nats",
        "",
        "| | perplexity | mean KL divergence | median | 99% | maximum | same top token | "
        "RMS difference of p | logits: relative RMS | largest |",
        "| --- " + "| ---: " * 9 + "|",
        f"| {base} (base) | {first.base} |" + " |" * 8,
    ]
    for name, one in found.items():
        median, p99, most = (f"{one.quantiles[q]:.6f}" for q in (0.5, 0.99, 1.0))
        lines.append(
            f"| {name} | {one.other} | {one.mean:.6f} ± {one.error:.6f} | {median} | {p99} | "
            f"{most} | {one.same_top:.2%} | {one.delta_rms:.3%} | {one.logit_error:.3%} | "
            f"{one.logit_max:.3f} |"
        )
    return "\n".join(lines)


def compare(pairs: Iterable[tuple[jax.Array, jax.Array]], targets: np.ndarray) -> np.ndarray:
    """Two models at the positions of a window that are scored.

    Args:
      pairs: logits of the base and of the other, [R, V] each, of some rows after the other.
      targets: see `targets_of`.

    Returns:
      float64 [7, rows - 1]: KL divergence, whether the likeliest token is the same, -log of the
      chance that each gives to the target, and of the logits the sum of squared differences, the
      sum of the base's squares, and the largest difference.
    """
    parts = []
    for p, q in pairs:
        own, targets = jnp.asarray(targets[: len(p)]), targets[len(p) :]
        losses = row_losses(p, own), row_losses(q, own)
        parts.append((*row_divergence(p, q), *losses, *_row_errors(p, q)))
    columns = zip(*jax.device_get(parts), strict=True)
    return np.array([np.concatenate(each) for each in columns], np.float64)[:, :-1]


@jax.jit
def row_divergence(base: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL(base || other) in nats, and whether the likeliest token is the same, both [R], of logits
    [R, V]."""
    log_p, log_q = jax.nn.log_softmax(base), jax.nn.log_softmax(other)
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return divergence, base.argmax(-1) == other.argmax(-1)


@jax.jit
def _row_errors(base: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    difference = other - base
    squares = jnp.square(difference).sum(-1), jnp.square(base).sum(-1)
    return *squares, jnp.abs(difference).max(-1)
