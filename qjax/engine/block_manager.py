"""Which pages of the paged cache are free, and which already hold what a sequence begins with."""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256

import numpy as np


class BlockManager:
    """Lends the pages of a cache.

    A full page may be given a name, which stands for its tokens and all tokens before them (see
    `page_names`). Sequences that begin alike share such pages. When the last of them lets go of
    one, it keeps what it holds until the space is needed; the longest unused is then the first.

    Args:
      num_blocks: pages in the cache.
      block_size: tokens a page holds.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        # The last freed page is lent first: it is the likeliest to be in a CPU's caches.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()  # of those with a name

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._unheld)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def missing(self, blocks: list[int], num_tokens: int) -> int:
        """How many more pages `num_tokens` take."""
        return max(0, self.blocks_for(num_tokens) - len(blocks))

    def grow(self, blocks: list[int], num_tokens: int) -> bool:
        """Extends `blocks` to hold `num_tokens`; False, and no change, if too few are free."""
        missing = self.missing(blocks, num_tokens)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._forget_oldest()
            self._holders[block] = 1
            blocks.append(block)
        return True

    def free(self, blocks: list[int]) -> None:
        """Takes all of `blocks` back and empties the list."""
        for block in reversed(blocks):  # a beginning is of more use than what comes after it
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._names:
                self._unheld[block] = None
            else:
                self._free.append(block)
        blocks.clear()

    def name(self, block: int, name: bytes) -> None:
        """Says what a lent page holds, or will when the steps sent so far are done."""
        if block not in self._names and name not in self._named:
            self._named[name], self._names[block] = block, name

    def found(self, names: Sequence[bytes]) -> int:
        """How many of `names`, from the first on, are of pages that are here."""
        return next((i for i, name in enumerate(names) if name not in self._named), len(names))

    def share(self, blocks: list[int], names: Sequence[bytes]) -> None:
        """Extends `blocks` by the pages of these names."""
        for name in names:
            block = self._named[name]
            self._unheld.pop(block, None)
            self._holders[block] += 1
            blocks.append(block)

    def _forget_oldest(self) -> int:
        block, _ = self._unheld.popitem(last=False)
        del self._named[self._names.pop(block)]
        return block


def page_names(tokens: Sequence[int], block_size: int, salt: str, known: list[bytes]) -> None:
    """Extends `known`, the names of a sequence's first pages, to all that `tokens` fill.

    A name is the SHA-256 of the name before and the page's tokens, so that nobody can make up a
    prompt that gets another one's pages. `salt` goes into the first: who does not know it can
    neither use those pages nor tell by the time it takes whether they are there.
    """
    for start in range(len(known) * block_size, len(tokens) - block_size + 1, block_size):
        before = known[-1] if known else sha256(salt.encode()).digest()
        page = np.asarray(tokens[start : start + block_size], np.int32)
        known.append(sha256(before + page.tobytes()).digest())
