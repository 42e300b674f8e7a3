"""Which quantization, cache and split serve a model best on given hardware, and what that takes."""

from qjax.recommend.choose import GOALS, recommend
from qjax.recommend.option import Option, Recommendation

__all__ = ["GOALS", "Option", "Recommendation", "recommend"]
