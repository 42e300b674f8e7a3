"""Published figures of common accelerators, for estimates of what they would do.

Figures are those of dense bfloat16 products and of links in one direction, from the makers' data
sheets, read in November 2026. Latencies of collectives are not published: these are rounded from
what all-reduces of a few kilobytes take on such links. Where the maker sells no host of a device,
its network is taken to be 100 Gb/s for each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qjax.errors import RequestError

_GB, _TB, _GIB = 1e9, 1e12, 1 << 30


@dataclass(frozen=True)
class Device:
    """Attributes:
    name: by which it is asked for; others may be its `aliases`.
    kind: "gpu", "tpu" or "cpu": whose layouts weights and cache get.
    memory: bytes.
    bandwidth: of its memory, bytes/s.
    peak: bfloat16 products, operations/s (a multiplication and an addition are two).
    link: bytes/s that it sends to devices of its group.
    latency: seconds that a small collective takes there.
    group: how many devices such links join.
    network: bytes/s that it sends beyond.
    """

    name: str
    kind: str
    memory: float
    bandwidth: float
    peak: float
    link: float
    latency: float
    group: int
    network: float
    aliases: tuple[str, ...] = ()

    def between(self, devices: int) -> tuple[float, float]:
        """(seconds, bytes/s) of a collective of so many devices."""
        if devices <= self.group:
            return self.latency, self.link
        return max(self.latency, NETWORK_LATENCY), min(self.link, self.network)


NVLINK_LATENCY, PCIE_LATENCY, ICI_LATENCY, NETWORK_LATENCY = 10e-6, 25e-6, 5e-6, 30e-6
_PCIE4 = 32 * _GB  # 16 lanes, one direction

DEVICES = (
    # NVIDIA A100 data sheet: 312 TFLOPS, 1,555 and 2,039 GB/s, NVLink 600 GB/s in both directions;
    # DGX A100: 8 GPUs, a 200 Gb/s port each.
    Device(
        *("A100-40GB", "gpu", 40 * _GIB, 1555 * _GB, 312e12, 300 * _GB, NVLINK_LATENCY),
        *(8, 25 * _GB),
    ),
    Device(
        *("A100-80GB", "gpu", 80 * _GIB, 2039 * _GB, 312e12, 300 * _GB, NVLINK_LATENCY),
        *(8, 25 * _GB, ("A100",)),
    ),
    # NVIDIA H100 data sheet (SXM): 1,979 TFLOPS with sparsity, half of it dense, 3.35 TB/s, NVLink
    # 900 GB/s; DGX H100: 8 GPUs, a 400 Gb/s port each.
    Device(
        *("H100", "gpu", 80 * _GIB, 3.35 * _TB, 989e12, 450 * _GB, NVLINK_LATENCY),
        *(8, 50 * _GB, ("H100-SXM", "H100-80GB")),
    ),
    # NVIDIA H200 data sheet (SXM): 141 GB, 4.8 TB/s, products and links as the H100.
    Device(
        *("H200", "gpu", 141 * _GB, 4.8 * _TB, 989e12, 450 * _GB, NVLINK_LATENCY),
        *(8, 50 * _GB),
    ),
    # NVIDIA DGX B200 data sheet, an eighth of it: 1,440 GB, 64 TB/s, 36 PFLOPS of bfloat16 with
    # sparsity, NVLink 14.4 TB/s, 400 Gb/s ports.
    Device(
        *("B200", "gpu", 180 * _GB, 8 * _TB, 2250e12, 900 * _GB, NVLINK_LATENCY),
        *(8, 50 * _GB),
    ),
    # NVIDIA L4 data sheet: 24 GB, 300 GB/s, 242 TFLOPS with sparsity, PCIe Gen4 x16.
    Device("L4", "gpu", 24 * _GB, 300 * _GB, 121e12, _PCIE4, PCIE_LATENCY, 8, 12.5 * _GB),
    # NVIDIA L40S data sheet: 48 GB, 864 GB/s, 362 TFLOPS, PCIe Gen4 x16.
    Device("L40S", "gpu", 48 * _GB, 864 * _GB, 362e12, _PCIE4, PCIE_LATENCY, 8, 12.5 * _GB),
    # NVIDIA Ada GPU architecture paper: 24 GB, 1,008 GB/s, 165.2 TFLOPS with float32 sums, PCIe
    # Gen4 x16, whose data go through the host.
    Device(
        *("RTX-4090", "gpu", 24 * _GIB, 1008 * _GB, 165.2e12, _PCIE4 / 2, PCIE_LATENCY),
        *(8, 12.5 * _GB, ("4090",)),
    ),
    # AMD Instinct MI300X data sheet: 192 GB, 5.3 TB/s, 1,307 TFLOPS, seven Infinity Fabric links of
    # 128 GB/s in both directions.
    Device(
        *("MI300X", "gpu", 192 * _GB, 5.3 * _TB, 1307e12, 448 * _GB, NVLINK_LATENCY),
        *(8, 50 * _GB),
    ),
    # docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x. Links are in both directions there;
    # a ring uses them so.
    Device(
        *("TPU-v5e", "tpu", 16 * _GIB, 819 * _GB, 197e12, 400 * _GB / 2, ICI_LATENCY),
        *(256, 200 * _GB / 8 / 8, ("v5litepod",)),
    ),
    Device(
        *("TPU-v5p", "tpu", 95 * _GIB, 2765 * _GB, 459e12, 1200 * _GB / 2, ICI_LATENCY),
        *(8960, 50 * _GB / 8),
    ),
    Device(
        *("TPU-v6e", "tpu", 32 * _GIB, 1638 * _GB, 918e12, 800 * _GB / 2, ICI_LATENCY),
        *(256, 100 * _GB / 8, ("Trillium",)),
    ),
    # A chip is two devices: each has half of it.
    Device(
        *("TPU-v7", "tpu", 96 * _GIB, 3690 * _GB, 1153.5e12, 1200 * _GB / 4, ICI_LATENCY),
        *(18432, 100 * _GB / 16, ("v7x", "7x", "Ironwood")),
    ),
)


def device(name: str) -> Device:
    """The accelerator of a name, in any case, without dashes or "TPU" too.

    Raises:
      RequestError: there is none; names those there are.
    """
    asked = _plain(name)
    for each in DEVICES:
        if asked in map(_plain, (each.name, *each.aliases)):
            return each
    known = ", ".join(each.name for each in DEVICES)
    raise RequestError(
        f"device {name!r:.40} is not in the table: {known}. Figures of another go by bandwidth, "
        "peak, link and memory."
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("tpu")
