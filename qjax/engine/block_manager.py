"""Which pages of the paged cache are free: one list, lent and taken back."""


class BlockManager:
    """Lends the pages of a cache.

    Args:
      num_blocks: pages in the cache.
      block_size: tokens a page holds.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        # The last freed page is lent first: it is the likeliest to be in a CPU's caches.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def missing(self, blocks: list[int], num_tokens: int) -> int:
        """How many more pages `num_tokens` take."""
        return max(0, self.blocks_for(num_tokens) - len(blocks))

    def grow(self, blocks: list[int], num_tokens: int) -> bool:
        """Extends `blocks` to hold `num_tokens`; False, and no change, if too few are free."""
        missing = self.missing(blocks, num_tokens)
        if missing > len(self._free):
            return False
        blocks.extend(self._free.pop() for _ in range(missing))
        return True

    def free(self, blocks: list[int]) -> None:
        """Takes all of `blocks` back and empties the list."""
        self._free.extend(reversed(blocks))
        blocks.clear()
