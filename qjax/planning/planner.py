"""`plan`: what a model takes on devices that are not here, by its headers and its config alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pallas_kernels import platform
from qjax.checkpoint.opened import open_folder, open_gguf
from qjax.checkpoint.source import resolve
from qjax.engine.batch import DECODE_ROWS
from qjax.engine.engine import BLOCK_SIZE
from qjax.engine.runner import numerics_for
from qjax.errors import CheckpointError, RequestError, ShardingError, UnsupportedError
from qjax.kv_cache import cache_dtypes
from qjax.models.config import ModelConfig
from qjax.planning import devices as table
from qjax.planning.by_scheme import by_scheme
from qjax.planning.collectives import Collective, collectives
from qjax.planning.devices import Device
from qjax.planning.held import Held, held
from qjax.planning.hollow import hollow_tree
from qjax.planning.memory import Cache, Memory, memory
from qjax.planning.roofline import Load, Speed, speed
from qjax.planning.warnings import warnings
from qjax.sharding import ALL_REDUCE, Parallel, local_config

_MOST_DEVICES = 1024  # that are tried for a model that does not fit


@dataclass(frozen=True)
class Split:
    """How devices share the work: `data` copies of the model, each over `expert` x `tensor`."""

    data: int
    expert: int
    tensor: int

    @property
    def devices(self) -> int:
        return self.data * self.expert * self.tensor

    @property
    def flags(self) -> str:
        """As `qjax serve` takes them."""
        found = f"--tensor-parallel-size {self.expert * self.tensor}"
        found += f" --data-parallel-size {self.data}" if self.data > 1 else ""
        return found + (" --enable-expert-parallel" if self.expert > 1 else "")


@dataclass(frozen=True)
class Workload:
    """What the devices are to do.

    Attributes:
      max_model_len: most tokens of a sequence.
      max_num_seqs: most sequences at a time, of each copy of the model.
      max_num_batched_tokens: most tokens of a step.
      cache_dtypes: of each layer.
      numerics: of decode steps, as in `Batch`.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    cache_dtypes: tuple[str, ...]
    numerics: str


