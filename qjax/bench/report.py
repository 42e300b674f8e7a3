"""Results of kernels as a table."""

from __future__ import annotations

from typing import Any

# What another library's product is the same kind of work as.
_PEER_OF = {
    "W4A16 g128": "int4",
    "W4A16 g128 asym": "int4",
    "W4A16 g32": "int4",
    "W8A8 INT8": "int8",
    "FP8 channel": "fp8_e4m3",
    "FP8 block": "fp8_e4m3",
}

_COLUMNS = ("op", "kind", "n x k", "rows", "implementation", "us", "GB/s", "TFLOP/s")
_COLUMNS += ("of bandwidth", "of peak", "x bfloat16", "x peer")


def peer_ratio(content: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Time of the other library's product / time of ours; None where there is none."""
    kind = _PEER_OF.get(row["kind"])
    if row["op"] != "matmul" or kind is None or "microseconds" not in row:
        return None
    size = kind, row["n"], row["k"], row["rows"]
    for other in content.get("peers", {}).get("rows", ()):
        if (other["kind"], other["n"], other["k"], other["rows"]) == size:
            return other["microseconds"] / row["microseconds"]
    return None


def table(content: dict[str, Any]) -> str:
    """The rows of a file of results as a table in Markdown."""
    limits, versions = content["limits"], content["versions"]
    peaks = ", ".join(f"{rate / 1e12:.3g} T/s {name}" for name, rate in limits["peaks"].items())
    lines = [
        f"{content['device']}, {content['processors']} processors, {content['date']}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + (", quick" if content["quick"] else ""),
        "",
        f"Measured in the same run: {limits['bandwidth'] / 1e9:.4g} GB/s, {peaks}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [_row(content, row) for row in content["rows"]]
    return "\n".join(lines)


def _row(content: dict[str, Any], row: dict[str, Any]) -> str:
    head = f"| {row['op']} | {row['kind']} | {row['n']}x{row['k']} | {row['rows']} |"
    if "microseconds" not in row:
        return f"{head} {'failed' if 'failed' in row else 'refused'} | | | | | | | |"

    def cell(name: str, form: str) -> str:
        return format(row[name], form) if name in row else ""

    peer = peer_ratio(content, row)
    cells = (
        row["implementation"],
        cell("microseconds", ".4g"),
        cell("gigabytes_per_second", ".4g"),
        cell("teraflops", ".3g"),
        cell("bandwidth_share", ".0%"),
        cell("peak_share", ".0%"),
        cell("bfloat16_ratio", ".2f"),
        "" if peer is None else f"{peer:.2f}",
    )
    return f"{head} {' | '.join(cells)} |"
