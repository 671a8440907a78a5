"""Which records are wanted. What can be told of an unparsed line is asked first."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

from rankwise.logreader.options import Options, is_within
from rankwise.logreader.records import Head, message_of, read_fields, stack_of, step_of, traceback_of

_ABOVE_ALL = 1 << 30

Fields = dict[str, Any]


def build_head_filter(options: Options) -> Callable[[Head], bool]:
    """Whether a record may be wanted, by its time and level.

    Ranks: local.
    """
    level, since, until = options.level, options.since or b"", options.until or b"~"

    def wants(head: Head) -> bool:
        return since <= head.time <= until and (not level or level_number(head.level) >= level)

    return wants


def build_fields_filter(options: Options) -> Callable[[Fields], bool]:
    """Whether a record is wanted, by what it says.

    Ranks: local.
    """
    checks: list[Callable[[Fields], bool]] = []
    if options.logger is not None:
        checks.append(functools.partial(_is_of_logger, options.logger))
    if options.steps is not None:
        steps = options.steps
        checks.append(lambda fields: (step := step_of(fields)) is not None and is_within(step, steps))
    if options.text is not None:
        checks.append(functools.partial(_has_text, options.text))
    return lambda fields: all(check(fields) for check in checks)


def build_line_filter(options: Options) -> Callable[[bytes], bool]:
    """Whether an unparsed line may be wanted: false only where the text asked for cannot be in it.

    Ranks: local.
    """
    if options.text is None or not re.fullmatch(r"[\w ,:=-]+", options.text.pattern, re.ASCII):
        return lambda line: True
    needle = options.text.pattern.encode()
    # Where there is an escape, the text may be written with one.
    return lambda line: needle in line or b"\\" in line


def build_filter(options: Options) -> Callable[[Head, bytes], tuple[Fields | None, bool]]:
    """The fields of a line where it is wanted, and whether the line is a record at all, as far as it was looked at.

    Ranks: local.
    """
    wants_head, wants_line = build_head_filter(options), build_line_filter(options)
    wants_fields = build_fields_filter(options)

    def select(head: Head, line: bytes) -> tuple[Fields | None, bool]:
        if not wants_head(head) or not wants_line(line):
            return None, True
        fields = head.fields if head.fields is not None else read_fields(line)
        if fields is None:
            return None, False
        return (fields if wants_fields(fields) else None), True

    return select


@functools.lru_cache(maxsize=256)
def level_number(name: str) -> int:
    """The number of a level as it stands in a record; one that nobody knows counts as above all others.

    Ranks: local.
    """
    known = logging.getLevelNamesMapping().get(name)
    if known is not None:
        return known
    match = re.fullmatch(r"Level (\d{1,9})", name, re.ASCII)
    return int(match[1]) if match else _ABOVE_ALL


def _is_of_logger(wanted: str, fields: Fields) -> bool:
    name = str(fields.get("logger", ""))
    return name == wanted or name.startswith(f"{wanted}.")


def _has_text(pattern: re.Pattern[str], fields: Fields) -> bool:
    return any(pattern.search(text_of(fields)) for text_of in (message_of, traceback_of, stack_of))
