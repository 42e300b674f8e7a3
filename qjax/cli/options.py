"""Options that several subcommands share, and the sampling parameters that they come to."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "smollm2-135m"
SAMPLING = "Sampling"


class Numerics(StrEnum):
    fast = "fast"
    exact = "exact"


Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A built-in name, a GGUF file, a folder, or org/name[:variant]."
    ),
]
NumericsOption = Annotated[
    Numerics, typer.Option("--numerics", help="Round activations for speed, or compute exactly.")
]
System = Annotated[str | None, typer.Option("--system", help="A system message to begin with.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", "-n", help="Most tokens to generate.", min=1)
]
MaxModelLen = Annotated[
    int | None, typer.Option("--max-model-len", help="Most tokens of prompt and output.")
]
KVCacheDtype = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        help="auto, bfloat16, float32, int8, fp8 (fp8_e4m3), fp8_e5m2 or int4: the cache's type.",
    ),
]
KVCacheSkipLayers = Annotated[
    list[str] | None,
    typer.Option(
        "--kv-cache-dtype-skip-layers",
        help="A layer whose cache is not quantized, or sliding_window; may be repeated.",
    ),
]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0 is greedy.", rich_help_panel=SAMPLING)
]
TopK = Annotated[int, typer.Option("--top-k", help="0 keeps all.", rich_help_panel=SAMPLING)]
TopP = Annotated[float, typer.Option("--top-p", help="1 keeps all.", rich_help_panel=SAMPLING)]
MinP = Annotated[float, typer.Option("--min-p", help="0 keeps all.", rich_help_panel=SAMPLING)]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", help="1 is none.", rich_help_panel=SAMPLING)
]
PresencePenalty = Annotated[
    float, typer.Option("--presence-penalty", help="0 is none.", rich_help_panel=SAMPLING)
]
FrequencyPenalty = Annotated[
    float, typer.Option("--frequency-penalty", help="0 is none.", rich_help_panel=SAMPLING)
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Makes sampling repeatable.", rich_help_panel=SAMPLING)
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="Text that ends the output; may be repeated."),
]
SAMPLES = "Calibration"
Calibration = Annotated[
    str | None,
    typer.Option(
        *("--calibration", "--dataset"),
        help="A text, .jsonl or .npy file, a data set of the hub, or self (the default): what the "
        "model writes.",
        rich_help_panel=SAMPLES,
    ),
]
SeqLen = Annotated[
    int | None,
    typer.Option("--seq-len", help="Tokens of each sample.", min=2, rich_help_panel=SAMPLES),
]
History = Annotated[
    Path | None,
    typer.Option("--history", help="A .jsonl file that gets a line with the key figures."),
]
