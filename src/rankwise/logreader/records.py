"""One line of a log file: its time without parsing it, and its fields."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any, NamedTuple

_HEAD = re.compile(
    rb'\{"time": "([0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]\.[0-9]{6})\+00:00", '
    rb'(?:"monotonic_ns": [0-9]{1,20}, )?"level": "([^"\\]{0,100})"'
)
_decode = json.JSONDecoder().raw_decode


class Head(NamedTuple):
    """What a record can be placed and often refused by."""

    time: bytes
    """As `time_key` writes it."""
    level: str
    fields: dict[str, Any] | None
    """None where the line has not been parsed for it."""


def read_head(line: bytes) -> Head | None:
    """Time and level of a line; None where it is no log record.

    A line in the layout that docs/design/run-directory.md gives is not parsed: of millions of lines most are refused
    by their level or time. Its rest may still turn out to be torn: see `read_fields`.

    Ranks: local.
    """
    match = _HEAD.match(line)
    if match is not None:
        return Head(match[1], match[2].decode("utf-8", "replace"), None)
    fields = read_fields(line)
    if fields is None:
        return None
    try:
        time = datetime.fromisoformat(fields["time"])
        return Head(time_key(time), str(fields.get("level", "")), fields)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def read_fields(line: bytes) -> dict[str, Any] | None:
    """The fields of a line; None where it is no log record.

    Ranks: local.
    """
    try:
        text = line.decode("utf-8").strip()
        # What json.loads does, without its two calls around this: there are millions of lines.
        fields, end = _decode(text)
    except (ValueError, RecursionError):
        return None
    return fields if end == len(text) and isinstance(fields, dict) and "message" in fields else None


def time_key(time: datetime) -> bytes:
    """A moment as text that compares as moments do: UTC, microseconds; without a zone it is taken as UTC.

    Raises:
        OverflowError: it is outside the years 1 to 9999 in UTC.
    Ranks: local.
    """
    aware = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
    return aware.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds").encode()


def message_of(fields: dict[str, Any]) -> str:
    """The message, and the error that came with it, without its traceback.

    Ranks: local.
    """
    message = str(fields["message"])
    exception = fields.get("exception")
    if not isinstance(exception, dict):
        return message
    return f"{message}\n{exception.get('type', '')}: {exception.get('message', '')}"


def traceback_of(fields: dict[str, Any]) -> str:
    """The traceback, or what there is of the error instead; empty where there was none.

    Ranks: local.
    """
    exception = fields.get("exception")
    if not isinstance(exception, dict):
        return ""
    return str(exception.get("traceback") or f"{exception.get('type', '')}: {exception.get('message', '')}")


def stack_of(fields: dict[str, Any]) -> str:
    """Where the program was, for a record made with `stack_info=True`; empty for others.

    Ranks: local.
    """
    return str(fields.get("stack") or "")


def step_of(fields: dict[str, Any]) -> int | None:
    """The step the record was made in; None where it was not known.

    Ranks: local.
    """
    step = fields.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None
