"""`rankwise logs`: the records of all ranks of a run, merged by time, equal ones of many ranks as one line.

    rankwise logs RUN --level warning          rankwise logs RUN --follow

It only reads RUN/logs, whose layout docs/design/run-directory.md gives, and needs no torch.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rankwise.logreader.filters import build_filter
from rankwise.logreader.folding import Group
from rankwise.logreader.follow import follow_groups, read_groups
from rankwise.logreader.merge import Streams
from rankwise.logreader.options import Options, parse_options
from rankwise.logreader.render import Renderer, painter, render_json
from rankwise.logreader.streams import Tally, find_streams
from rankwise.logs.fold import ranks_as_text

_FOLLOW_TAIL = 10
_MAX_NAMED = 6
_STDOUT = 1


def main(arguments: Sequence[str]) -> int:
    """Print the records.

    Returns:
        The exit status: 0, also where nothing matches and where Ctrl-C ends --follow; 1 where a file could not be
        read, or the output not be written; 2 where there are no logs or an option is not understood; 130 where
        Ctrl-C cuts it short.
    Ranks: local, in no job.
    """
    try:
        options = parse_options(arguments, datetime.now(UTC))
        folder = _logs_folder(options)
        streams = Streams(folder, options.ranks, build_filter(options))
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        _print_all(streams, options)
    except KeyboardInterrupt:
        if not options.follow:
            _drop_output()  # what waits for a slow reader would keep it from ending
            return 130
    except BrokenPipeError:  # `| head` has seen enough
        _drop_output()
        return 0
    except OSError as error:
        _drop_output()
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    finally:
        streams.close()
    return _report(streams, options)


def _logs_folder(options: Options) -> Path:
    run = Path(options.run)
    for folder in (run / "logs", run):
        if folder.is_dir() and find_streams(os.listdir(folder)):
            return folder
    if not run.is_dir():
        raise ValueError(f"there is no folder {options.run!r}. Give the run directory, the one that has logs/ in it.")
    if options.follow:
        print(f"rankwise logs: nothing in {run / 'logs'} yet; waiting", file=sys.stderr)
        return run / "logs"
    raise ValueError(
        f"no logs in {options.run!r}: neither logs/ nor the folder itself has a file such as rank-00000.jsonl. "
        "Give the run directory, the one that rankwise.init got; --follow waits for the first record."
    )


def _print_all(streams: Streams, options: Options) -> None:
    if sys.stdout is None:  # the process was started with stdout closed
        raise OSError(errno.EBADF, "stdout is closed")
    # Not sys.stdout.buffer: with PYTHONUNBUFFERED that is the bare file, whose writes may be short.
    out = io.BufferedWriter(io.FileIO(_STDOUT, "w", closefd=False))
    is_live = sys.stdout.isatty()
    renderer = Renderer(streams.known_ranks, painter(sys.stdout))

    def write(group: Group) -> None:
        text = render_json(group, is_folded=options.fold) if options.as_json else renderer.render(group)
        # A message may hold half a character: another's log must not end this one.
        out.write(text.encode("utf-8", "backslashreplace"))
        if is_live:
            out.flush()

    tail = _FOLLOW_TAIL if options.follow and options.tail is None else options.tail
    for group in read_groups(streams, is_folded=options.fold, tail=tail, is_final=not options.follow):
        write(group)
    out.flush()
    if options.follow:
        for found in follow_groups(streams, is_folded=options.fold):
            if found is None:
                out.flush()
            else:
                write(found)
        out.flush()


def _report(streams: Streams, options: Options) -> int:
    """Say on stderr what could not be shown; gives the exit status."""
    if not len(streams) and streams.known_ranks:
        print(f"rankwise logs: none of these ranks; there are {ranks_as_text(streams.known_ranks)}", file=sys.stderr)
    for line in describe(streams.tally):
        print(f"rankwise logs: {line}", file=sys.stderr)
    return 1 if streams.tally.unreadable else 0


def describe(tally: Tally) -> list[str]:
    """What could not be shown, in lines for people; none where all was.

    Ranks: local.
    """
    lines = [f"cannot read {name}: {why}" for name, why in list(tally.unreadable.items())[:_MAX_NAMED]]
    if len(tally.unreadable) > _MAX_NAMED:
        lines.append(f"cannot read {len(tally.unreadable) - _MAX_NAMED} more files")
    if tally.num_foreign:
        total = sum(tally.num_foreign.values())
        named = [f"{name} ({count})" for name, count in list(tally.num_foreign.items())[:_MAX_NAMED]]
        if len(tally.num_foreign) > _MAX_NAMED:
            named.append(f"and {len(tally.num_foreign) - _MAX_NAMED} more files")
        said = "1 line is no whole log record" if total == 1 else f"{total} lines are no whole log records"
        lines.append(f"{said}: {', '.join(named)}")
    return lines


def _drop_output() -> None:
    """Let the interpreter's own flush at its end find somewhere to write to."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != _STDOUT:  # it is where stdout was closed
        os.dup2(nowhere, _STDOUT)
        os.close(nowhere)
