"""Sizes as people write them: "32k" tokens, "80GiB" of memory."""

import re

from qjax.errors import RequestError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?[bB])?")


def tokens(text: str, option: str) -> int:
    """A number of tokens as vLLM reads it: "32k" are 32,000 and "32K" 32,768.

    Raises:
      RequestError: it is no such number; names the option.
    """
    return _number(text, option, in_bytes=False)


def nbytes(text: str, option: str) -> int:
    """A number of bytes: "80GiB" are 80 * 2**30, "80GB" 80 * 10**9; without a unit, as `tokens`."""
    return _number(text, option, in_bytes=True)


def _number(text: str, option: str, *, in_bytes: bool) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is not None and (in_bytes or match[3] is None):
        number, prefix, unit = match[1], match[2], match[3]
        binary = unit in ("iB", "ib") if unit else prefix.isupper()
        size = float(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()]
        if size >= 1 and (unit or size == int(size)):
            return int(size)
    examples = "80GiB, 80GB or 85899345920" if in_bytes else "32k (32,000), 32K (32,768) or 32768"
    raise RequestError(f"{option} {text!r:.40} is no size: write it as {examples}.")
