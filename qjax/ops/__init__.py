"""Operations on QArrays: the only callers of kernels."""

from typing import TYPE_CHECKING

from qjax.ops.embedding import embedding
from qjax.ops.linear import linear, prepare, unprepare
from qjax.ops.support import supports

if TYPE_CHECKING:
    from qjax.ops.attention import paged_attention, rotate

__all__ = ["embedding", "linear", "paged_attention", "prepare", "rotate", "supports", "unprepare"]


def __getattr__(name: str):
    if name in ("paged_attention", "rotate"):
        from qjax.ops import attention

        return getattr(attention, name)
    raise AttributeError(name)
