"""What the server writes to its log: one line an event, as text or as JSON."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

FORMATS = ("text", "json")
# What every record has; the rest is what the event adds.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def configure(form: str, level: str) -> None:
    """Sends what the server and uvicorn say to standard error.

    Args:
      form: one of FORMATS.
      level: a name of `logging`'s, such as "info".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    for name in ("qjax.server", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    # Its lines on starting and stopping repeat ours.
    if level != "debug":
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def _added(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **_added(record),
        }
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return json.dumps(event, ensure_ascii=False, default=str)


class _Text(logging.Formatter):
    """What clients wrote is quoted, so that it cannot look like a line of ours."""

    def format(self, record: logging.LogRecord) -> str:
        words = [
            f"{name}={value if isinstance(value, (int, float)) else json.dumps(str(value))}"
            for name, value in _added(record).items()
        ]
        line = " ".join([_time(record), record.levelname.lower(), record.getMessage(), *words])
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line
