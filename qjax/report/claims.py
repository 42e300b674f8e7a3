"""What vLLM's documentation says of methods of quantization, which a report sets beside its own.

Shares of the memory of FP16, speed to that of FP16, and loss of accuracy, as its page on
quantization has them in a table, in the edition of Mintlify.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "https://www.mintlify.com/vllm-project/vllm/models/quantization"


@dataclass(frozen=True)
class Claim:
    """A line of the page, and the method of `qjax.report.METHODS` that does the same."""

    label: str
    memory: str
    speed: str
    loss: str
    method: str


CLAIMS = (
    Claim("FP8 W8A8", "~50%", "1.5-2x", "<1%", "fp8"),
    Claim("INT8 W8A8", "~50%", "1.3-1.5x", "~1%", "int8"),
    Claim("INT4 W4A16", "~25%", "1.1-1.3x", "2-5%", "w4a16-rtn"),
    Claim("GPTQ 4-bit", "~25%", "1.2-1.4x", "2-5%", "gptq"),
    Claim("AWQ 4-bit", "~25%", "1.2-1.4x", "<2%", "awq"),
)
