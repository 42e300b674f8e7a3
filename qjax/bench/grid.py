"""Which cases are measured: sizes of models of 8 and 70 billion weights, or small ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pallas_kernels.kv_update.pages import CACHE_DTYPES
from qjax.bench.cases import ACTS, OPS, Case
from qjax.bench.weights import KINDS

DECODE = "decode"
ALL_OPS = (*OPS[1:], DECODE)  # the product of bfloat16 comes with those that are held against it


@dataclass(frozen=True)
class Grid:
    """Sizes.

    Attributes:
      ops, kinds: of which cases are made; no kinds: those of each op.
      shapes: (n, k) of weights. rows: of x.
      contexts: positions that decoding attends to. sequences: that decode together.
      prefill: new tokens of a prompt.
      kv_heads: of attention, each for four heads of queries.
      decode_kinds: (kind of weights, dtype of the cache) of whole decode steps.
    """

    ops: tuple[str, ...] = ALL_OPS
    kinds: tuple[str, ...] = ()
    shapes: tuple[tuple[int, int], ...] = (
        (4096, 14336),
        (4096, 6144),
        (14336, 4096),
        (8192, 28672),
    )
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
    contexts: tuple[int, ...] = (2048, 8192, 32768)
    sequences: tuple[int, ...] = (1, 8, 32, 64)
    prefill: tuple[int, ...] = (1024,)
    kv_heads: int = 8
    decode_kinds: tuple[tuple[str, str], ...] = (
        ("BF16", "bfloat16"),
        ("FP8 channel", "bfloat16"),
        ("W8A8 INT8", "bfloat16"),
        ("W4A16 g128", "bfloat16"),
        ("W4A16 g128", "int8"),
    )
    decode_context: int = 2048


QUICK = Grid(
    shapes=((256, 512), (512, 256)),
    rows=(1, 8, 64),
    contexts=(64,),
    sequences=(1, 4),
    prefill=(32,),
    kv_heads=2,
    decode_context=64,
)
GROUPED_KINDS = ("W4A16 g128", "FP8 channel", "MXFP4")
PAGES = CACHE_DTYPES[1:]  # float32 is for exactness
# Dtypes of pages beyond these are more of the same for prompts.
PREFILL_PAGES = ("bfloat16", "fp8_e4m3", "int8")


def kinds_of(op: str, grid: Grid) -> tuple[str, ...]:
    """The kinds of an op that the grid asks for."""
    known: dict[str, Sequence[str]] = {
        "matmul": [kind for kind in KINDS if kind != "BF16"],
        "matmul_grouped": GROUPED_KINDS,
        "quantize": list(ACTS),
        "kv_update": PAGES,
        "paged_attention": PAGES,
        "prefill_attention": PREFILL_PAGES,
        DECODE: list(dict.fromkeys(kind for kind, _ in grid.decode_kinds)),
    }
    return tuple(kind for kind in known[op] if not grid.kinds or kind in grid.kinds)


def cases(op: str, grid: Grid) -> Iterator[Case]:
    """All cases of an op, of a size together; before products those of bfloat16."""
    kinds = kinds_of(op, grid)
    if op in ("matmul", "matmul_grouped"):
        for n, k in grid.shapes if op == "matmul" else grid.shapes[:1]:
            for rows in grid.rows if kinds else ():
                if op == "matmul":
                    yield Case("bfloat16", "BF16", n, k, rows)
                yield from (Case(op, kind, n, k, rows) for kind in kinds)
        return
    for kind in kinds:
        if op == "quantize":
            widths = dict.fromkeys(k for _, k in grid.shapes)
            yield from (Case(op, kind, 1, k, rows) for k in widths for rows in grid.rows)
            continue
        one = Case(op, kind, grid.kv_heads, grid.contexts[0], 1)
        if op == "kv_update":
            yield from (replace(one, k=1, rows=rows) for rows in grid.rows)
        elif op == "paged_attention":
            for context in grid.contexts:
                yield from (replace(one, k=context, rows=rows) for rows in grid.sequences)
        elif op == "prefill_attention":
            for context in grid.contexts[:2]:
                yield from (replace(one, k=context, rows=rows) for rows in grid.prefill)
