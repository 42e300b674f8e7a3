"""What the kernels run on. Asked while tracing: the answer is baked into the program."""

from __future__ import annotations

import jax


def device_kind() -> str:
    """Kind of the device that jax puts arrays on by default: "cpu", "gpu" or "tpu"."""
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
