"""What an engine is doing, in numbers."""

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class EngineStats:
    """Attributes:
    num_running, num_waiting: sequences.
    num_blocks, num_free_blocks: pages of the cache; those that hold a prefix which nobody uses
      are free.
    num_preemptions: sequences that were sent back to wait, so far.
    prefix_cache_queries, prefix_cache_hits: tokens that were looked for in the cache, and found.
    prompt_tokens, generation_tokens: of all sequences so far that came to a first token.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0

    def __add__(self, other: "EngineStats") -> "EngineStats":
        return EngineStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))
