"""Lines on standard error: one an event, as text or as JSON; never a prompt."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from types import TracebackType

from latentguard.serve.errors import error_location


class LogFormatter(logging.Formatter):
    """Time, level and message; of an exception its kind and place, since its words may quote."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        message = " ".join(record.getMessage().splitlines())
        place = self._place(record)
        return f"{_time(record)} {record.levelname} {message}{f' ({place})' if place else ''}"

    @staticmethod
    def _place(record: logging.LogRecord) -> str | None:
        error: tuple[type, BaseException, TracebackType | None] | object = record.exc_info
        return error_location(error[1]) if isinstance(error, tuple) and error[1] else None


class JsonFormatter(LogFormatter):
    """The same as an object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One object."""
        line = dict(
            time=_time(record),
            level=record.levelname.lower(),
            logger=record.name,
            message=record.getMessage(),
        )
        if place := self._place(record):
            line["error"] = place
        return json.dumps(line)


def configure_logs(*, as_json: bool) -> None:
    """Send what this package, its libraries and Python's warnings say to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else LogFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("latentguard").setLevel(logging.INFO)
    logging.captureWarnings(True)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
