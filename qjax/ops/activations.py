"""What happens to the input of a quantized product before it meets the weight.

Some methods scale, rotate or round activations. Here they are rounded to values that the method's
numeric type can hold, and stay float32: products with these are what the method computes, up to the
order of additions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.hadamard import hadamard
from pallas_kernels.inputs import Inputs
from pallas_kernels.quantize import rounded
from qjax.ops.collectives import extremes, gathered
from qjax.qarray import QArray

# Of a weight, in the order of `Inputs`.
_INPUT_AUX = ("act_pre_scale", "act_scale", "act_zero_point", "act_global_scale", "perm")


def treats_inputs(w: QArray) -> bool:
    """Whether this weight's product takes inputs that are not x itself."""
    return w.act is not None or w.hadamard[0] > 0 or any(key in w.aux for key in _INPUT_AUX)


def has_own_inputs(w: QArray) -> bool:
    """Whether they depend on arrays of this very weight, not only on its `act`."""
    return any(key in w.aux for key in _INPUT_AUX)


def arrays(w: QArray) -> Inputs:
    """What a kernel treats the inputs of this weight with (but for a rotation)."""
    return Inputs(*map(w.aux.get, _INPUT_AUX))


def scaled(x: jax.Array, w: QArray) -> jax.Array:
    """x [T, K] times the weight's scales of input columns, where it has them."""
    scale = w.aux.get("act_pre_scale")
    return x if scale is None else x * scale.astype(jnp.float32)


def sees_whole_rows(w: QArray) -> bool:
    """Whether what happens to an input depends on others, beyond its group."""
    return "perm" in w.aux or (w.act is not None and w.act.dynamic and w.act.strategy != "group")


def inputs(
    x: jax.Array, w: QArray, rows: jax.Array | None = None, across: tuple[str, ...] = ()
) -> jax.Array:
    """What the weight is multiplied with.

    In this order: scaled, rotated, rounded, columns put in the order of the weight's.

    Args:
      x: float32 [T, K].
      rows: int32 [1]; rows from there on are padding, which no scale shall depend on.
      across: axes of the mesh along which each device has some of the columns. Scales are those of
        the whole rows.

    Returns:
      float32 [T, K].
    """
    aux = w.aux
    if across and "perm" in aux:
        x, across = gathered(x, across), ()
    x = scaled(x, w)
    if w.hadamard[0]:
        x = hadamard(x, w.hadamard[0])
    if w.act is not None:
        if across and sees_whole_rows(w):
            x = _rounded_across(x, w, rows, across)
        else:
            x = rounded(x, w.act, arrays(w), rows)
    return x[:, aux["perm"][0]] if "perm" in aux else x


def _rounded_across(
    x: jax.Array, w: QArray, rows: jax.Array | None, across: tuple[str, ...]
) -> jax.Array:
    """Columns rounded with the scales of whole rows: their extremes stand beside them meanwhile."""
    assert w.act is not None
    counted = x
    if w.act.outliers is not None:  # these columns have no part in a scale
        counted = jnp.where((jnp.abs(x) >= w.act.outliers).any(0), 0, x)
    wide = jnp.concatenate([x, extremes(counted, across)], -1)
    return rounded(wide, w.act, arrays(w), rows)[:, : x.shape[1]]