@dataclass(frozen=True)
class Outcome:
    """What one split comes to."""

    split: Split
    workload: Workload
    memory: Memory
    collectives: tuple[Collective, ...]
    speeds: tuple[Speed, ...]
    warnings: tuple[str, ...]
    load: Load | None = field(default=None, compare=False, repr=False)

    @property
    def best_decode(self) -> float:
        """Tokens/s with all sequences."""
        return self.speeds[-1].tokens_per_second if self.speeds else 0.0


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
      source: what was asked for, and as which scheme.
      device: whose figures these are; None where none were given.
      outcome: of the split that was asked for, or of the best.
      others: of the other splits of as many devices, the best first.
      refused: why further splits cannot be.
      smallest: where the model does not fit, the outcome of the least devices on which it would.
    """

    source: str
    device: Device | None
    outcome: Outcome
    others: tuple[Outcome, ...] = ()
    refused: tuple[str, ...] = ()
    smallest: Outcome | None = None


def plan(
    source: str | os.PathLike[str],
    *,
    devices: int | None = None,
    tensor_parallel_size: int | None = None,
    data_parallel_size: int | None = None,
    enable_expert_parallel: bool = False,
    device: str | Device | None = None,
    memory: int | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = 32,
    max_num_batched_tokens: int = 2048,
    kv_cache_dtype: str = "auto",
    kv_cache_dtype_skip_layers: Sequence[int | str] = (),
    numerics: str = "fast",
    gpu_memory_utilization: float = 0.9,
    scheme: str | None = None,
    all_reduce: str = "float32",
) -> Plan:
    """Plans a model for devices that need not be here; no weight is read.

    Args:
      source: as of `qjax.load`.
      devices: how many there are: the split that decodes fastest is taken of those that fit, with
        `max_num_seqs` sequences on all of them together.
      tensor_parallel_size, data_parallel_size, enable_expert_parallel: or, instead, the split
        itself, with `max_num_seqs` sequences of each copy of the model.
      device: an accelerator of `qjax.planning.devices`, or its figures; None plans for the memory
        alone, with weights laid out as on this machine.
      memory: bytes of each device; None takes what the accelerator has.
      max_model_len: most tokens of a sequence; None for the model's own limit.
      max_num_batched_tokens, kv_cache_dtype, kv_cache_dtype_skip_layers, numerics: as of the
        engine.
      gpu_memory_utilization: the share of the memory that may be used.
      scheme: plans for what `qjax.oneshot` would make of the model by this preset ("W4A16",
        "Q4_K_M", "UNQUANTIZED" ...), by its config alone: source may be a config.json, and of a
        name on the hub only that is fetched.
      all_reduce: what devices send each other of sums, as of `qjax.load`.

    Raises:
      RequestError: an argument is out of range, or they contradict each other.
      ShardingError: the model cannot be split so.
      CheckpointError, UnsupportedError, DownloadError: as by `qjax.load`.
    """
    found = table.device(device) if isinstance(device, str) else device
    if memory is None and found is None:
        raise RequestError("say how much memory a device has, or which device it is.")
    if not 0 < gpu_memory_utilization <= 1:
        raise RequestError(
            f"gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}."
        )
    for name, number in (
        ("devices", devices),
        ("tensor_parallel_size", tensor_parallel_size),
        ("data_parallel_size", data_parallel_size),
        ("max_num_seqs", max_num_seqs),
        ("max_num_batched_tokens", max_num_batched_tokens),
        ("memory", memory),
    ):
        if number is not None and number < 1:
            raise RequestError(f"{name} must be at least 1, got {number}.")
    asked = tensor_parallel_size is not None or data_parallel_size is not None
    if devices is not None and (asked or enable_expert_parallel):
        raise RequestError("give devices, or how to split the model over them, not both.")
    if all_reduce not in ALL_REDUCE:
        known = ", ".join(ALL_REDUCE)
        raise RequestError(f"all_reduce must be one of {known}, got {all_reduce!r:.80}.")
    usable = int((memory or (found.memory if found else 0)) * gpu_memory_utilization)
    with platform.assume(found.kind if found else None, found.name if found else ""):
        config, tree = stored(source) if scheme is None else by_scheme(source, scheme)
        chosen = numerics_for(numerics, max_num_seqs)
        limit = config.max_position_embeddings
        if max_model_len is not None and not 1 <= max_model_len <= limit:
            raise RequestError(f"max_model_len must be in [1, {limit}], got {max_model_len}.")
        work = Workload(
            max_model_len or limit,
            max_num_seqs,
            max_num_batched_tokens,
            cache_dtypes(config, kv_cache_dtype, chosen.cache_dtype, kv_cache_dtype_skip_layers),
            chosen.decode,
        )
        planner = Planner(config, tree, found, usable, all_reduce)
        if devices is not None:
            outcome, others, refused = planner.best(devices, work)
        else:
            n, sparse = tensor_parallel_size or 1, enable_expert_parallel
            split = Split(data_parallel_size or 1, n if sparse else 1, 1 if sparse else n)
            outcome, others, refused = planner.outcome(split, work), (), ()
        smallest = None if outcome.memory.fits else planner.smallest(outcome)
    name = os.fspath(source) if scheme is None else f"{os.fspath(source)}, as {scheme}"
    return Plan(name, found, outcome, others, refused, smallest)


def stored(source: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, Any]]:
    """A checkpoint's config and its `hollow_tree`."""
    try:
        found = resolve(source)
    except CheckpointError as error:
        asked = Path(source).expanduser()
        if asked.name == "config.json" or (asked / "config.json").is_file():
            raise RequestError(
                f"{error}. With a scheme (W4A16, or UNQUANTIZED) a config.json alone is planned for"
            ) from error
        raise
    path = Path(found.path)
    if found.kind == "orbax":
        raise UnsupportedError(f"{path}: folders in orbax's format are not planned for")
    if found.kind == "gguf":
        opened = open_gguf(path, quantize_activations=True)
    else:
        pickled = found.kind == "pickle"
        opened = open_folder(path, None, quantize_activations=True, pickled=pickled)
    with closing(opened.files):
        return opened.config, hollow_tree(opened)


