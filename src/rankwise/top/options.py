"""What `rankwise top` can be asked for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from rankwise.top.columns import NAMES
from rankwise.top.filters import parse_filter
from rankwise.top.rows import STALE_SECONDS

_EPILOG = f"""columns: {", ".join(NAMES)}; "own" is what a rank has to do itself in a step, without waiting.

examples:
  rankwise top runs/mine                                  live; q ends it, ? tells the keys
  rankwise top runs/mine --sort -own --filter 'node-3'    who on that node has most to do
  rankwise top runs/mine --once --filter 'lag>0'          a table as text: for a mail, a pipe, a script
  rankwise top runs/mine --json | jq '.ranks[] | select(.marks != [])'
Without a terminal it prints the table once. Exit status: 0, 2 there is no such run or an option is not understood."""


@dataclass(frozen=True)
class Options:
    """One call of `rankwise top`."""

    run: str
    once: bool
    as_json: bool
    interval_seconds: float
    sort: str
    descending: bool
    filter: str
    stale_seconds: float


def parse_options(arguments: Sequence[str]) -> Options:
    """The options in `arguments`.

    Raises:
        ValueError: an option cannot be understood; the message is for the user.
        SystemExit: --help was asked for, and printed.
    Ranks: local.
    """
    given = _parser().parse_args(_joined(arguments))
    name = given.sort.removeprefix("-")
    if name not in NAMES:
        raise ValueError(f"{name!r} is no column; there are {', '.join(NAMES)}")
    return Options(
        run=given.run,
        once=given.once,
        as_json=given.json,
        interval_seconds=given.interval,
        sort=name,
        descending=given.sort.startswith("-"),
        filter=given.filter,
        stale_seconds=given.stale,
    )


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--sort -lag` as `--sort=-lag`: argparse takes what begins with a dash for another option."""
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] == "--sort" and argument.removeprefix("-") in NAMES:
            found[-1] = f"--sort={argument}"
        else:
            found.append(argument)
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removesuffix('.')}. See {self.prog} --help.")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.1 to 86400")
    return seconds


def _filter(text: str) -> str:
    try:
        parse_filter(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rankwise top",
        description="Every rank of a run as it is now: step, pace, phases, device, sign of life.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="the run directory")
    parser.add_argument("--once", action="store_true", help="print the table once")
    parser.add_argument("--json", action="store_true", help="print one JSON object, whose keys docs/top.md gives")
    parser.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="SECONDS", help="from one look to the next (default: 1)"
    )
    parser.add_argument(
        "--sort", default="rank", metavar="COLUMN", help="sort by this column; -COLUMN: the largest in front"
    )
    parser.add_argument(
        "--filter", type=_filter, default="", metavar="TERMS", help="these ranks alone: lag>0, host=node-3, rank=0-7"
    )
    parser.add_argument(
        "--stale",
        type=_seconds,
        default=STALE_SECONDS,
        metavar="SECONDS",
        help=f"how old a rank's last line may be (default: {STALE_SECONDS:.0f})",
    )
    return parser
