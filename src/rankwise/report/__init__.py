"""`rankwise report`: a run as one HTML file, which needs no network and no server.

    rankwise report RUN          rankwise report RUN -o report.html

It reads the run directory alone, also of a run that goes on, and needs no torch; docs/report.md tells what it shows.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from rankwise.errors import RankwiseError
from rankwise.files import write_atomic
from rankwise.report.content import build_content
from rankwise.report.loading import load_ranks
from rankwise.report.logsummary import shortened, summarise_logs
from rankwise.report.page import MARK, build_page
from rankwise.runreader import read_run

_EPILOG = """examples:
  rankwise report runs/mine                     writes runs/mine/report.html
  rankwise report runs/mine -o mine.html        elsewhere; -o - writes to stdout
The file can be opened from a disk, mailed, or put on any server: it loads nothing.
Exit status: 0 written, 1 the file could not be written, 2 there is no run to report on."""

_FIRST_BYTES = 4096


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removesuffix('.')}. See {self.prog} --help.")


def main(arguments: Sequence[str]) -> int:
    """Write the report.

    Returns:
        The exit status: 0 written; 1 the file cannot be written; 2 there is no run, an option is not understood, or
        the file named is no report; 130 where Ctrl-C cuts it short.
    Ranks: local, in no job.
    """
    try:
        given = _parser().parse_args(list(arguments))
        target = None if given.output == "-" else Path(given.output or Path(given.run) / "report.html")
        if target is not None:
            require_replaceable(target, is_forced=given.force)
        page = make_report(given.run)
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    except (RankwiseError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if target is None:
            _print(page)
        else:
            write_atomic(target, page)
            # A name may have bytes that are no text.
            print(f"{shortened(str(target), 4096)} ({len(page.encode()) / 2**20:.1f} MiB)")
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"error: {target or 'stdout'} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def make_report(run_dir: str | os.PathLike[str], now: datetime | None = None) -> str:
    """The report on a run as the text of an HTML file.

    Raises:
        RankwiseError: there is no run directory, or it cannot be read.
    Ranks: local.
    """
    data = load_ranks(read_run(run_dir))
    content = build_content(data, summarise_logs(Path(run_dir)))
    name = Path(run_dir).resolve().name or str(run_dir)
    return build_page(shortened(name, 200), content, now or datetime.now(UTC))


def require_replaceable(target: Path, *, is_forced: bool) -> None:
    """Nothing but a report is overwritten, unless that is wanted.

    Raises:
        ValueError: another file has the name.
    Ranks: local.
    """
    if target.is_dir():
        raise ValueError(f"{str(target)!r} is a folder. Give -o the name of a file.")
    if is_forced or not target.exists():
        return
    try:
        with open(target, "rb") as file:
            is_report = MARK.encode() in file.read(_FIRST_BYTES)
    except OSError as error:
        raise ValueError(f"{str(target)!r} cannot be read: {error.strerror}. Give -o another name.") from error
    if not is_report:
        raise ValueError(f"{str(target)!r} is there and is no report. Give -o another name, or --force to replace it.")


def _print(page: str) -> None:
    if sys.stdout is None:
        raise OSError("stdout is closed")
    sys.stdout.buffer.write(page.encode())
    sys.stdout.buffer.flush()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rankwise report",
        description="Write a run as one HTML file: steps, phases, devices, losses, events, logs of every rank.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="the run directory")
    parser.add_argument("-o", "--output", metavar="FILE", help="the file (default: RUN/report.html); - is stdout")
    parser.add_argument("--force", action="store_true", help="replace a file that is no report")
    return parser
