"""What quantization costs: perplexity of a text, and how far a model's predictions lie from those
of another."""

from qjax.evaluate.divergence import (
    Divergence,
    Reference,
    divergence,
    divergence_table,
    kl_divergence,
    reference,
)
from qjax.evaluate.perplexity import Perplexity, perplexity
from qjax.evaluate.rolling import RollingPerplexity, rolling_perplexity

__all__ = [
    "Divergence",
    "Perplexity",
    "Reference",
    "RollingPerplexity",
    "divergence",
    "divergence_table",
    "kl_divergence",
    "perplexity",
    "reference",
    "rolling_perplexity",
]
