"""How fast a step can be at best: what is read, what is computed, and what devices tell each other.

A step takes as long as reading what it needs from memory, or as its operations, whichever is longer
(Williams et al., CACM 52(4), 2009), and then as its collectives, each behind the work that it sums:
seconds = max(bytes / bandwidth, operations / peak) + sum of (latency + bytes moved / link).
What a real step takes beyond that (launches, ends of kernels, the host) is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qjax.models.config import ModelConfig
from qjax.planning.collectives import Collective
from qjax.planning.devices import Device
from qjax.planning.held import EMBEDDING, HEAD, Held


@dataclass(frozen=True)
class Speed:
    """One step at its best.

    Attributes:
      phase: "prefill" or "decode".
      sequences: of each copy of the model, with `tokens` tokens together in the step, and `context`
        tokens each, on average, in the cache.
      reading, computing, telling: seconds.
      tokens_per_second: of all copies together.
    """

    phase: str
    sequences: int
    tokens: int
    context: int
    reading: float
    computing: float
    telling: float
    tokens_per_second: float

    @property
    def seconds(self) -> float:
        return max(self.reading, self.computing) + self.telling

    @property
    def bound(self) -> str:
        """What takes most of it: "memory", "compute" or "communication"."""
        amounts = {
            "memory": self.reading if self.reading >= self.computing else 0.0,
            "compute": self.computing,
            "communication": self.telling,
        }
        return max(amounts, key=lambda name: amounts[name])


@dataclass(frozen=True)
class Load:
    """What one device has and does, for `speed`.

    Attributes:
      local: config of its part.
      weights: that it holds.
      cache_per_token: bytes of cache of each layer.
      collectives: of a decode step.
      copies: of the model.
    """

    local: ModelConfig
    weights: Sequence[Held]
    cache_per_token: Sequence[float]
    collectives: Sequence[Collective]
    copies: int = 1


@dataclass(frozen=True)
class Work:
    """What one device does in a step.

    Attributes:
      products: of each weight: the rows of inputs that meet it, bytes read, operations.
      cached: bytes of cache that are read.
      attending: operations of attention.
    """

    products: tuple[tuple[Held, float, float, float], ...]
    cached: float
    attending: float


def work(load: Load, *, sequences: int, tokens: int, context: int) -> Work:
    """Of a step with `tokens` new tokens of `sequences` sequences, each with `context` cached
    before."""
    local = load.local
    products = []
    for each in load.weights:
        rows, share = _rows_and_share(each, local, sequences, tokens)
        products.append((each, rows, each.nbytes * share, 2.0 * each.elements * rows))
    new = tokens / sequences
    cached, attending = 0.0, 0.0
    for layer, per_token in enumerate(load.cache_per_token):
        window = local.window_for(layer) or context + new
        # Each new token sees what is cached and, of the new ones, those before it: half of them.
        read = min(context, window) + new
        seen = min(context + (new + 1) / 2, window)
        cached += sequences * read * per_token
        attending += 4 * tokens * seen * local.num_heads * local.head_dim
    return Work(tuple(products), cached, attending)


def telling_seconds(load: Load, device: Device, *, sequences: int, tokens: int) -> float:
    """Of a step's collectives."""
    return sum(
        each.count * _seconds(each, device, tokens if each.per == "token" else sequences)
        for each in load.collectives
    )


def speed(
    phase: str, load: Load, device: Device, *, sequences: int, tokens: int, context: int
) -> Speed:
    """Of a step as of `work`, at its best."""
    done = work(load, sequences=sequences, tokens=tokens, context=context)
    nbytes = sum(each[2] for each in done.products) + done.cached
    operations = sum(each[3] for each in done.products) + done.attending
    telling = telling_seconds(load, device, sequences=sequences, tokens=tokens)
    reading, computing = nbytes / device.bandwidth, operations / device.peak
    seconds = max(reading, computing) + telling
    per_second = load.copies * tokens / seconds
    return Speed(phase, sequences, tokens, context, reading, computing, telling, per_second)


def _seconds(each: Collective, device: Device, rows: int) -> float:
    latency, link = device.between(each.devices)
    return latency + each.moved(rows) / link


def _rows_and_share(
    each: Held, local: ModelConfig, sequences: int, tokens: int
) -> tuple[float, float]:
    """How many rows of inputs meet a weight, and how much of it is read."""
    if each.name == HEAD or (each.name == EMBEDDING and local.tie_word_embeddings):
        return sequences, 1.0
    if each.name == EMBEDDING:  # rows of it are looked up
        return 0.0, 0.0
    if each.experts:
        assert local.moe is not None
        router = local.moe.router
        chosen = router.top_k / router.num_experts
        # Tokens choose evenly, each for itself. `elements` are those of all experts.
        return tokens * chosen, 1 - (1 - chosen) ** tokens
    return tokens, 1.0
