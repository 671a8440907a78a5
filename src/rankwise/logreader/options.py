"""What `rankwise logs` can be asked for, and how it is written on a command line."""

from __future__ import annotations

import argparse
import functools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NoReturn

from rankwise.logreader.records import time_key

Ranges = tuple[tuple[int, int | None], ...]
"""Whole numbers as ranges, both ends included; None has no end."""

_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", re.ASCII)
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_TAIL = 10**9

_EPILOG = """examples:
  rankwise logs runs/mine --level warning                  what went wrong, equal lines of many ranks as one
  rankwise logs runs/mine --rank 0,8-15 --steps 1200:1300  what these ranks did there
  rankwise logs runs/mine --since 10m --text 'loss.*nan'   a regular expression, in messages and tracebacks
  rankwise logs runs/mine --follow --tail 20               as tail -f; Ctrl-C ends it
  rankwise logs runs/mine --json | jq .message             the records themselves
Times are UTC. Exit status: 0 also where nothing matches, 1 a file could not be read, 2 there are no logs."""


@dataclass(frozen=True)
class Options:
    """One call of `rankwise logs`."""

    run: str
    ranks: Ranges | None
    level: int
    logger: str | None
    text: re.Pattern[str] | None
    steps: Ranges | None
    since: bytes | None
    until: bytes | None
    """Both are times as `records.time_key` writes them, which compare as times do."""
    follow: bool
    as_json: bool
    fold: bool
    tail: int | None


def parse_options(arguments: Sequence[str], now: datetime) -> Options:
    """The options in `arguments`; "10m" is ten minutes before `now`.

    Raises:
        ValueError: an option cannot be understood; the message is for the user.
        SystemExit: --help was asked for, and printed.
    Ranks: local.
    """
    given = _parser(now).parse_args(list(arguments))
    return Options(
        run=given.run,
        ranks=given.rank,
        level=given.level,
        logger=given.logger,
        text=given.text,
        steps=given.steps,
        since=given.since,
        until=given.until,
        follow=given.follow,
        as_json=given.json,
        fold=not given.json if given.fold is None else given.fold,
        tail=given.tail,
    )


def parse_ranges(text: str) -> Ranges:
    """Ranks as in "0,3-7", "0-3, 7" or "8-", which has no end.

    Raises:
        ValueError: it is something else.
    Ranks: local.
    """
    ranges: list[tuple[int, int | None]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:(-)\s*(\d{1,18})?\s*)?", part, re.ASCII)
        if match is None:
            raise ValueError(f"{text!r} is no list of ranks such as 0,3-7 or 8-")
        first, dash, last = match.groups()
        end = int(last or first) if last or not dash else None
        if end is not None and end < int(first):
            raise ValueError(f"{part.strip()!r} ends before it begins; ranks are written as 3-7")
        ranges.append((int(first), end))
    return tuple(ranges)


def parse_steps(text: str) -> Ranges:
    """Steps as in "100:200" (both included), "100:", ":200" or "100".

    Raises:
        ValueError: it is something else.
    Ranks: local.
    """
    match = re.fullmatch(r"(\d{0,18})(?:(:)(\d{0,18}))?", text, re.ASCII)
    if match is None or text in ("", ":"):
        raise ValueError(f"{text!r} is no range of steps such as 100:200, 100:, :200 or 100")
    first, colon, last = match.groups()
    low = int(first or 0)
    high = int(last) if last else (None if colon else low)
    if high is not None and high < low:
        raise ValueError(f"{text!r} ends before it begins; steps are written as 100:200")
    return ((low, high),)


def is_within(number: int, ranges: Ranges) -> bool:
    """Whether one of the ranges has the number.

    Ranks: local.
    """
    return any(low <= number and (high is None or number <= high) for low, high in ranges)


def parse_time(text: str, now: datetime) -> bytes:
    """A time as `records.time_key` writes it: ISO 8601, UTC where it names no zone, or so long ago: "90s", "2h".

    Raises:
        ValueError: it is neither.
    Ranks: local.
    """
    duration = _DURATION.fullmatch(text)
    try:
        if duration is not None:
            return time_key(now - timedelta(seconds=float(duration[1]) * _UNIT_SECONDS[duration[2]]))
        moment = datetime.fromisoformat(text)
        return time_key(moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text!r} is no time such as 2026-05-01T12:30:00 (UTC), or 90s, 10m, 2h, 1d ago") from error


def parse_level(text: str) -> int:
    """The number of a level of `logging`, given by its name in any case or by a number.

    Raises:
        ValueError: there is no such level.
    Ranks: local.
    """
    levels = logging.getLevelNamesMapping()
    if text.upper() in levels:
        return levels[text.upper()]
    if re.fullmatch(r"\d{1,3}", text, re.ASCII):
        return int(text)
    raise ValueError(f"{text!r} is no level; there are debug, info, warning, error and critical")


def _parse_text(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{text!r} is no regular expression ({error}). Write a backslash before a character that means itself."
        ) from error


def _parse_tail(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise ValueError(f"{text!r} is no number of lines")
    return min(int(text), _MAX_TAIL)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removesuffix('.')}. See {self.prog} --help.")


class _Checked:
    """Lets argparse print the message of a ValueError; by itself it prints the name of the function alone."""

    def __init__(self, parse: Callable[[str], object]) -> None:
        self._parse = parse

    def __call__(self, text: str) -> object:
        try:
            return self._parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error


def _parser(now: datetime) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rankwise logs",
        description="The log records of all ranks of a run, by time, equal lines of many ranks as one.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    moment = _Checked(functools.partial(parse_time, now=now))
    parser.add_argument("run", metavar="RUN", help="the run directory")
    parser.add_argument(
        "--rank", type=_Checked(parse_ranges), metavar="RANKS", help="of these ranks alone: 0,3-7 or 8-"
    )
    parser.add_argument(
        "--level", type=_Checked(parse_level), default=0, metavar="LEVEL", help="at least this level: warning"
    )
    parser.add_argument("--logger", metavar="NAME", help="of this logger and those below it")
    parser.add_argument("--text", type=_Checked(_parse_text), metavar="REGEX", help="that have this in their text")
    parser.add_argument("--steps", type=_Checked(parse_steps), metavar="A:B", help="made in these steps, both included")
    parser.add_argument("--since", type=moment, metavar="TIME", help="not before this time: 2026-05-01T12:30, or 10m")
    parser.add_argument("--until", type=moment, metavar="TIME", help="not after this time")
    parser.add_argument("--tail", type=_Checked(_parse_tail), metavar="N", help="the last N lines alone")
    parser.add_argument("--follow", action="store_true", help="go on with what is written from now on, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, as it stands in the file")
    parser.add_argument(
        "--fold",
        action=argparse.BooleanOptionalAction,
        help="equal lines of many ranks as one, numbers aside (default: yes, but not with --json)",
    )
    return parser
