"""`python -m qjax.bench kernels`: are the kernels right here, and then how fast are they."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pallas_kernels import dispatch, platform
from qjax.bench import clock, correctness, decode, device, grid
from qjax.bench.cases import Case, Measured, Ready, prepare, timed
from qjax.bench.clock import TOGETHER, Timing
from qjax.bench.grid import Grid
from qjax.bench.result import Result
from qjax.errors import QjaxError
from qjax.models.config import model_config
from qjax.params import Params

PEER_SECONDS = 600


class WrongValues(QjaxError):
    """Kernels whose values are wrong: their speed is not worth knowing."""


def check(sizes: Grid, implementation: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Every implementation against float64: how many cases, and who refused what.

    Raises:
      WrongValues: naming each case that is wrong.
    """
    done = [
        each
        for op in sizes.ops
        if op != grid.DECODE
        for each in correctness.checks(op, grid.kinds_of(op, sizes), implementation)
    ]
    wrong = [str(each) for each in done if not each.passed]
    if wrong:
        raise WrongValues("wrong values:\n  " + "\n  ".join(wrong))
    counts: dict[str, int] = {}
    for each in done:
        if each.error is not None:
            counts[f"{each.op} {each.implementation}"] = (
                counts.get(f"{each.op} {each.implementation}", 0) + 1
            )
    refused = {
        f"{each.op} {each.kind} {each.implementation}": each.reason
        for each in done
        if each.error is None
    }
    say(f"right: {', '.join(f'{name} {count}' for name, count in counts.items()) or 'nothing'}")
    return {"right": counts, "refused": refused}


def run(
    sizes: Grid,
    *,
    path: Path | None = None,
    quick: bool = False,
    implementations: Sequence[str | None] = (None,),
    budget_seconds: float | None = None,
    peer: Path | None = None,
    timing: Timing | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Result:
    """Checks, then measures what is not in the file yet.

    Args:
      path: the file of results; written after every case.
      quick: as little time as possible, of small cases.
      implementations: by name; None for the one that is chosen without a name.
      budget_seconds: after so long no further case begins.
      peer: a program that measures another library; see benchmarks/torch_kernels.py.

    Raises:
      QjaxError: no op has an implementation of such a name.
      WrongValues: before anything is measured.
      ResultError: the file is of another device or of other versions.
    """
    begin = time.monotonic()
    names = {name for op in grid.ALL_OPS for name in correctness.known(op)}
    for name in implementations:
        if name is not None and name not in names:
            raise QjaxError(f"no implementation {name!r}; there are: {', '.join(sorted(names))}")
    if timing is None:
        usual = clock.ON_CPU if platform.device_kind() == "cpu" else Timing()
        timing = clock.QUICK if quick else usual
    result = Result.open(path, {**device.description(), "quick": quick})
    checked = [check(sizes, name, say) for name in implementations]
    limits = device.limits(timing, quick)
    result.head |= {"limits": asdict(limits), "checks": checked}
    result.save()
    say(
        f"bandwidth {limits.bandwidth / 1e9:.1f} GB/s, "
        + ", ".join(f"{name} {rate / 1e12:.2f} T/s" for name, rate in limits.peaks.items())
    )
    if peer is not None:
        result.head["peers"] = _ask_peer(peer, sizes)
        result.save()
    for op in sizes.ops:
        for name in implementations:
            if name and op != grid.DECODE and name not in correctness.known(op):
                continue
            left = [case for case in grid.cases(op, sizes) if not result.find(**_key(case, name))]
            for at in range(0, len(left), TOGETHER):
                for case, ready in _prepared(left[at : at + TOGETHER], name, limits, timing):
                    if budget_seconds and time.monotonic() - begin > budget_seconds:
                        say("out of time: run again to go on")
                        return result
                    row = _measured(case, name, ready, result, limits, timing)
                    result.add(row)
                    say(_line(row))
            if op == grid.DECODE:
                _decode(sizes, name, result, limits, timing, quick, say)
    return result


def _key(case: Case, name: str | None) -> dict[str, Any]:
    key = {field: getattr(case, field) for field in ("op", "kind", "n", "k", "rows")}
    return key | {"asked": "" if case.op == "bfloat16" else name or ""}


def _prepared(
    some: Sequence[Case], name: str | None, limits: device.Limits, timing: Timing
) -> Iterator[tuple[Case, Future[Ready | Measured]]]:
    """Cases, compiled side by side; nothing is being compiled any more when the first is given."""

    def compiled(case: Case) -> Ready | Measured:
        named = None if case.op == "bfloat16" else name
        return prepare(case, timing, named, limits.bandwidth, limits.peaks["bfloat16"])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(compiled, case) for case in some]
    yield from zip(some, futures, strict=True)


