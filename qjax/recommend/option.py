"""What `recommend` gives."""

from __future__ import annotations

from dataclasses import dataclass

from qjax.planning.memory import Memory
from qjax.planning.planner import Split
from qjax.recommend.figures import Speeds
from qjax.recommend.hardware import Hardware


@dataclass(frozen=True)
class Option:
    """One way to make and run a model.

    Attributes:
      name: what is made of the model, in short.
      scheme, method, group_size: as of `qjax quantize`; no scheme: the model as it is.
      kv_cache_dtype: as of `qjax serve`. cache_dtype: what that comes to.
      split: how devices share the work. layers: of the model.
      memory: of one device, bytes.
      weights: bytes of all weights of one copy of the model.
      step_seconds: of a decode step with all sequences of one copy, at half of the context.
      first_token_seconds: until a prompt of half of the context is read.
      tokens_per_second: of all sequences together, while they decode.
      total_tokens_per_second: generated tokens, with the time for their prompts.
      divergence: KL divergence that weights and cache have cost a model, nats; None: not measured.
      unmeasured: kinds of weights and caches whose speed was not measured.
      reasons: sentences.
      commands: that make it and run it.
    """

    name: str
    scheme: str | None
    method: str
    group_size: int | None
    kv_cache_dtype: str
    cache_dtype: str
    split: Split
    layers: int
    memory: Memory
    weights: int
    step_seconds: float
    first_token_seconds: float
    tokens_per_second: float
    total_tokens_per_second: float
    divergence: float | None
    unmeasured: tuple[str, ...]
    reasons: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recommendation:
    """What `recommend` found.

    Attributes:
      model: what was asked for.
      hardware: that it is for.
      goal, tolerance, max_model_len, max_num_seqs: what was asked for, or the defaults.
      best: None where nothing fits within the tolerance.
      runners_up: the others that do, the best first.
      closest: where nothing does, what lacks the least memory.
      lacking: bytes of each device that this one lacks; 0 where something fits.
      enough: devices that would hold it, or None.
      left_out: (name, why) of what was not considered.
      speeds: whose measured speeds these are; None where there are none.
      notes: sentences.
    """

    model: str
    hardware: Hardware
    goal: str
    tolerance: float
    max_model_len: int
    max_num_seqs: int
    best: Option | None
    runners_up: tuple[Option, ...]
    closest: Option | None
    lacking: int
    enough: int | None
    left_out: tuple[tuple[str, str], ...]
    speeds: Speeds | None
    notes: tuple[str, ...]
