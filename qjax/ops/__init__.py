"""Operations on QArrays: the only callers of kernels."""

from qjax.ops.embedding import embedding
from qjax.ops.linear import linear, prepare, unprepare
from qjax.ops.support import supports

__all__ = ["embedding", "linear", "paged_attention", "prepare", "supports", "unprepare"]


def __getattr__(name: str):
    if name == "paged_attention":
        from qjax.ops.attention import paged_attention

        return paged_attention
    raise AttributeError(name)
