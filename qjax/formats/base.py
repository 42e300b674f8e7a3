"""What a checkpoint format is, for the loader that drives it and for the files of this folder.

A format knows how the tensors of one linear layer become a QArray. It is asked twice: `layer` plans
from headers alone and refuses what it cannot read; the `decode` that it returns gets the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from qjax.errors import CheckpointError, UnsupportedError, nearest
from qjax.lazy import LazyArray
from qjax.qarray import QArray

PLAIN = ("f32", "f16", "bf16")


class Record(Protocol):
    """A stored tensor as its file's header describes it; `qtype` is the dtype in lower case."""

    @property
    def name(self) -> str: ...
    @property
    def qtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def file(self) -> str: ...
    @property
    def offset(self) -> int: ...


@dataclass(frozen=True)
class Checkpoint:
    """What a format may know of the whole checkpoint.

    Attributes:
      file: where the quantization config was found, for messages.
      tensors: every stored tensor by its name.
      metadata: texts of the safetensors headers.
      read: name -> array, for the small tensors that planning depends on.
      model_type: of the model, as in its config.json.
      dtype: what the model is computed in, as in its config.json ("bfloat16"), or "".
    """

    file: str
    tensors: Mapping[str, Record]
    metadata: Mapping[str, Any]
    read: Callable[[str], np.ndarray]
    model_type: str = ""
    dtype: str = ""


Stored = Mapping[str, Record]
"""The tensors of one module by what follows its name: "weight", "weight_scale", "qweight" ..."""

Arrays = Mapping[str, np.ndarray]
"""The same as arrays: of the stored dtype (ml_dtypes for small floats), or uint8 [..., row_bytes]
for the block types of GGUF. They are views of mapped files: copy what is not kept as it is."""


@dataclass(frozen=True)
class Layer:
    """How one linear layer is stored.

    Attributes:
      reads: the suffixes that `decode` wants; any other that is stored is an error.
      decode: suffix -> array to a canonical QArray on the host, of the shape that was asked for.
        Arrays that have to be made may be lazy (`qjax.lazy`), so that no more of them is made than
        is wanted on this machine.
      ignores: suffixes that are known and need no place.
    """

    reads: tuple[str, ...]
    decode: Callable[[Arrays], QArray]
    ignores: tuple[str, ...] = ()


class QuantizationConfig:
    """A format with the settings of one checkpoint. Derive, and register by
    `register_quantization_config`.

    Attributes:
      name: the method's name, as in `quant_method`.
    """

    name: ClassVar[str] = "dense"

    @property
    def quantizes_weights(self) -> bool:
        """Whether the configuration promises that some weight is quantized."""
        return True

    @property
    def cache(self) -> str | None:
        """What the configuration rounds keys and values to before they are cached: "fp8_e4m3", or
        in words what else. None where it says nothing of it: stored scales alone then tell.
        """
        return None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        """Reads a checkpoint's quantization config.

        Raises:
          CheckpointError: a key has a wrong type or value.
          UnsupportedError: an unknown key, or a setting that is not supported.
        """
        return cls()

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        """Plans how a layer is read, from headers alone.

        Args:
          module: name of the layer, such as "model.layers.0.mlp.down_proj".
          stored: its tensors (biases are not among them).
          shape: (N, K), or (experts, N, K) where experts are stored stacked.

        Returns:
          None for a layer that is not quantized: it has one "weight" of a plain dtype.

        Raises:
          CheckpointError: a tensor is missing, or has a wrong shape or dtype; or the config says
            one thing and the tensors another.
        """
        return None

    @classmethod
    def adapted(cls, module: str, weight: QArray, lossy: bool, dtype: str) -> QArray:
        """The same weight in the words that this format has for it, where it has some.

        Args:
          weight: canonical, on the host, not plain.
          lossy: whether its numbers may be rounded to what the format holds.
          dtype: of the model, as config.json will say it.

        Raises:
          UnsupportedError: they would have to be, and `lossy` is false.
        """
        return weight

    @classmethod
    def for_weights(cls, weights: Mapping[str, QArray], kv_scales: int = 0) -> Self:
        """The settings with which this format holds a model: what `save` writes by its name.

        Args:
          weights: of all linear layers and the embedding by their names, plain ones too, as
            `adapted` gave them. Arrays may be only shapes and dtypes.
          kv_scales: how many scales each layer has for its keys and for its values.

        Raises:
          UnsupportedError: it cannot hold one of them, which is named, or not all in one model.
        """
        raise UnsupportedError(
            f"{cls.name} can be saved with given settings only: `format` may be the dict that "
            "config.json is to hold"
        )

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        """The tensors that `layer` would read this canonical weight from; what `save` writes.

        Raises:
          UnsupportedError: the format cannot hold such a weight, or is not written.
        """
        raise UnsupportedError(f"{module}: {self._not_written()}")

    def to_config(self) -> dict[str, Any]:
        """The quantization_config that `from_config` would read."""
        raise UnsupportedError(self._not_written())

    def _not_written(self) -> str:
        return (
            f"qjax does not write {self.name} checkpoints; give `save` the quantization_config of "
            "another method that holds such weights (`qjax methods --support` lists what is saved)"
        )


