"""New keys and values into the pages of a cache: norm, rope, quantization and scatter."""

from pallas_kernels.kv_update.api import kv_update

__all__ = ["kv_update"]
