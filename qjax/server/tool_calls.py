"""Tool calls in generated text: found as it comes, and forced where a call is required.

Models write calls as the chat template taught them. Whatever does not read as a call is content, as
it stands: nothing that a model writes is an error.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qjax.server.tool_formats import ToolFormat

# Between what opens a call and its first brace.
_LONGEST_HEADER = 256


@dataclass(frozen=True)
class ContentDelta:
    """More text that is no call."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """A call, whole: only then is it known to be one.

    Attributes:
      index: 0 for the first call of a reply.
      id: "call_" and 24 digits; of Mistral's models the 9 characters that their templates take.
      arguments: an object, as JSON text.
    """

    index: int
    id: str
    name: str
    arguments: str


Deltas = list[ContentDelta | ToolCallDelta]


def parse(
    format: ToolFormat, text: str, parallel_tool_calls: bool = True
) -> tuple[str | None, list[ToolCallDelta]]:
    """(content, calls) of a whole reply; the content is None where there is none beside calls."""
    parser = ToolCallParser(format, parallel_tool_calls)
    deltas = parser.push(text) + parser.finish()
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    calls = [delta for delta in deltas if isinstance(delta, ToolCallDelta)]
    return content or (None if calls else ""), calls


class ToolCallParser:
    """Text in, as it is generated; content and calls out, the same however it is cut.

    White space between content and calls belongs to neither. Text is held back while it may become
    a call.

    Args:
      format: how the model writes calls. Give it text with special tokens in it: of some models
        they are what opens a call.
      parallel_tool_calls: False for the first call alone; others are dropped.
    """

    def __init__(self, format: ToolFormat, parallel_tool_calls: bool = True):
        self._format = format
        self._parallel = parallel_tool_calls
        self._place: Literal["start", "content", "header", "object", "after"]
        self._place = "start" if format.bare else "content"
        self._text = ""  # not decided yet
        self._glue: list[str] = []  # after a call, what may only lead to the next one
        self._header = 0  # in `text`: where what opens the call ends
        self._closed = False  # no more calls without another opening
        self._name: str | None = None  # of the call, where it stands before the arguments
        self._object = _ObjectEnd(0)
        self._count = 0

    def push(self, text: str) -> Deltas:
        """What has become certain with `text`."""
        self._text += text
        out: Deltas = []
        steps = {
            "start": self._start,
            "content": self._content,
            "header": self._read_header,
            "object": self._read_object,
            "after": self._after,
        }
        while steps[self._place](out):
            pass
        return out

    def finish(self) -> Deltas:
        """What is left when no more text comes."""
        out: Deltas = []
        if self._place == "after" and self._text:
            self._put_glue_back()
        self._give(len(self._text), out)
        return out

    # Each of these decides about the beginning of `text`; False where it takes more to know.

    def _start(self, out: Deltas) -> bool:
        """Of formats whose calls may begin a reply without any mark."""
        begin = len(self._text) - len(self._text.lstrip())
        if begin == len(self._text):
            return False
        if self._text[begin] == "{":
            self._open_object(begin, None)
        else:
            self._place = "content"
        return True

    def _content(self, out: Deltas) -> bool:
        found = [(self._text.find(mark), mark) for mark in self._format.begins]
        found = [(at, mark) for at, mark in found if at >= 0]
        at, mark = min(found, default=(len(self._text), ""))
        if not mark:
            at -= _overlap(self._text, self._format.begins)
        self._give(len(self._text[:at].rstrip()), out)
        if not mark:
            return False
        self._open_header(mark)
        return True

    def _read_header(self, out: Deltas) -> bool:
        brace = self._text.find("{", self._header)
        header = self._text[self._header : brace if brace >= 0 else None]
        if len(header) <= _LONGEST_HEADER:
            if brace < 0:
                return False
            if match := re.fullmatch(self._format.header, header):
                names = [name for name in match.groups() if name]
                self._open_object(brace, names[0] if names else None)
                return True
        self._give(self._header, out)
        self._place = "content"
        return True

    def _read_object(self, out: Deltas) -> bool:
        end = self._object.find(self._text)
        if end is None:
            return False
        found = self._read_call(self._text[self._object.begin : end])
        if found is None:
            self._give(end, out)
            self._place = "content"
            return True
        self._text = self._text[end:]
        if self._parallel or self._count == 0:
            name, arguments = found
            out.append(ToolCallDelta(self._count, self._make_id(), name, arguments))
        self._count += 1
        self._place, self._closed = "after", False
        return True

    def _after(self, out: Deltas) -> bool:
        rest = self._text.lstrip(self._format.glue + string.whitespace)
        self._glue.append(self._text[: len(self._text) - len(rest)])
        self._text = rest
        for mark in self._format.begins:
            if rest.startswith(mark):
                self._glue.clear()
                self._open_header(mark)
                return True
        for mark in self._format.ends:
            if rest.startswith(mark):
                self._glue.clear()
                self._text, self._closed = rest[len(mark) :], True
                return True
        if any(mark.startswith(rest) for mark in (*self._format.begins, *self._format.ends)):
            return False
        self._put_glue_back()
        if rest.startswith("{") and not self._closed and not self._format.named:
            self._open_object(len(self._text) - len(rest), None)
        else:
            self._place = "content"
        return True

    def _put_glue_back(self) -> None:
        """It led to no mark."""
        self._text = "".join([*self._glue, self._text]).lstrip()
        self._glue.clear()

    def _open_header(self, mark: str) -> None:
        self._place, self._header = "header", self._text.index(mark) + len(mark)

    def _open_object(self, begin: int, name: str | None) -> None:
        self._place, self._object, self._name = "object", _ObjectEnd(begin), name

    def _give(self, count: int, out: Deltas) -> None:
        """So many characters are content."""
        if count:
            out.append(ContentDelta(self._text[:count]))
        self._text = self._text[count:]

    def _read_call(self, text: str) -> tuple[str, str] | None:
        """(name, arguments) of an object, or None if it is no call."""
        value = _object(text)
        name, arguments = self._name, value
        if value is not None and name is None:
            name = value.get("name")
            # Where there is no mark, an answer in JSON must not be taken for a call.
            none = None if self._format.bare else {}
            arguments = value.get("arguments", value.get("parameters", none))
            if isinstance(arguments, str):
                arguments = _object(arguments)
        if not isinstance(arguments, dict) or not isinstance(name, str) or not name.isprintable():
            return None
        if not name or not _has_utf8(name):
            return None
        try:
            written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            if not _has_utf8(written):
                written = json.dumps(arguments)
        except (ValueError, RecursionError):
            return None
        return name, written

    def _make_id(self) -> str:
        if self._format.short_ids:
            letters = string.ascii_letters + string.digits
            return "".join(secrets.choice(letters) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


class _ObjectEnd:
    """Finds the end of a JSON object in a text that grows, looking at each character once.

    Args:
      begin: where its brace stands.
    """

    def __init__(self, begin: int):
        self.begin = begin
        self._at = begin
        self._depth = 0
        self._in_string = False

    def find(self, text: str) -> int | None:
        while True:
            wanted = _IN_STRING if self._in_string else _OUTSIDE
            match = wanted.search(text, self._at)
            if match is None:
                self._at = len(text)
                return None
            found = match.group()
            if found == "\\":
                if match.end() == len(text):  # what it escapes is still to come
                    self._at = match.start()
                    return None
                self._at = match.end() + 1
                continue
            self._at = match.end()
            if found == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if found == "{" else -1
                if self._depth == 0:
                    return self._at


_IN_STRING = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'["{}]')


def _overlap(text: str, marks: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a mark."""
    longest = max(map(len, marks)) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-count:]) for mark in marks):
            return count
    return 0


def _object(text: str) -> dict[str, Any] | None:
    """A JSON object, or None; line breaks may stand in its strings, as models write code so."""
    try:
        value = json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _has_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
