"""Which kernel a weight would get on this machine."""

from __future__ import annotations

from dataclasses import replace

from pallas_kernels.matmul import supports as kernels
from qjax.qarray import QArray

_ROWS = 64  # answer as well as all would


def supports(w: QArray) -> kernels.Support:
    """What would run products with a canonical weight here; nothing is run, no bytes are read."""
    spec = w.spec
    n, k = spec.shape
    if spec.group is None:
        spec = replace(spec, shape=(min(n, _ROWS), k))
    else:
        size = spec.group[0]
        rows = min(n, _ROWS) if size >= n else min(n, -(-_ROWS // size) * size)
        spec = replace(spec, shape=(rows, k), group=(min(size, rows), spec.group[1]))
    return kernels.supports(spec, w.act)