def is_embedding(module: str) -> bool:
    """Whether a module is the table of token embeddings, by its name."""
    return module.endswith("embed_tokens")


def is_plain(weight: QArray) -> bool:
    """Whether it is a float array as checkpoints without quantization have it."""
    return weight.qtype in PLAIN and weight.act is None and not weight.aux


def no_checkpoint(file: str = "quantization_config") -> Checkpoint:
    """What a format may know of a checkpoint that is yet to be written: nothing."""

    def read(name: str) -> np.ndarray:
        raise UnsupportedError(f"{file}: {name} cannot be read before it is written")

    return Checkpoint(file, {}, {}, read)


@dataclass(frozen=True)
class Dense(QuantizationConfig):
    """A checkpoint without a quantization config."""

    @property
    def quantizes_weights(self) -> bool:
        return False


def dense_layer(
    module: str, stored: Stored, shape: tuple[int, ...], transposed: bool = False
) -> Layer:
    """An unquantized layer: one weight of a plain dtype, maybe stored as (..., in, out)."""
    record = expect(module, stored, "weight")
    if record.qtype not in PLAIN:
        raise UnsupportedError(
            f"{record.file}, {record.name}: type {record.qtype} is not supported here without a "
            f"quantization config; supported are {', '.join(PLAIN)}"
        )
    if transposed:
        expect(module, stored, "weight", PLAIN, (*shape[:-2], shape[-1], shape[-2]))
        return Layer(
            ("weight",),
            lambda arrays: QArray.from_dense(LazyArray.of(arrays["weight"].swapaxes(-1, -2))),
        )
    expect(module, stored, "weight", PLAIN, shape)
    return Layer(("weight",), lambda arrays: QArray.from_dense(arrays["weight"]))


def expect(
    module: str,
    stored: Stored,
    suffix: str,
    dtypes: str | tuple[str, ...] = (),
    *shapes: tuple[int, ...],
) -> Record:
    """The record of a tensor that must be there.

    Args:
      dtypes: those that are allowed, in lower case ("i32", "f8_e4m3"); none given, any.
      shapes: those that are allowed; none given, any.

    Raises:
      CheckpointError: it is missing, or has another dtype or shape.
    """
    dtypes = (dtypes,) if isinstance(dtypes, str) else dtypes
    record = stored.get(suffix)
    if record is None:
        have = ", ".join(stored) or "nothing"
        file = next((r.file for r in stored.values()), None)
        raise CheckpointError(f"missing: {have} is stored", file=file, field=f"{module}.{suffix}")
    if dtypes and record.qtype not in dtypes:
        raise fault(record, f"has dtype {record.qtype}, expected {' or '.join(dtypes)}")
    if shapes and tuple(record.shape) not in shapes:
        wanted = " or ".join(map(str, dict.fromkeys(shapes)))
        raise fault(record, f"has shape {tuple(record.shape)}, the model's sizes ask for {wanted}")
    return record


def fault(record: Record, reason: str) -> CheckpointError:
    """An error that names a stored tensor."""
    return CheckpointError(reason, file=record.file, field=record.name, offset=record.offset)


@dataclass(frozen=True)
class Keys:
    """A config dict that is read key by key; what nobody has read is an error.

    Attributes:
      values: the dict.
      file: where it lies, for messages.
      prefix: in front of keys in messages ("config_groups.group_0.").
    """

    values: Mapping[str, Any]
    file: str
    prefix: str = ""
    seen: set[str] = field(default_factory=set)

    def get(self, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of a key, or the default where it is missing or null.

        Raises CheckpointError where it has another type. (A bool is no int here.)
        """
        self.seen.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise self.error(name, f"{value!r:.80} is not of type {names}")
        return value

    def choice(self, name: str, options: tuple[Any, ...], default: Any = None) -> Any:
        """One of some values; UnsupportedError for another."""
        self.seen.add(name)
        value = self.values.get(name)
        value = default if value is None else value
        kind = isinstance(value, bool)  # 1 == True, but a bool is no int here
        if not any(value == each and isinstance(each, bool) == kind for each in options):
            known = ", ".join(map(repr, options))
            raise UnsupportedError(
                f"{self.file}: {self.prefix}{name} {value!r:.80} is not supported, but {known}"
            )
        return value

    def section(self, name: str) -> Keys:
        """A dict inside; empty where it is missing or null."""
        return Keys(self.get(name, dict, {}), self.file, f"{self.prefix}{name}.")

    def ignore(self, *names: str) -> None:
        """Keys that say nothing about how weights are read."""
        self.seen.update(names)

    def done(self) -> None:
        """Raises UnsupportedError where a key was not read, but for those that are null: tools
        write a null for each setting that was not made.
        """
        left = self.values.items()
        unknown = [name for name, value in left if name not in self.seen and value is not None]
        if unknown:
            raise UnsupportedError(
                f"{self.file}: unknown key {self.prefix}{unknown[0]!r:.80}"
                f"{nearest(str(unknown[0]), self.seen)}; known are {', '.join(sorted(self.seen))}"
            )

    def error(self, name: str, reason: str) -> CheckpointError:
        return CheckpointError(reason, file=self.file, field=self.prefix + name)
