"""The mixes of llama-quantize: which type each tensor of a GGUF file gets.

A mix such as Q4_K_M has one type for most tensors, and others for those that suffer most: values
and the second feed-forward matrix of some layers, the output, embeddings. The rules are those of
llama.cpp (src/llama-quant.cpp, July 2026). A type whose blocks do not divide the rows of a tensor
gives way to one of blocks of 32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qjax.checkpoint.names import gguf_tensor
from qjax.errors import UnsupportedError
from qjax.models.config import ModelConfig
from qjax.qtypes import QTYPES

# Mix -> the type of most of its tensors.
MIXES: dict[str, str] = {
    "F32": "f32",
    "F16": "f16",
    "BF16": "bf16",
    "Q4_0": "q4_0",
    "Q4_1": "q4_1",
    "Q5_0": "q5_0",
    "Q5_1": "q5_1",
    "Q8_0": "q8_0",
    "Q2_K": "q2_k",
    "Q2_K_S": "q2_k",
    "Q3_K_S": "q3_k",
    "Q3_K_M": "q3_k",
    "Q3_K_L": "q3_k",
    "Q4_K_S": "q4_k",
    "Q4_K_M": "q4_k",
    "Q5_K_S": "q5_k",
    "Q5_K_M": "q5_k",
    "Q6_K": "q6_k",
    "IQ1_S": "iq1_s",
    "IQ1_M": "iq1_m",
    "IQ2_XXS": "iq2_xxs",
    "IQ2_XS": "iq2_xs",
    "IQ2_S": "iq2_xs",
    "IQ2_M": "iq2_s",
    "IQ3_XXS": "iq3_xxs",
    "IQ3_XS": "iq3_s",
    "IQ3_S": "iq3_s",
    "IQ3_M": "iq3_s",
    "IQ4_NL": "iq4_nl",
    "IQ4_XS": "iq4_xs",
    "TQ1_0": "tq1_0",
    "TQ2_0": "tq2_0",
    "Q1_0": "q1_0",
    "Q2_0": "q2_0",
}
# llama-quantize's other names.
ALIASES = {"Q2_K_M": "Q2_K", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

_FALLBACKS = {
    **dict.fromkeys(
        ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"
    ),
    **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0", "q2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
_TINY = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_VALUES = ("attn_v", "attn_qkv", "attn_kv_b")
_EXPERT_OUTPUT_Q5 = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"),
    *("IQ3_XS", "IQ3_XXS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"),
)


def mix_types(
    mix: str,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    importance: bool = False,
) -> dict[str, str]:
    """The type of each weight in a mix.

    Args:
      mix: key of `MIXES` or `ALIASES`, in any case.
      config: the model's.
      shapes: of its weights [..., N, K], by module ("model.layers.0.self_attn.q_proj").
      importance: whether the importance of input columns is known, which makes some protection
        needless.

    Returns:
      key of `QTYPES` for each module; "f32" for routers.

    Raises:
      UnsupportedError: no such mix, a module that has no place in a GGUF file, or rows that no type
        of this mix divides.
    """
    mix = ALIASES.get(mix.upper(), mix.upper())
    if mix not in MIXES:
        raise UnsupportedError(f"no GGUF mix {mix!r:.40}; these are: {', '.join(MIXES)}")
    stored: dict[str, str] = {}
    for module in shapes:
        name = gguf_tensor(f"{module}.weight", config)
        if name is None:
            raise UnsupportedError(
                f"{module}: GGUF files of {config.model_type} have no place for it"
            )
        stored[module] = name
    columns = {name: shapes[module][-1] for module, name in stored.items()}
    # Values are counted in the order of layers.
    order = sorted(columns, key=lambda name: (_layer(name), name))
    values = [name for name in order if _part(name) in _VALUES]
    chosen = {}
    for name in order:
        asked = _Asked(
            mix,
            _part(name),
            _layer(name),
            values.index(name) if name in values else 0,
            len(values),
            tied="output.weight" not in columns,
            importance=importance,
        )
        chosen[name] = _type(asked, config, columns[name])
    return {module: chosen[name] for module, name in stored.items()}


@dataclass(frozen=True)
class _Asked:
    """Attributes:
    value, num_values: this is the value-th of the tensors that make values.
    tied: the embeddings are the output too.
    """

    mix: str
    part: str
    layer: int
    value: int
    num_values: int
    tied: bool
    importance: bool


def _part(name: str) -> str:
    """ "attn_q" of "blk.3.attn_q.weight"."""
    return re.sub(r"^blk\.\d+\.", "", name).rpartition(".")[0]


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return -1 if match is None else int(match[1])


def _more_bits(i: int, n: int) -> bool:
    """The first and the last eighth, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _type(asked: _Asked, config: ModelConfig, columns: int) -> str:
    usual = MIXES[asked.mix]
    if asked.part.startswith("ffn_gate_inp"):
        return "f32"
    if usual in ("f32", "f16", "bf16"):
        return usual
    if asked.part == "output" or (asked.part == "token_embd" and asked.tied):
        wanted = _output(asked, columns)
    elif asked.part == "token_embd":
        wanted = _embedding(asked)
    elif asked.mix in _TINY:
        wanted = _tiny(asked, config)
    elif asked.part in _VALUES:
        wanted = _values(asked, config)
    elif asked.part in ("attn_q", "attn_k"):
        wanted = _query_or_key(asked, config)
    elif asked.part.startswith("ffn_down"):
        wanted = _down(asked, config)
    elif asked.part == "attn_output":
        wanted = _attention_output(asked, config)
    else:
        n = config.num_layers
        middle = n // 8 <= asked.layer < 7 * n // 8
        gate_or_up = asked.part.startswith(("ffn_gate", "ffn_up"))
        wanted = "iq3_xxs" if asked.mix == "IQ3_XS" and gate_or_up and middle else usual
    return _dividing(wanted, columns)


