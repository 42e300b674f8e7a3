"""`recommend`: tries what can be made of a model on given hardware, and takes the best."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pallas_kernels import platform
from qjax.checkpoint.builtin import MODELS
from qjax.engine.runner import numerics_for
from qjax.errors import RecipeError, RequestError, ShardingError
from qjax.kv_cache import cache_dtypes
from qjax.models.config import ModelConfig
from qjax.planning.by_scheme import by_scheme
from qjax.planning.planner import Outcome, Planner, Workload, stored
from qjax.recommend import distill, words
from qjax.recommend.candidates import AS_STORED, QUANTIZED, UNQUANTIZED, Candidate, refusal
from qjax.recommend.expected import step
from qjax.recommend.figures import Speeds, losses, speeds_of
from qjax.recommend.hardware import Hardware, detected, measured, named
from qjax.recommend.option import Option, Recommendation

GOALS = ("latency", "throughput", "size")
TOLERANCE = 0.1
_SEQUENCES = {"latency": 1, "throughput": 32, "size": 1}
_CONTEXT = 4096
_CACHES = ("auto", "int8", "fp8_e4m3", "int4")
_CHUNK = 2048  # tokens of a step that reads prompts, as of `qjax serve`
ALIKE = 0.1  # of figures that are as near to each other, none decides


def recommend(
    model: str | os.PathLike[str] = "smollm2-135m",
    *,
    goal: str = "latency",
    device: str | None = None,
    devices: int | None = None,
    memory: int | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    tolerance: float = TOLERANCE,
    measure: bool = False,
    results: str | os.PathLike[str] | None = None,
    gpu_memory_utilization: float = 0.9,
) -> Recommendation:
    """The quantization, the cache and the split that serve a model best; no weight is read.

    Memory is that of `qjax.planning.plan`. Speed is its roofline by the shares of it that kernels
    were measured to reach on such a device. Accuracy is the KL divergence measured on
    `losses().model`.

    Args:
      model: as of `qjax.load`, or a folder with a config.json.
      goal: "latency" takes the least time between two tokens, "throughput" the most tokens a second
        of all sequences with the time for their prompts, "size" the least memory.
      device: an accelerator of `qjax.planning.devices` or "cpu"; None: what is here.
      devices: how many; None: one, or all GPUs or TPUs that are here.
      memory: bytes of each device that there are; None: what the device has, or what is free.
      max_model_len: most tokens of a sequence, half of them its prompt; None: 4,096, or the model's
        own limit where that is less.
      max_num_seqs: sequences at a time; None: 32 for throughput, otherwise one.
      tolerance: most KL divergence, nats a token; `math.inf` also allows what was not measured.
      measure: takes the bandwidth of this machine's memory first.
      results: a file of `python -m qjax.bench kernels --json` on such a device, to go by instead.
      gpu_memory_utilization: the share of the memory that may be used.

    Raises:
      RequestError: an argument is out of range, or the device is unknown.
      ResultError: `results` is no file of results.
      CheckpointError, UnsupportedError, DownloadError: as by `qjax.load`.
    """
    if goal not in GOALS:
        raise RequestError(f"goal must be one of {', '.join(GOALS)}, got {goal!r:.40}.")
    if not tolerance >= 0:
        raise RequestError(f"tolerance must be at least 0, got {tolerance}.")
    if not 0 < gpu_memory_utilization <= 1:
        raise RequestError(
            f"gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}."
        )
    for name, number in (
        ("devices", devices),
        ("memory", memory),
        ("max_model_len", max_model_len),
        ("max_num_seqs", max_num_seqs),
    ):
        if number is not None and number < 1:
            raise RequestError(f"{name} must be at least 1, got {number}.")
    if device is None:
        hardware = detected(devices, memory)
    else:
        hardware = named(device, devices or 1, memory)
    if measure:
        hardware = measured(hardware)
    found = speeds_of(hardware.architecture) if results is None else distill.speeds(Path(results))
    if found is not None and found.kind != hardware.device.kind:
        raise RequestError(
            f"results are of a {found.kind}, {found.name}, not of {device or 'this'}"
        )
    tried = _Trial(
        os.fspath(model),
        hardware,
        found,
        goal,
        tolerance,
        max_model_len,
        max_num_seqs or _SEQUENCES[goal],
        int(hardware.device.memory * gpu_memory_utilization),
    )
    with platform.assume(hardware.device.kind, hardware.device.name):
        return tried.decided()


@dataclass(frozen=True)
class _Trial:
    """What was asked for, and what became of each way to make the model."""

    model: str
    hardware: Hardware
    speeds: Speeds | None
    goal: str
    tolerance: float
    asked_length: int | None
    sequences: int
    usable: int
    left_out: list[tuple[str, str]] = field(default_factory=list)
    planners: dict[str, tuple[Planner, Outcome]] = field(default_factory=dict)

    @cached_property
    def _unmade(self) -> tuple[Candidate, ModelConfig, dict[str, Any]]:
        """The model before anything is made of it: as it is stored, where it lies here."""
        if self.model in MODELS or Path(self.model).expanduser().exists():
            try:
                config, tree = stored(self.model)
                return AS_STORED, config, tree
            except RequestError:  # a config.json alone
                pass
        config, tree = by_scheme(self.model, "UNQUANTIZED")
        return UNQUANTIZED, config, tree

    @cached_property
    def length(self) -> int:
        """Most tokens of a sequence."""
        limit = self._unmade[1].max_position_embeddings
        if self.asked_length is not None and self.asked_length > limit:
            raise RequestError(f"max_model_len must be in [1, {limit}], got {self.asked_length}.")
        return self.asked_length or min(_CONTEXT, limit)

    def decided(self) -> Recommendation:
        options = list(self._options())
        if not options:
            raise ShardingError("; ".join(f"{name}: {why}" for name, why in self.left_out))
        ranked = _ranked([each for each in options if each.memory.fits], self.goal)
        # Of each way to make the model, the best cache and split stand for all.
        firsts = list({each.name: each for each in reversed(ranked)}.values())
        firsts.sort(key=ranked.index)
        closest, lacking, enough = None, 0, None
        if not ranked:
            closest = min(options, key=lambda each: each.memory.total)
            lacking = closest.memory.total - closest.memory.usable
            planner, outcome = self.planners[_key(closest)]
            least = planner.smallest(outcome)
            enough = None if least is None else least.split.devices
        for name in dict.fromkeys(each.name for each in options):
            if ranked and name not in {each.name for each in ranked}:
                self.left_out.append((name, words.too_large(name, options)))
        return words.explained(
            Recommendation(
                self.model,
                self.hardware,
                self.goal,
                self.tolerance,
                self.length,
                self.sequences,
                firsts[0] if firsts else None,
                tuple(firsts[1:]),
                closest,
                lacking,
                enough,
                tuple(self.left_out),
                self.speeds,
                self.hardware.notes,
            ),
            options,
        )

    def _options(self) -> Iterator[Option]:
        unmade, config, tree = self._unmade
        yield from self._of(unmade, config, tree)
        small: list[tuple[Candidate, str]] = []
        for candidate in QUANTIZED:
            why = refusal(candidate, self.hardware, self.goal, self.speeds)
            if lossy := words.too_lossy(candidate, self.tolerance):
                self.left_out.append((candidate.name, lossy))
            elif why and candidate.gguf:
                small.append((candidate, why))
            elif why:
                self.left_out.append((candidate.name, why))
            else:
                yield from self._made(candidate)
        for candidate, why in small:
            if any(outcome.memory.fits for _, outcome in self.planners.values()):
                self.left_out.append((candidate.name, why))
            else:  # size is what counts now
                yield from self._made(candidate)

    def _made(self, candidate: Candidate) -> Iterator[Option]:
        try:
            scheme = candidate.scheme or "UNQUANTIZED"
            config, tree = by_scheme(self.model, scheme, candidate.group_size)
            yield from self._of(candidate, config, tree)
        except (RecipeError, ShardingError) as error:
            self.left_out.append((candidate.name, str(error)))

    def _of(
        self, candidate: Candidate, config: ModelConfig, tree: dict[str, Any]
    ) -> Iterator[Option]:
        """With each type of cache, over each split."""
        planner = Planner(config, tree, self.hardware.device, self.usable, "float32")
        numerics = numerics_for("fast", self.sequences)
        loss = 0.0 if candidate.loss is None else candidate.loss.divergence
        fits = False
        for asked in _CACHES:
            # That fewer bits are faster is known only where it was measured.
            if fits and self.speeds is None and self.goal != "size":
                break
            if asked.startswith("fp8") and "fp8" not in self.hardware.multiplies:
                continue
            dtypes = cache_dtypes(config, asked, numerics.cache_dtype, ())
            if asked != "auto" and loss + losses().cache[dtypes[0]] > self.tolerance:
                continue
            load = Workload(self.length, self.sequences, _CHUNK, dtypes, numerics.decode)
            best, others, _ = planner.best(self.hardware.count, load)
            for outcome in (best, *others):
                option = self._option(candidate, asked, outcome)
                self.planners[_key(option)] = planner, outcome
                fits |= option.memory.fits
                yield option

    def _option(self, candidate: Candidate, asked: str, outcome: Outcome) -> Option:
        load, own = outcome.load, outcome.workload
        assert load is not None
        dtype = own.cache_dtypes[0]
        prompt = answer = max(1, self.length // 2)
        chunk = min(_CHUNK, prompt)
        settings = load, self.hardware, self.speeds, dtype
        sequences = own.max_num_seqs
        decode = step(*settings, sequences=sequences, tokens=sequences, context=prompt)
        read = step(*settings, sequences=1, tokens=chunk, context=(prompt - chunk) // 2)
        first = read.seconds * prompt / chunk
        whole = sequences * first + answer * decode.seconds
        loss, cache = candidate.loss, losses().cache.get(dtype)
        return Option(
            candidate.name,
            candidate.scheme,
            candidate.method,
            candidate.group_size,
            asked,
            dtype,
            outcome.split,
            load.local.num_layers,
            outcome.memory,
            outcome.memory.weights * outcome.split.expert * outcome.split.tensor,
            decode.seconds,
            first,
            self.sequences / decode.seconds,
            self.sequences * answer / whole,
            None if loss is None or cache is None else loss.divergence + cache,
            tuple(sorted(decode.unmeasured | read.unmeasured)),
            (candidate.why,),
        )


def _key(option: Option) -> str:
    return f"{option.name} {option.kv_cache_dtype} {option.split}"


def _loss(option: Option) -> float:
    return math.inf if option.divergence is None else option.divergence


def _ranked(options: list[Option], goal: str) -> list[Option]:
    """The best first; of those that are as good as it, what loses least, then what takes least."""
    found = sorted(options, key=lambda each: words.score(each, goal))
    ranked: list[Option] = []
    while found:
        limit = words.score(found[0], goal) * (1 + ALIKE)
        alike = [each for each in found if words.score(each, goal) <= limit]
        best = min(alike, key=lambda each: (_loss(each), each.memory.total))
        ranked.append(best)
        found.remove(best)
    return ranked
