"""The steps of a recipe, under the names and with the fields and defaults of LLM Compressor.

Each checks its settings when it is made, whether from YAML or in Python. Settings that only say how
LLM Compressor runs (offloading, compilation, devices) are taken and change nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from qjax.compress import settings
from qjax.errors import RecipeError, UnsupportedError
from qjax.scheme import QuantizationScheme

_ORDERS = {None: None, False: None, "static": "weight", "weight": "weight"} | {
    True: "group",
    "dynamic": "group",
    "group": "group",
    "aware": "aware",
}


@dataclass(frozen=True, kw_only=True)
class QuantizationMixin:
    """Which layers are quantized, and to what.

    Attributes:
      config_groups: schemes by a name of no meaning, each with its targets; or dicts of
        their fields.
      targets: of `scheme`: names, "re:" and a regular expression, or classes ("Linear").
      ignore: of what the targets name, what is left alone.
      scheme: name of a preset; or {preset: targets}; or the fields of a `QuantizationScheme`.
      kv_cache_scheme: what keys and values are rounded to, or None.
      weight_observer, input_observer: how ranges are found, for all groups; or observer with the
        keys "weights" and "input". ("imatrix_mse" serves GGUF types, too.)
        Where none is named, rounding to the nearest takes the ranges of weights from their
        extremes, as LLM Compressor does; but where samples run through the model, those that lose
        least for them ("imatrix_mse").
      bypass_divisibility_checks: allow a last group that is smaller than the others.
      target_bits: bits a weight that all layers together may take; those of each are chosen by how
        much it suffers. The scheme then gives all but the bits. (LLM Compressor has no such field.)

    Raises:
      RecipeError: a setting is out of range or contradicts another.
      UnsupportedError: a setting is valid, but nothing that qjax does.
    """

    config_groups: Any = None
    targets: Any = ("Linear",)
    ignore: Any = ()
    scheme: Any = None
    kv_cache_scheme: Any = None
    weight_observer: str | None = None
    input_observer: str | None = None
    output_observer: str | None = None
    observer: Any = None
    bypass_divisibility_checks: bool = False
    target_bits: float | None = None
    _always: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _set(self, targets=settings.names(self, "targets"), ignore=settings.names(self, "ignore"))
        _set(self, kv_cache_scheme=settings.cache_scheme(self.kv_cache_scheme))
        if self.scheme is not None and self.config_groups is not None:
            raise RecipeError("scheme and config_groups exclude each other")
        if self.target_bits is not None and not 2 <= settings.number(self, "target_bits") <= 8:
            raise RecipeError(f"target_bits must be from 2 to 8, got {self.target_bits}")
        told = (self.weight_observer, self.input_observer, self.output_observer)
        chosen = settings.observers_of(told, self.observer)
        found = settings.schemes_of(self.scheme, self.config_groups, self.targets)
        groups = [settings.with_observers(scheme, *chosen) for scheme in found]
        for scheme in groups:
            settings.check_scheme(scheme)
        _set(self, _schemes=tuple(groups))

    @property
    def schemes(self) -> tuple[QuantizationScheme, ...]:
        """What `scheme` or `config_groups` come to."""
        return self.__dict__["_schemes"]

    @property
    def requires_calibration_data(self) -> bool:
        """Whether samples must run through the model."""
        return (
            self._always
            or self.target_bits is not None
            or self.kv_cache_scheme is not None
            or any(map(settings.observes_inputs, self.schemes))
            or (self.weight_observer == "imatrix_mse" and bool(self.schemes))
        )

    @property
    def few_samples_do(self) -> bool:
        """Whether samples tell no more than how far inputs reach, and what counts where the ranges
        of weights are searched."""
        return False


@dataclass(frozen=True, kw_only=True)
class QuantizationModifier(QuantizationMixin):
    """Rounds each weight to the nearest."""

    @property
    def few_samples_do(self) -> bool:
        return self.target_bits is None and self.weight_observer != "imatrix_mse"


@dataclass(frozen=True, kw_only=True)
class GPTQModifier(QuantizationMixin):
    """GPTQ: each column's rounding error is made up for by those that follow.

    Attributes:
      block_size: columns that are rounded before those behind them are corrected.
      dampening_frac: of the mean of the diagonal of the Hessian, what is added to it.
      actorder: the order of columns. "static" (or "weight"): by the size of their inputs, the
        groups as they lie; "group": the groups in that order, too; "aware": groups, and columns
        within them; None: as they lie. A group's own `actorder` goes before the default.
      batched_quantization: changes nothing here.
    """

    block_size: int = 128
    dampening_frac: float | None = 0.01
    actorder: Any = "static"
    batched_quantization: Any = "auto"
    _always: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.actorder not in _ORDERS:
            raise RecipeError(f"actorder {self.actorder!r:.80} is none of static, group, aware")
        if settings.number(self, "block_size") < 1:
            raise RecipeError(f"block_size must be at least 1, got {self.block_size}")
        if self.dampening_frac is None:
            _set(self, dampening_frac=0.01)
        if not 0 <= settings.number(self, "dampening_frac") <= 1:
            raise RecipeError(f"dampening_frac must be from 0 to 1, got {self.dampening_frac}")
        order = _ORDERS[self.actorder]
        resolved = []
        for scheme in self.schemes:
            told = scheme.weights.actorder if scheme.weights is not None else None
            if told is not None and self.actorder != "static" and told != order:
                raise RecipeError(
                    f"actorder is {self.actorder!r}, but {told!r} in the group of "
                    f"{', '.join(scheme.targets)}"
                )
            if scheme.weights is not None:
                weights = replace(scheme.weights, actorder=told or order)
                scheme = replace(scheme, weights=weights)
            resolved.append(scheme)
        _set(self, _schemes=tuple(resolved))


@dataclass(frozen=True, kw_only=True)
class AWQModifier(QuantizationMixin):
    """AWQ: scales input columns so that those with large inputs lose least; a modifier after it
    rounds. With fields of `QuantizationModifier`, as in earlier versions, it stands for both.

    Attributes:
      mappings: `AWQMapping`s, or dicts of their fields; None finds those of the model.
      duo_scaling: whether scales depend on weights as well as on inputs; "both" tries both.
      n_grid: how many strengths are tried.
      offload_device: changes nothing here.
    """

    mappings: Any = None
    offload_device: Any = None
    duo_scaling: bool | str = True
    n_grid: int = 20
    _always: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, mappings=settings.layer_mappings(self.mappings))
        if self.duo_scaling not in (True, False, "both"):
            raise RecipeError(f"duo_scaling {self.duo_scaling!r:.80} is none of true, false, both")
        if settings.number(self, "n_grid") < 1:
            raise RecipeError(f"n_grid must be at least 1, got {self.n_grid}")

    @property
    def quantizes(self) -> bool:
        """Whether it stands for a quantization modifier, too."""
        return bool(self.schemes) or self.kv_cache_scheme is not None


@dataclass(frozen=True, kw_only=True)
class SmoothQuantModifier:
    """SmoothQuant: moves the size of inputs into the weights, so that inputs can be rounded.

    Attributes:
      smoothing_strength: from 0 (inputs stay as they are) to 1.
      mappings: [[layers that share an input], the layer before them] each; None finds those of the
        model.
      ignore: layers before others that keep their scale.
      algorithm: "smoothquant" or "log_equalization".
    """

    smoothing_strength: float = 0.5
    mappings: Any = None
    ignore: Any = ()
    num_calibration_steps: int | None = None
    calibration_function: None = None
    algorithm: str = "smoothquant"
    requires_calibration_data: ClassVar[bool] = True
    few_samples_do: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _set(
            self,
            ignore=settings.names(self, "ignore"),
            mappings=settings.layer_mappings(self.mappings),
        )
        if not 0 <= settings.number(self, "smoothing_strength") <= 1:
            raise RecipeError(
                f"smoothing_strength must be from 0 to 1, got {self.smoothing_strength}"
            )
        if self.algorithm not in ("smoothquant", "log_equalization"):
            raise RecipeError(
                f"algorithm {self.algorithm!r:.80} is none of smoothquant, log_equalization"
            )
        if self.num_calibration_steps is not None:
            raise UnsupportedError("num_calibration_steps: all samples serve; give fewer of them")
        if self.calibration_function is not None:
            raise UnsupportedError("calibration_function: samples run through the model itself")


@dataclass(frozen=True, kw_only=True)
class AutoRoundModifier(QuantizationMixin):
    """AutoRound: rounding and clipping are learned by gradient descent, block by block.

    Attributes:
      iters: steps of each block.
      batch_size: samples of a step.
      lr: size of the first step, in units of scales; None for 1 / iters. It shrinks to 0.
      disable_opt_rtn: with iters 0, round to nearest without a search for scales.
      enable_torch_compile, device_ids: change nothing here.
    """

    iters: int = 200
    enable_torch_compile: bool = True
    batch_size: int = 8
    lr: float | None = None
    device_ids: Any = None
    disable_opt_rtn: bool = False
    _always: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if settings.number(self, "iters") < 0 or settings.number(self, "batch_size") < 1:
            raise RecipeError("iters must be at least 0, and batch_size at least 1")
        if self.lr is not None and settings.number(self, "lr") <= 0:
            raise RecipeError(f"lr must be above 0, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class HQQModifier(QuantizationMixin):
    """HQQ: zero points are fitted to the weights alone, outliers counting little; no samples.

    (LLM Compressor has no such modifier; the fields are those of HQQ's own solver.)

    Attributes:
      iters: steps.
      lp_norm: the norm of errors is the power of this.
      beta, kappa: weight of the quadratic term, and what it grows by in each step.
    """

    iters: int = 20
    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01


@dataclass(frozen=True, kw_only=True)
class SpinQuantModifier:
    """Rotates the model's hidden states and heads, so that outliers spread; folded into weights.

    Attributes:
      rotations: of R1 (hidden states), R2 (values), R4 (inputs of down_proj).
      transform_type: "hadamard"; with random signs: "random-hadamard".
      transform_block_size: rotate in blocks of so many; None for the whole.
    """

    rotations: Any = ("R1", "R2")
    transform_type: str = "hadamard"
    randomize: bool = False
    learnable: bool = False
    precision: Any = None
    transform_block_size: int | None = None
    mappings: None = None
    norm_mappings: None = None
    transform_config: None = None
    requires_calibration_data: ClassVar[bool] = False
    few_samples_do: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _set(self, rotations=settings.names(self, "rotations"))
        unknown = set(self.rotations) - {"R1", "R2", "R3", "R4"}
        if unknown or not self.rotations:
            raise RecipeError(f"rotations {list(self.rotations)} are none of R1, R2, R4")
        if "R3" in self.rotations:
            raise UnsupportedError("rotations: R3 turns queries and keys, which stay as they are")
        settings.check_transform(self)


@dataclass(frozen=True, kw_only=True)
class QuIPModifier:
    """Rotates the inputs (v) and outputs (u) of each layer by themselves, undone at run time.

    Attributes:
      rotations: of "v" and "u".
      transform_type, transform_block_size: see `SpinQuantModifier`.
      targets, ignore: which layers.
    """

    rotations: Any = ("v",)
    transform_type: str = "random-hadamard"
    targets: Any = "Linear"
    randomize: bool = False
    learnable: bool = False
    precision: Any = None
    transform_block_size: int | None = None
    ignore: Any = "lm_head"
    transform_config: None = None
    requires_calibration_data: ClassVar[bool] = False
    few_samples_do: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("rotations", "targets", "ignore"):
            _set(self, **{name: settings.names(self, name)})
        if not self.rotations or set(self.rotations) - {"v", "u"}:
            raise RecipeError(f"rotations {list(self.rotations)} are none of v, u")
        settings.check_transform(self)


Modifier = QuantizationMixin | SmoothQuantModifier | SpinQuantModifier | QuIPModifier

MODIFIERS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        QuantizationModifier,
        GPTQModifier,
        AWQModifier,
        SmoothQuantModifier,
        AutoRoundModifier,
        HQQModifier,
        SpinQuantModifier,
        QuIPModifier,
    )
}

# Names of earlier versions, with the modifier and the setting that they stand for.
RENAMED: dict[str, tuple[str, dict[str, str]]] = {
    "LogarithmicEqualizationModifier": ("SmoothQuantModifier", {"algorithm": "log_equalization"})
}

_PRUNES = "removes weights, and qjax stores no sparse ones: quantize the model without it"
_TRAINS = "needs training, and qjax quantizes models that are trained"
REFUSED: dict[str, str] = {
    "SparseGPTModifier": _PRUNES,
    "WandaPruningModifier": _PRUNES,
    "MagnitudePruningModifier": _PRUNES,
    "ConstantPruningModifier": _PRUNES,
    "REAPPruningModifier": "removes experts: prune the model before it is quantized",
    "OutputDistillationModifier": _TRAINS,
    "DistillationModifier": _TRAINS,
    "LearningRateFunctionModifier": _TRAINS,
    "TrainableParamsModifier": _TRAINS,
    "EpochRangeModifier": _TRAINS,
}
"""Modifiers of LLM Compressor that mean nothing here, each with the reason."""


def _set(modifier: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(modifier, name, value)
