"""The methods that `quantize_vs_peers.py` compares, as recipes: the same text for both sides."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """Attributes:
    name: a line of the table.
    recipe: YAML, which both sides take but for GGUF files.
    gguf: the file type by llama-quantize's name; None: the peer is LLM Compressor.
    """

    name: str
    recipe: str
    gguf: str | None = None


def _stage(**modifiers: dict[str, str]) -> str:
    """A recipe of modifiers by name, each with its fields."""
    lines = ["quant_stage:", "  quant_modifiers:"]
    for name, fields in modifiers.items():
        lines += [f"    {name}:", *(f"      {key}: {value}" for key, value in fields.items())]
    return "\n".join(lines) + "\n"


def _preset(scheme: str) -> dict[str, str]:
    return {"targets": "Linear", "scheme": scheme, "ignore": "[lm_head]"}


def _integers(bits: int, group: int, symmetric: bool = True) -> dict[str, str]:
    """Weights only. No preset has these groups, which a width of 576 needs."""
    weights = (
        f"{{num_bits: {bits}, type: int, symmetric: {str(symmetric).lower()}, strategy: group, "
        f"group_size: {group}}}"
    )
    groups = f"{{group_0: {{targets: [Linear], weights: {weights}}}}}"
    return {"ignore": "[lm_head]", "config_groups": groups}


def _rtn(*weights: int) -> str:
    return _stage(QuantizationModifier=_integers(*weights))


def _gptq(*weights: int) -> str:
    return _stage(GPTQModifier=_integers(*weights))


def _awq(*weights: int, symmetric: bool = True) -> str:
    return _stage(
        AWQModifier={"duo_scaling": "true"},
        QuantizationModifier=_integers(*weights, symmetric=symmetric),
    )


def _autoround(*weights: int) -> str:
    """AutoRound with a quarter of its steps, which take long without an accelerator."""
    fields = {"iters": "50", "batch_size": "4", "enable_torch_compile": "false"}
    return _stage(AutoRoundModifier=fields | _integers(*weights))


def _smoothed(modifier: str) -> str:
    return _stage(SmoothQuantModifier={"smoothing_strength": "0.8"}, **{modifier: _preset("W8A8")})


def _gguf(kind: str, **fields: str) -> str:
    """The embedding, which is the head, included."""
    return _stage(QuantizationModifier={"targets": "Linear", "scheme": kind} | fields)


METHODS = (
    Method("RTN W4A16 g64", _rtn(4, 64)),
    Method("GPTQ W4A16 g64", _gptq(4, 64)),
    Method("GPTQ W4A16 g32", _gptq(4, 32)),
    Method("AWQ W4A16 g64", _awq(4, 64)),
    Method("AWQ W4A16_ASYM g64", _awq(4, 64, symmetric=False)),
    Method("AutoRound W4A16 g64", _autoround(4, 64)),
    Method("SmoothQuant + RTN W8A8", _smoothed("QuantizationModifier")),
    Method("SmoothQuant + GPTQ W8A8", _smoothed("GPTQModifier")),
    Method("FP8_DYNAMIC", _stage(QuantizationModifier=_preset("FP8_DYNAMIC"))),
    Method("NVFP4A16", _stage(QuantizationModifier=_preset("NVFP4A16"))),
    Method("GPTQ NVFP4", _stage(GPTQModifier=_preset("NVFP4"))),
    Method("MXFP4A16", _stage(QuantizationModifier=_preset("MXFP4A16"))),
    Method("HQQ W4A16_ASYM g64", _stage(HQQModifier=_integers(4, 64, symmetric=False))),
    *(
        Method(f"{name} W{bits}A16 g64", recipe(bits, 64))
        for bits in (3, 2)
        for name, recipe in (
            ("RTN", _rtn),
            ("AWQ", _awq),
            ("GPTQ", _gptq),
            ("AutoRound", _autoround),
        )
    ),
    *(Method(f"GGUF {kind}", _gguf(kind), kind) for kind in ("Q8_0", "Q6_K")),
    *(
        Method(f"GGUF {kind}", _gguf(kind, weight_observer="imatrix_mse"), kind)
        for kind in ("Q4_K_M", "Q4_K_S", "Q3_K_M", "Q3_K_S", "Q2_K", "Q2_K_S")
    ),
)
