"""What a report comes to, in words; all of it follows from the figures."""

from __future__ import annotations

from collections.abc import Sequence

from qjax.report.rows import ModelRow, Report

RISE = 0.02  # of perplexity, that a model may have and still be near its base


def overtaken(batches: Sequence[int], ours: Sequence[float], theirs: Sequence[float]) -> int | None:
    """The batch from which on `theirs` are as fast or faster, of speeds by batch in rising order;
    None where `ours` lead at the largest."""
    found = None
    for batch, our, their in reversed(list(zip(batches, ours, theirs, strict=True))):
        if our > their:
            break
        found = batch
    return found


def behind(report: Report, row: ModelRow) -> int | None:
    """The batch from which on a model is no faster than the base."""
    speeds = ([each.speed(batch) for batch in report.batches] for each in (row, report.base))
    return overtaken(report.batches, *speeds)


def crossover(report: Report) -> int | None:
    """The batch from which on the fastest model of 8 or 16 bits is as fast as the fastest of 4;
    None where that is at none, or where there are no two such models."""
    four = [row for row in report.all_rows if row.four_bit]
    more = [row for row in report.all_rows if not row.four_bit]
    if not (four and more):
        return None
    best = ([max(row.speed(b) for row in rows) for b in report.batches] for rows in (four, more))
    return overtaken(report.batches, *best)


def crossing(report: Report) -> str:
    """Where 4-bit weights stop winning; "" where nothing is to be said."""
    batches = report.batches
    four = [row for row in report.all_rows if row.four_bit]
    if not four or len(four) == len(report.all_rows):
        return ""
    at = crossover(report)
    if at is None:
        ahead = max(four, key=lambda row: row.speed(batches[-1]))
        return (
            f"4-bit weights ({ahead.name}) decode fastest at {_sequences(batches[-1])}, the "
            "largest batch that was measured."
        )
    best = max(report.all_rows, key=lambda row: row.speed(at))
    bits = f"{best.name}, {best.bits:.0f} bits a weight"
    if at == batches[0]:
        return f"4-bit weights decode fastest at no batch from {at} on: {bits}, is faster."
    return (
        f"4-bit weights stop winning at {_sequences(at)}: from there on others are as fast or "
        f"faster, there {bits}."
    )


def verdict(report: Report) -> str:
    """A paragraph: what is best here for latency, throughput, size and accuracy."""
    base, rows, first = report.base, report.rows, report.batches[0]
    read = accuracy_of(report)
    fast = max(report.all_rows, key=lambda row: row.speed(first))
    batch, most = max(
        ((b, row) for b in report.batches for row in report.all_rows),
        key=lambda pair: pair[1].speed(pair[0]),
    )
    small = min(rows, key=lambda row: row.nbytes)
    close = min(rows, key=lambda row: row.divergence[read].mean)
    return " ".join(
        [
            f"On {report.head['device']}, {report.head['processors']} processors:",
            f"for **latency**, {_speed(report, fast, first)};",
            f"for **throughput**, {_speed(report, most, batch)};",
            f"for **size**, {small.name}, {small.nbytes / 1e6:.1f} MB or "
            f"{small.nbytes / base.nbytes:.0%} of {base.name}, at a KL divergence of "
            f"{small.divergence[read].mean:.3g};",
            f"for **accuracy**, {close.name}, a KL divergence of {close.divergence[read].mean:.3g} "
            f"at {close.nbytes / base.nbytes:.0%} of the memory.",
            _near(report, read),
        ]
    )


def rise(report: Report, row: ModelRow, numerics: str) -> float:
    """Of perplexity, over the base's in exact numerics: 0.02 is 2% more."""
    return row.perplexity[numerics].value / report.base.perplexity["exact"].value - 1


def accuracy_of(report: Report) -> str:
    """The numerics by which models are judged: those in which weights alone were rounded, where the
    text was read in them."""
    return report.settings["numerics"][0]


def _near(report: Report, read: str) -> str:
    """The fastest and the smallest of those that lose little."""
    near = [row for row in report.rows if rise(report, row, read) <= RISE]
    if not near:
        return f"None keeps perplexity within {RISE:.0%} of {report.base.name}'s."
    first = report.batches[0]
    fast = max(near, key=lambda row: row.speed(first))
    small = min(near, key=lambda row: row.nbytes)
    kept = f"Of those that raise perplexity by at most {RISE:.0%}"
    if fast is small:
        return f"{kept}, {fast.name} is the fastest at {_sequences(first)}, and the smallest."
    return (
        f"{kept}, {fast.name} is the fastest at {_sequences(first)}, and {small.name} the smallest."
    )


def _speed(report: Report, row: ModelRow, batch: int) -> str:
    """A model's speed, beside the base's."""
    tokens = f"{row.speed(batch):.0f} tokens/s of {_sequences(batch)}"
    if row is report.base:
        return f"{row.name} itself, {tokens}"
    times = row.speed(batch) / report.base.speed(batch)
    read = report.settings["numerics"][-1]
    return (
        f"{row.name}, {tokens}, {times:.2f} times {report.base.name}'s, at a KL divergence of "
        f"{row.divergence[read].mean:.3g} in {read} numerics"
    )


def _sequences(batch: int) -> str:
    return "one sequence" if batch == 1 else f"{batch} sequences"
