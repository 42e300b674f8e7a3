"""Server-sent events, out of the pieces that a stream arrives in."""

from qjax.errors import ServingError

_LONGEST_LINE = 1 << 22


class Events:
    """Collects pieces; as the HTML standard has it, a blank line ends an event, several lines of
    data make one text, and comments and other fields carry none."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def push(self, piece: bytes) -> list[bytes]:
        """The data of the events that ended with this piece.

        Raises:
          ServingError: a line has no end.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            raise ServingError(f"a line of the stream has more than {_LONGEST_LINE} bytes")
        found = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                found.append(b"\n".join(self._data))
                self._data = []
        return found
