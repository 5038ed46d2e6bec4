"""How ``steploom serve`` writes its log: as text, or as an object of JSON a line. The library configures nothing."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any, Literal

import msgspec

from steploom.server.telemetry.record import RECORD

FORMATS = ("text", "json")
_OWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message", "taskName"}
"""What every record has; anything else was given as ``extra``."""


def configure(kind: Literal["text", "json"]) -> None:
    """Has all loggers of this process, uvicorn's too, write that way; a line for each request is shown in any case."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
    for handler in root.handlers:
        handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    logging.captureWarnings(kind == "json")
    logging.getLogger("steploom.access").setLevel(min(logging.INFO, root.level or logging.INFO))
    if kind == "json":
        logging.getLogger("steploom.serve").setLevel(min(logging.INFO, root.level or logging.INFO))


def writes_json() -> bool:
    """Whether what is told to whoever has started the server has to be an object too."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def say(line: str) -> None:
    """Tells whoever has started the server."""
    if writes_json():
        logging.getLogger("steploom.serve").info("%s", line)
    else:
        sys.stderr.write(f"steploom: {line}\n")


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    """Fields of a record, with the ids of the request within which it was written."""
    fields = {name: value for name, value in vars(record).items() if not name.startswith("_")}  # Ray's own have it
    found = {name: value for name, value in fields.items() if name not in _OWN and value is not None}
    served = RECORD.get()
    if served is not None:
        found.setdefault("request_id", served.request_id)
        if served.trace_id is not None:
            found.setdefault("trace_id", served.trace_id)
    return found


def _time(record: logging.LogRecord) -> str:
    at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: ``time``, ``level``, ``logger``, ``message``, and whatever was given as extra."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        told = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name,
                "message": record.getMessage(), **_extras(record)}  # fmt: skip
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            told["stack"] = record.stack_info
        try:
            return msgspec.json.encode(told, enc_hook=str).decode()
        except (TypeError, ValueError):  # keys that are no text, halves of characters
            return json.dumps({str(name): str(value) for name, value in told.items()})


class TextFormatter(logging.Formatter):
    """A record as a line: time, level, logger, message, and whatever was given as extra as ``name=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback follows on lines of its own."""
        extras = "".join(f" {name}={value}" for name, value in _extras(record).items())
        line = f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}{extras}"
        if record.exc_info:
            line += f"\n{self.formatException(record.exc_info)}"
        return line
