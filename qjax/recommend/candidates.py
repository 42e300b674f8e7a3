"""What can be made of a model, and on which hardware each pays: the guide's side of a decision.

The rules are those of vLLM's page "Quantization" (its table of hardware) and of LLM Compressor's
"Choosing the right compression scheme": FP8 needs units for it (Ada, Hopper and later, MI300X),
INT8 goes to Turing, Ampere, TPUs and CPUs, FP4 to Blackwell, W4A16 runs anywhere and pays where few
sequences run at a time, and GGUF's types are made for CPUs. What was measured goes before them.
"""

from __future__ import annotations

from dataclasses import dataclass

from qjax.recommend.figures import Loss, Speeds, losses
from qjax.recommend.hardware import Hardware

GGUF = ("Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K")
_UNITS = {"int8": "8-bit integers", "fp8": "8-bit floats", "fp4": "4-bit floats"}


@dataclass(frozen=True)
class Candidate:
    """A way to make a model.

    Attributes:
      scheme, method, group_size: as of `qjax quantize`; no scheme is the model as it is stored.
      needs: what the hardware's units have to multiply for it to pay: "int8", "fp8", "fp4" or "".
      kind: of its weights, in `qjax.bench.weights`.
      why: in words, what speaks for it.
    """

    scheme: str | None
    method: str
    kind: str
    why: str
    group_size: int | None = None
    needs: str = ""

    @property
    def name(self) -> str:
        if self.scheme is None:
            return "as it is"
        groups = f" g{self.group_size}" if self.group_size else ""
        return f"{self.scheme}{groups}" + (f" {self.method}" if self.method else "")

    @property
    def gguf(self) -> bool:
        return self.scheme in GGUF

    @property
    def loss(self) -> Loss | None:
        """What it has cost, measured; None where it was not."""
        if self.scheme in (None, "UNQUANTIZED"):
            return Loss(self.scheme or "", "", None, 0.0, 1.0, "nothing is rounded")
        return losses().of(self.scheme, self.method, self.group_size)


AS_STORED = Candidate(None, "", "", "nothing is rounded again, and nothing has to be made")
UNQUANTIZED = Candidate("UNQUANTIZED", "", "BF16", "nothing is rounded")
QUANTIZED = (
    Candidate(
        *("W8A8", "smoothquant", "W8A8 INT8"),
        "8-bit integer products: half the bytes of bfloat16, and prompts at the speed of int8",
        needs="int8",
    ),
    Candidate(
        *("FP8_DYNAMIC", "rtn", "FP8 channel"),
        "8-bit float products: half the bytes of bfloat16, made without samples",
        needs="fp8",
    ),
    *(
        Candidate(
            *("W4A16", "gptq", "W4A16 g32" if size == 32 else "W4A16 g128"),
            f"a quarter of the bytes of bfloat16, in groups of {size}: decoding reads the least",
            group_size=size,
        )
        for size in (128, 64, 32)
    ),
    Candidate(
        *("NVFP4", "gptq", "NVFP4"),
        "4-bit float products: a quarter of the bytes, and prompts at the speed of FP4",
        needs="fp4",
    ),
    Candidate(
        *("Q8_0", "rtn", "Q8_0"), "8 bits in blocks of 32, the head included; made without samples"
    ),
    Candidate(*("Q6_K", "rtn", "Q6_K"), "6.6 bits, the head included; made without samples"),
    *(
        Candidate(name, "imatrix", "Q4_K", f"{bits} bits a weight or so, the head included")
        for name, bits in (("Q4_K_M", 4.9), ("Q3_K_M", 4), ("Q2_K", 3.4))
    ),
)


def refusal(candidate: Candidate, hardware: Hardware, goal: str, found: Speeds | None) -> str:
    """Why a candidate is not for this hardware; empty where it is."""
    if found is not None and candidate.kind in found.products:
        return ""
    name = hardware.device.name
    if candidate.needs and candidate.needs not in hardware.multiplies:
        capability = (
            "" if hardware.capability is None else f" (compute capability {_dotted(hardware)})"
        )
        return (
            f"{name}{capability} has no units for {_UNITS[candidate.needs]} that the guide would "
            "have it use: inputs would be rounded and nothing won"
        )
    if candidate.gguf and hardware.device.kind != "cpu" and goal != "size":
        return (
            f"GGUF's types are made for CPUs, and were not measured on {name}: the guide has them "
            "there for size alone"
        )
    return ""


def _dotted(hardware: Hardware) -> str:
    assert hardware.capability is not None
    return ".".join(map(str, hardware.capability))
