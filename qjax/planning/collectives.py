"""What the devices that share a model tell each other in one step, without running it.

The rules stand beside what they are of: `qjax.ops` sums behind weights that are split by inputs,
`qjax.ops.activations` what some of these want of their inputs first, `qjax.sampler` what picking a
token takes. A test holds this list against compiled programs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qjax.engine.sampling_params import MAX_LOGPROBS
from qjax.engine.step import StepSpec
from qjax.models.config import ModelConfig
from qjax.ops.activations import sees_whole_rows
from qjax.ops.collectives import GROUP
from qjax.qarray import QArray
from qjax.sampler import CANDIDATES
from qjax.sharding import Parallel

DECODE = StepSpec(prefill=False)
_REDUCE, _GATHER, _EXCHANGE = "all-reduce", "all-gather", "all-to-all"


@dataclass(frozen=True)
class Collective:
    """Attributes:
    kind: "all-reduce", "all-gather" or "all-to-all", as XLA calls it.
    of: what it belongs to.
    nbytes: of what each device has afterwards, for each row.
    per: "token" of a step, or "sequence", of which a step picks one token each.
    devices: that take part.
    count: how many of them a step has.
    """

    kind: str
    of: str
    nbytes: int
    per: str
    devices: int
    count: int = 1

    def moved(self, rows: int) -> float:
        """Bytes that each device sends, where devices pass parts around a ring."""
        rounds = 2 if self.kind == _REDUCE else 1
        return rounds * (self.devices - 1) / self.devices * self.nbytes * rows


def planned_collectives(
    config: ModelConfig,
    tree: Mapping[str, Any],
    parallel: Parallel,
    spec: StepSpec = DECODE,
    numerics: str = "exact",
) -> dict[str, int]:
    """How many of each kind a compiled step has: {"all-reduce": n, "all-gather": m}, and
    "all-to-all" where there are any.

    What stands in a loop, or in a branch, counts once, as it does in the program's text.

    Args:
      config: of the whole model.
      tree: the weights: `Params.tree`, or a `hollow_tree`.
      numerics: of the step's `Batch`.
    """
    found: Counter[str] = Counter({_REDUCE: 0, _GATHER: 0})
    for each in collectives(config, tree, parallel, spec, numerics):
        found[each.kind] += each.count
    return dict(found)


def collectives(
    config: ModelConfig,
    tree: Mapping[str, Any],
    parallel: Parallel,
    spec: StepSpec = DECODE,
    numerics: str = "exact",
) -> tuple[Collective, ...]:
    """Those of one step, alike ones together. Arguments as of `planned_collectives`."""
    if parallel.size == 1:
        return ()
    found: Counter[Collective] = Counter()
    found.update(_of_model(config, tree, parallel, numerics == "exact"))
    if parallel.vocabulary:
        found.update(_of_sampler(config, parallel, spec))
    return tuple(replace(each, count=count) for each, count in found.items())


def _of_model(
    config: ModelConfig, tree: Mapping[str, Any], parallel: Parallel, exact: bool
) -> Iterator[Collective]:
    if parallel.vocabulary:
        yield Collective(_REDUCE, "embedding", 4 * config.hidden_size, "token", parallel.size)
    for layer in tree["model"]["layers"].values():
        yield from _of_inputs("o_proj", layer["self_attn"]["o_proj"], parallel.size, exact)
        yield from _sum("o_proj", config, parallel)
        moe = config.moe
        mlp = layer[moe.module if moe is not None and moe.module in layer else "mlp"]
        if moe is None or "experts" not in mlp:
            yield from _of_inputs("down_proj", mlp["down_proj"], parallel.size, exact)
            yield from _sum("down_proj", config, parallel)
            continue
        down, rows = mlp["experts"]["down_proj"], moe.router.top_k
        yield from _of_inputs("experts.down_proj", down, parallel.tensor, exact, rows)
        if moe.shared_size:
            down = mlp[moe.shared_name]["down_proj"]
            yield from _of_inputs("shared down_proj", down, parallel.size, exact)
        yield from _sum("experts", config, parallel)


def _sum(of: str, config: ModelConfig, parallel: Parallel) -> Iterator[Collective]:
    """`ops.collectives.summed`."""
    n, size = parallel.size, config.hidden_size
    if parallel.all_reduce in ("float32", "bfloat16"):
        width = 4 if parallel.all_reduce == "float32" else 2
        yield Collective(_REDUCE, of, width * size, "token", n)
        return
    groups = -(-size // (n * GROUP)) * n
    for kind in (_EXCHANGE, _GATHER):
        yield Collective(kind, f"{of} codes", groups * GROUP, "token", n)
        yield Collective(kind, f"{of} scales", 2 * groups, "token", n)


def _of_inputs(
    of: str, module: Mapping[str, Any], devices: int, exact: bool, rows: int = 1
) -> Iterator[Collective]:
    """What a weight that is split by its inputs wants of whole rows of them."""
    weight = module["weight"]
    if devices == 1 or not isinstance(weight, QArray):
        return
    if "perm" in weight.aux:
        yield Collective(_GATHER, f"{of} inputs", 4 * weight.shape[1] * rows, "token", devices)
    elif exact and sees_whole_rows(weight):
        yield Collective(_REDUCE, f"{of} scales", 8 * rows, "token", devices)


def _of_sampler(config: ModelConfig, parallel: Parallel, spec: StepSpec) -> Iterator[Collective]:
    """Of each sequence, the likeliest token or a drawn one; with log probabilities, also those."""
    n, size = parallel.size, config.vocab_size // parallel.size

    def of_rows(kind: str, of: str, numbers: int, per: str = "sequence") -> Collective:
        return Collective(kind, of, 4 * numbers, per, n)

    for _ in ("best", "its token"):
        yield of_rows(_GATHER, "greedy", n)
    if not spec.greedy:
        blocks = math.gcd(size, max(1, 256 // n))
        best = n * min(CANDIDATES, size)
        yield of_rows(_REDUCE, "min_p", 1)
        yield of_rows(_GATHER, "top_k", best)
        yield of_rows(_REDUCE, "top_k search", 1)
        yield of_rows(_REDUCE, "top_p", 1)
        yield of_rows(_GATHER, "top_p", n * blocks)
        yield of_rows(_GATHER, "top_p", best)
        yield of_rows(_REDUCE, "top_p search", 1)
        yield of_rows(_REDUCE, "draw", 1)
        yield of_rows(_GATHER, "draw", n * blocks)
        yield of_rows(_REDUCE, "draw", size // blocks)
    for asked, of, per in (
        (spec.full, "logprobs", "sequence"),
        (spec.prompt_logprobs, "prompt_logprobs", "token"),
    ):
        if asked:
            for _ in ("peak", "total", "chosen", "rank"):
                yield of_rows(_REDUCE, of, 1, per)
            for _ in ("logprobs", "tokens"):
                yield of_rows(_GATHER, of, n * min(MAX_LOGPROBS, size), per)
