"""Rotations of compressed-tensors (`transform_config`): those that are left for run time.

SpinQuant and QuIP multiply weights by orthogonal matrices when a model is quantized, which is part
of the stored weights; inputs or outputs of some layers must then be rotated, too.
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
      location: "input" or "output".
      head_dim: its size, or None for that of the layer.
    """

    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    location: str
    head_dim: int | None
    file: str

    def applies(self, module: str, location: str) -> bool:
        return (
            self.location == location
            and any(matches(module, target) for target in self.targets)
            and not is_ignored(module, self.ignore)
        )

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
        group.ignore("randomize", "requires_grad", "precision", "block_size")
        kind = group.choice("type", ("hadamard", "random-hadamard", "random-matrix"))
        head_dim = group.get("head_dim", int) or group.get("block_size", int)
        for entry in group.get("apply", list, []):
            if not isinstance(entry, dict):
                raise group.error("apply", f"{entry!r:.80} is not of type dict")
            apply = Keys(entry, keys.file, f"{group.prefix}apply.")
            apply.ignore("inverse")
            location = apply.get("location", str, "")
            targets = apply.get("targets", list, [])
            ignore = apply.get("ignore", list, [])
            apply.done()
            if location in _FOLDED:
                continue
            if location not in _ONLINE or kind != "hadamard":
                raise UnsupportedError(
                    f"{keys.file}: {group.prefix}apply: a {kind} transform at {location!r:.80} is "
                    f"not supported; at run time hadamard at {', '.join(_ONLINE)} is"
                )
            found.append(
                Transform(
                    tuple(map(str, targets)), tuple(map(str, ignore)), location, head_dim, keys.file
                )
            )
        group.done()
    return tuple(found)
