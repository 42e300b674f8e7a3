"""The grids of GGUF's IQ types in the form that native/blocks.h looks them up in."""

from __future__ import annotations

import numpy as np

from pallas_kernels.iq_grids import grid

_COLUMN_OF_NIBBLE = (0, 2, 1, 3)


def tables(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A grid of `pallas_kernels.iq_grids` as `Grid` of native/blocks.h has it.

    Returns:
      Entries, uint16 [vectors], and levels, uint8 [2, 16], signed bytes that nibbles stand for.
      Those of "iq1" are in eighths, since kernels add or subtract one.
    """
    vectors = grid(name)
    values = np.unique(vectors)
    level = np.searchsorted(values, vectors).astype(np.uint16)
    bits = 4 if vectors.shape[1] == 4 else 2
    entries = np.zeros(len(vectors), np.uint16)
    for nibble, column in enumerate(_COLUMN_OF_NIBBLE):
        for part, own in enumerate(level[:, column::4].T):
            entries |= own << np.uint16(4 * nibble + bits * part)
    padded = np.zeros(1 << bits, np.int8)
    padded[: len(values)] = values * np.int8(8 if name == "iq1" else 1)
    nibbles = np.arange(16)
    levels = padded[np.stack([nibbles & (len(padded) - 1), nibbles >> 2])]
    return entries, levels.view(np.uint8)