@dataclass(frozen=True)
class Planner:
    """A model, and the devices that it is planned for."""

    config: ModelConfig
    tree: dict[str, Any]
    device: Device | None
    usable: int
    all_reduce: str
    held: dict[Parallel, tuple[Held, ...]] = field(default_factory=dict)  # as it was worked out

    def outcome(self, split: Split, work: Workload) -> Outcome:
        """Raises ShardingError where the model cannot be split so."""
        if split.expert > 1 and self.config.moe is None:
            raise RequestError("enable_expert_parallel takes a model with experts.")
        parallel = Parallel.over(split.expert, split.tensor, self.config, self.all_reduce)
        if parallel not in self.held:
            self.held[parallel] = held(self.tree, self.config, parallel)
        weights = self.held[parallel]
        local = local_config(self.config, parallel)
        found = memory(
            local,
            sum(each.nbytes for each in weights),
            work.cache_dtypes,
            self.usable,
            max_model_len=work.max_model_len,
            max_num_seqs=work.max_num_seqs,
            max_num_batched_tokens=work.max_num_batched_tokens,
        )
        told = collectives(self.config, self.tree, parallel, numerics=work.numerics)
        pages = Cache.of(local, work.cache_dtypes).pages
        load = Load(local, weights, [n / BLOCK_SIZE for n in pages], told, split.data)
        speeds = tuple(self._speeds(work, load))
        warned = tuple(warnings(self.config, parallel, weights, speeds, self.device))
        return Outcome(split, work, found, told, speeds, warned, load)

    def best(
        self, devices: int, work: Workload
    ) -> tuple[Outcome, tuple[Outcome, ...], tuple[str, ...]]:
        """The best of all splits of so many devices, the others, and why some cannot be."""
        found, refused = [], []
        for split in _splits(devices, self.config):
            own = replace(work, max_num_seqs=-(-work.max_num_seqs // split.data))
            try:
                found.append(self.outcome(split, own))
            except ShardingError as error:
                refused.append(f"{split.flags}: {error}")
        if not found:
            raise ShardingError("; ".join(refused))
        # Where no figures of a device are known, the more copies the less they tell each other.
        found.sort(key=lambda each: (not each.memory.fits, -each.best_decode, -each.split.data))
        if not found[0].memory.fits:
            found.sort(key=lambda each: each.memory.total)
        return found[0], tuple(found[1:]), tuple(refused)

    def smallest(self, outcome: Outcome) -> Outcome | None:
        """The same load on the fewest devices that hold a copy of the model, or None."""
        sparse = outcome.split.expert > 1
        for n in range(1, _MOST_DEVICES + 1):
            split = Split(1, n if sparse else 1, 1 if sparse else n)
            try:
                found = self.outcome(split, outcome.workload)
            except ShardingError:
                continue
            if found.memory.fits:
                return found
        return None

    def _speeds(self, work: Workload, load: Load) -> Iterator[Speed]:
        if self.device is None:
            return
        prompt = min(work.max_num_batched_tokens, work.max_model_len)
        yield speed("prefill", load, self.device, sequences=1, tokens=prompt, context=0)
        fewer = [size for size in DECODE_ROWS if size < work.max_num_seqs]
        for size in [*fewer, work.max_num_seqs]:
            context = work.max_model_len // 2
            yield speed("decode", load, self.device, sequences=size, tokens=size, context=context)


def _splits(devices: int, config: ModelConfig) -> Iterator[Split]:
    """All splits of so many devices that `flags` can say."""
    for n in range(1, devices + 1):
        if devices % n == 0:
            yield Split(devices // n, 1, n)
            if config.moe is not None and n > 1:
                yield Split(devices // n, n, 1)
