"""What quantization costs: perplexity of a text, and how far a model's predictions lie from those
of another."""

from qjax.evaluate.divergence import Divergence, kl_divergence
from qjax.evaluate.perplexity import Perplexity, perplexity

__all__ = ["Divergence", "Perplexity", "kl_divergence", "perplexity"]
