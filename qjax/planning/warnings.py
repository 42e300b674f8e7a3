"""What to know of a split before one pays for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qjax.models.config import ModelConfig
from qjax.planning.devices import Device
from qjax.planning.held import EMBEDDING, HEAD, Held
from qjax.planning.roofline import Speed
from qjax.sharding import Parallel, local_config

_DOMINATES = 0.5  # of a step's time


def warnings(
    config: ModelConfig,
    parallel: Parallel,
    weights: Sequence[Held],
    speeds: Sequence[Speed],
    device: Device | None,
) -> Iterator[str]:
    """Sentences: what is held more than once, what is cut, and what links slow down."""
    n = parallel.size
    if n == 1:
        return
    latent = config.mla is not None and config.mla.split
    copies = local_config(config, parallel).num_kv_heads * n // config.num_kv_heads
    if copies > 1:
        what = "the one latent vector" if latent else f"{config.num_kv_heads} heads"
        yield (
            f"keys and values: {what} for {n} devices, so that each is cached {copies} times; "
            "more copies of the model on fewer devices each would hold more tokens"
        )
    if not parallel.vocabulary:
        whole = [each for each in weights if each.name in (EMBEDDING, HEAD)]
        size = sum(each.nbytes for each in whole)
        yield (
            f"a vocabulary of {config.vocab_size} does not divide by {n}: embedding and head, "
            f"{size / 1e6:,.1f} MB, are whole on each device, and so are logits"
        )
    cuts: dict[tuple[int, int], list[str]] = {}
    for each in weights:
        if each.cut is not None:
            cuts.setdefault(each.cut, []).append(each.name.split(".")[-2])
    for (before, after), names in cuts.items():
        yield (
            f"groups of {before} inputs are cut to {after} in {', '.join(dict.fromkeys(names))}: "
            "their scales are held more than once"
        )
    if device is not None and n > device.group:
        yield (
            f"{n} {device.name} are more than the {device.group} that its links join: collectives "
            f"go over the network, at {device.network / 1e9:,.1f} GB/s for each"
        )
    slow = [each for each in speeds if each.telling > _DOMINATES * each.seconds]
    if slow:
        told = ", ".join(
            f"{each.telling / each.seconds:.0%} of a {each.phase} step of {each.tokens} tokens"
            for each in slow
        )
        yield f"communication dominates: it takes {told}"
