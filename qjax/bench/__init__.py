"""How fast models (`run`, `qjax bench`) and kernels (`python -m qjax.bench kernels`) run here."""

from qjax.bench.bandwidth import memory_bandwidth
from qjax.bench.model import BenchRow, run, table, weight_bytes

__all__ = ["BenchRow", "memory_bandwidth", "run", "table", "weight_bytes"]
