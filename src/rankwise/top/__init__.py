"""`rankwise top`: every rank of a run as it is now, in a live table.

    rankwise top RUN          rankwise top RUN --once          rankwise top RUN --json

It only reads the run directory, whose layout docs/design/run-directory.md gives, and needs no torch. The table is drawn
with rich and the standard library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rankwise.errors import RankwiseError
from rankwise.runreader import Tail
from rankwise.top.filters import parse_filter
from rankwise.top.options import Options, parse_options
from rankwise.top.rows import Snapshot, make_snapshot


def main(arguments: Sequence[str]) -> int:
    """Show the ranks.

    Returns:
        The exit status: 0, also where Ctrl-C ends the live table; 1 where the output cannot be written; 2 where there
        is no such run or an option is not understood.
    Ranks: local, in no job.
    """
    try:
        options = parse_options(arguments)
        tail = Tail(options.run)
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except (ValueError, RankwiseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def look() -> Snapshot:
        return make_snapshot(options.run, tail.look(), stale_seconds=options.stale_seconds)

    try:
        if options.once or options.as_json or not _has_terminal():
            return _print_once(look(), options)
        from rankwise.top.frame import View
        from rankwise.top.live import run

        run(
            look,
            View(options.sort, descending=options.descending, filter_text=options.filter),
            options.interval_seconds,
        )
    except RankwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130 if options.once or options.as_json else 0
    return 0


def _has_terminal() -> bool:
    """Whether there are keys to be had, and a screen to draw on."""
    streams = (sys.stdin, sys.stdout)
    return all(stream is not None and stream.isatty() for stream in streams) and os.environ.get("TERM") != "dumb"


def _print_once(snapshot: Snapshot, options: Options) -> int:
    from rankwise.top.output import drop_output, print_once

    if sys.stdout is None:  # the process was started with stdout closed
        print("error: the output cannot be written: stdout is closed", file=sys.stderr)
        return 1
    keep = parse_filter(options.filter, {name for row in snapshot.rows for name in row.phases})
    try:
        print_once(snapshot, keep, options.sort, descending=options.descending, as_json=options.as_json, out=sys.stdout)
    except BrokenPipeError:  # `| head` has seen enough
        drop_output()
    except OSError as error:
        drop_output()
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return 0