def _measured(
    case: Case,
    name: str | None,
    ready: Future[Ready | Measured],
    result: Result,
    limits: device.Limits,
    timing: Timing,
) -> dict[str, Any]:
    key = _key(case, name)
    try:
        found = timed(ready.result(), timing)
    except Exception as error:  # a compiler's, or memory: the other cases are still wanted
        return key | {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
    row = key | _figures(found, limits)
    baseline = result.find(**key | {"op": "bfloat16", "kind": "BF16", "asked": ""})
    if case.op == "matmul" and baseline and found.seconds:
        row["bfloat16_ratio"] = _short(baseline["microseconds"] / row["microseconds"])
    return row


def _figures(found: Measured, limits: device.Limits) -> dict[str, Any]:
    row: dict[str, Any] = {"implementation": found.implementation, "refused": found.refused}
    if found.seconds is None:
        return row
    rate, arithmetic = found.nbytes / found.seconds, found.flops / found.seconds
    return row | {
        "microseconds": _short(found.seconds * 1e6),
        "gigabytes_per_second": _short(rate / 1e9),
        "teraflops": _short(arithmetic / 1e12),
        "bandwidth_share": _short(rate / limits.bandwidth),
        "peak_share": _short(arithmetic / limits.peaks[found.peak]),
    }


def _decode(
    sizes: Grid,
    name: str | None,
    result: Result,
    limits: device.Limits,
    timing: Timing,
    quick: bool,
    say: Callable[[str], None],
) -> None:
    """Whole steps: `n` is the number of layers, `k` the context, `rows` the sequences."""
    config = model_config(decode.TINY if quick else decode.LLAMA_8B)
    wanted = grid.kinds_of(grid.DECODE, sizes)
    held, params = "", None
    for kind, cache_dtype in sizes.decode_kinds:
        for batch in sizes.sequences if kind in wanted else ():
            label = kind if cache_dtype == "bfloat16" else f"{kind}, {cache_dtype} cache"
            key = {"op": grid.DECODE, "kind": label, "n": config.num_layers}
            key |= {"k": sizes.decode_context, "rows": batch, "asked": name or ""}
            if result.find(**key) is not None:
                continue
            try:
                # Not every operation of a model has each implementation.
                with dispatch.use(name and f"{name},xla"):
                    if params is None or held != kind:
                        params = None  # two trees at once may not fit
                        params = Params(decode.random_tree(config, kind), config)
                        held = kind
                    seconds, nbytes = decode.seconds(
                        params, batch, sizes.decode_context, cache_dtype, timing
                    )
            except Exception as error:  # see `_measured`
                row = key | {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
            else:
                row = key | {
                    "implementation": name or "",
                    "microseconds": _short(seconds * 1e6),
                    "tokens_per_second": _short(batch / seconds),
                    "gigabytes_per_second": _short(nbytes / seconds / 1e9),
                    "bandwidth_share": _short(nbytes / seconds / limits.bandwidth),
                }
                baseline = result.find(**key | {"kind": "BF16"})
                if baseline is not None:
                    row["bfloat16_ratio"] = _short(baseline["microseconds"] / row["microseconds"])
            result.add(row)
            say(_line(row))


def _ask_peer(program: Path, sizes: Grid) -> dict[str, Any]:
    """What a program prints, given shapes and rows: it is another process, and another library."""
    arguments = [f"--shape={n}x{k}" for n, k in sizes.shapes] + [f"--rows={r}" for r in sizes.rows]
    command = [sys.executable, str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_SECONDS)
    if done.returncode:
        return {"failed": done.stderr.strip()[-500:]}
    return json.loads(done.stdout)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _line(row: dict[str, Any]) -> str:
    size = f"{row['n']}x{row['k']}"
    head = f"{row['op']:<18}{row['kind']:<18}{size:<12}{row['rows']:>5} rows "
    if "failed" in row:
        return head + "FAILED " + row["failed"].splitlines()[0]
    if "microseconds" not in row:
        return head + "refused"
    share = f"{row['bandwidth_share']:.0%} of bandwidth"
    if "bfloat16_ratio" in row:
        share += f", {row['bfloat16_ratio']:.2f} x bfloat16"
    return f"{head}{row['implementation']:<11}{row['microseconds']:>10.1f} us  {share}"


def failures(result: Result) -> list[str]:
    """The cases that ended in an error."""
    return [_line(row) for row in result.rows if "failed" in row]
