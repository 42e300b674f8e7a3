"""What tests do with the pages of an engine."""

import qjax


def leave(engine: qjax.Engine, count: int) -> None:
    """Takes all free pages but `count`, for good: they are as scarce as in a smaller cache, whose
    programs would have to be compiled anew."""
    blocks = engine.scheduler.blocks
    assert blocks.grow([], (blocks.num_free - count) * blocks.block_size)
    assert blocks.num_free == count
