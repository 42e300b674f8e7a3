"""Rotations of compressed-tensors (`transform_config`): those that are left for run time.

SpinQuant and QuIP multiply weights by orthogonal matrices when a model is quantized, which is part
of the stored weights; inputs or outputs of some layers must then be rotated, too. The matrices of
these are stored beside the first layer that has them ("down_proj.R4_input.weight"), of Hadamard's
as 1 and -1; Sylvester's need not be read.
"""

from __future__ import annotations

from dataclasses import dataclass

from qjax.errors import UnsupportedError
from qjax.formats.base import Keys
from qjax.scheme import is_ignored, matches

_FOLDED = ("weight_input", "weight_output")
_ONLINE = ("input", "output")


@dataclass(frozen=True)
class Transform:
    """A Hadamard matrix (Sylvester's, divided by the root of its size) at one place of some layers.

    Attributes:
      name: of the group in the config.
      location: "input" or "output".
      head_dim: its size, or None for that of the layer.
    """

    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    name: str
    location: str
    head_dim: int | None
    file: str

    @property
    def tensor(self) -> str:
        """What the stored matrix is called below a layer."""
        return f"{self.name}_{self.location}.weight"

    def applies(self, module: str, layer_class: str) -> bool:
        named = any(matches(module, target, layer_class) for target in self.targets)
        return named and not is_ignored(module, self.ignore, layer_class)

    def size(self, shape: tuple[int, ...]) -> int:
        """How many columns of the layer's inputs (or outputs) are rotated together."""
        length = shape[-1] if self.location == "input" else shape[-2]
        size = self.head_dim or length
        if size & (size - 1) or length % size:
            raise UnsupportedError(
                f"{self.file}: transform_config wants a Hadamard matrix of size {size} for "
                f"{length} columns; sizes must be powers of two that divide them"
            )
        return size


def _names(keys: Keys, key: str) -> list[str]:
    """A list of targets, or a single one."""
    value = keys.get(key, (list, str), [])
    return [value] if isinstance(value, str) else value


def read_transforms(keys: Keys) -> tuple[Transform, ...]:
    """The transforms that happen at run time.

    Raises:
      UnsupportedError: one that cannot be honoured.
    """
    groups = keys.section("config_groups")
    keys.done()
    found: list[Transform] = []
    for name in groups.values:
        group = groups.section(name)
        group.ignore("requires_grad", "precision")
        group.choice("randomize", (False,), False)
        kind = group.choice("type", ("hadamard", "random-hadamard", "random-matrix"))
        head_dim = group.get("head_dim", int) or group.get("block_size", int)
        for entry in group.get("apply", list, []):
            if not isinstance(entry, dict):
                raise group.error("apply", f"{entry!r:.80} is not of type dict")
            apply = Keys(entry, keys.file, f"{group.prefix}apply.")
            apply.ignore("inverse")
            location = apply.get("location", str, "")
            targets = _names(apply, "targets")
            ignore = _names(apply, "ignore")
            apply.done()
            if location in _FOLDED:
                continue
            if location not in _ONLINE or kind != "hadamard":
                raise UnsupportedError(
                    f"{keys.file}: {group.prefix}apply: a {kind} transform at {location!r:.80} is "
                    f"not supported; at run time hadamard at {', '.join(_ONLINE)} is"
                )
            names, left = tuple(map(str, targets)), tuple(map(str, ignore))
            found.append(Transform(names, left, name, location, head_dim, keys.file))
        group.done()
    return tuple(found)