def _dividing(qtype: str, columns: int) -> str:
    if columns % QTYPES[qtype].block_elements == 0:
        return qtype
    smaller = _FALLBACKS.get(qtype, qtype)
    if QTYPES[smaller].block_elements > 32:
        raise UnsupportedError(
            f"rows of {columns} are not whole blocks of {qtype}, and nothing stands in for it"
        )
    return smaller if columns % QTYPES[smaller].block_elements == 0 else "f16"


def _output(asked: _Asked, columns: int) -> str:
    usual = MIXES[asked.mix]
    if columns % QTYPES[usual].block_elements:
        return "q8_0"
    if asked.mix in (*_TINY, "IQ3_XXS"):
        return "q5_k"
    return "q8_0" if usual == "q8_0" else "q6_k"


def _embedding(asked: _Asked) -> str:
    if asked.mix in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"):
        return "q2_k"
    if asked.mix in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
        return "iq3_s"
    return "q4_k" if asked.mix in ("TQ1_0", "TQ2_0", "Q2_0") else MIXES[asked.mix]


def _queries_a_key(config: ModelConfig) -> int:
    return config.num_heads // config.num_kv_heads


def _experts(config: ModelConfig) -> int:
    return 0 if config.moe is None else config.moe.router.num_experts


def _tiny(asked: _Asked, config: ModelConfig) -> str:
    usual, experts = MIXES[asked.mix], _experts(config)
    larger = "iq3_s" if asked.mix in ("IQ2_S", "IQ2_M") else "q2_k"
    if asked.part in _VALUES:
        return "q4_k" if _queries_a_key(config) >= 4 or experts >= 4 else larger
    if asked.part == "attn_k" and experts == 8:
        return "q4_k"
    if asked.part.startswith("ffn_down"):
        return larger if asked.layer < config.num_layers // 8 else usual
    if asked.part == "attn_output":
        if experts == 8:
            return "q5_k"
        if asked.mix in ("IQ1_S", "IQ1_M"):
            return "iq2_xxs"
        return "iq3_s" if larger == "iq3_s" else usual
    return usual


def _values(asked: _Asked, config: ModelConfig) -> str:
    mix, wanted = asked.mix, MIXES[asked.mix]
    shared = _queries_a_key(config) >= 4
    if mix == "Q2_K":
        wanted = "q4_k" if shared else "q3_k"
    elif mix == "Q2_K_S" and shared:
        wanted = "q4_k"
    elif mix == "IQ3_XXS":
        wanted = "q4_k" if shared else "iq3_xxs" if asked.importance else "iq3_s"
    elif mix == "IQ3_M" or (mix in ("IQ3_XS", "IQ3_S") and shared):
        wanted = "q4_k"
    elif mix == "Q3_K_M":
        wanted = "q5_k" if asked.value < 2 else "q4_k"
    elif mix == "Q3_K_L" or (mix in ("IQ4_NL", "IQ4_XS") and shared):
        wanted = "q5_k"
    elif mix in ("Q4_K_M", "Q5_K_M") and _more_bits(asked.value, asked.num_values):
        wanted = "q6_k"
    elif mix == "Q4_K_S" and asked.value < 4:
        wanted = "q5_k"
    large = config.num_layers == 80 and _queries_a_key(config) > 1  # the 70B models
    if large and wanted in ("q3_k", "q4_k"):
        wanted = "q5_k"
    return "q8_0" if _experts(config) == 8 else wanted


def _query_or_key(asked: _Asked, config: ModelConfig) -> str:
    if asked.part == "attn_k" and _experts(config) == 8:
        return "q8_0"
    return {"IQ3_XS": "iq3_xxs", "IQ3_XXS": "iq2_s"}.get(asked.mix, MIXES[asked.mix])


def _down(asked: _Asked, config: ModelConfig) -> str:
    mix, usual, i, n = asked.mix, MIXES[asked.mix], asked.layer, config.num_layers
    early = i < n // 8
    if mix in ("Q2_K", "Q3_K_L"):
        return "q3_k" if mix == "Q2_K" else "q5_k"
    if mix == "Q2_K_S":
        return "q4_k" if early else usual
    if mix == "IQ3_XXS" and not asked.importance:
        return "q4_k" if early else "q3_k"
    if mix == "Q3_K_M":
        return "q5_k" if i < n // 16 else "q4_k"
    if mix == "IQ3_M":
        return "q4_k" if early or (_experts(config) == 8 and _more_bits(i, n)) else usual
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "q6_k" if _more_bits(i, n) else usual
    if early and mix in ("IQ4_NL", "IQ4_XS") and not asked.importance:
        return "q5_k"
    if early and mix == "Q4_K_S":
        return "q5_k"
    if early and mix in ("Q4_0", "Q5_0") and asked.importance:
        return "q4_1" if mix == "Q4_0" else "q5_1"
    return usual


def _attention_output(asked: _Asked, config: ModelConfig) -> str:
    if _experts(config) == 8:
        return "q5_k" if asked.mix in _EXPERT_OUTPUT_Q5 else MIXES[asked.mix]
    larger = {"Q2_K": "q3_k", "Q3_K_M": "q4_k", "Q3_K_L": "q5_k", "IQ3_XXS": "iq3_s"}
    return (larger | {"IQ3_M": "q4_k"}).get(asked.mix, MIXES[asked.mix])
