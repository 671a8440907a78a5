"""What the commands print: text without control characters, tables that align, sizes for people."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import TextIO

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def say(text: str) -> None:
    """Print lines on stdout.

    Ranks: local.
    """
    _print(text, sys.stdout)


def tell(text: str) -> None:
    """Print lines on stderr.

    Ranks: local.
    """
    _print(text, sys.stderr)


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Aligned lines; the first row is the heading.

    Args:
        right: numbers of columns that are aligned at their right end.
    Ranks: local.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def say_table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print the same on stdout: on a terminal with a bold heading, else plain.

    Ranks: local.
    """
    heading, *lines = columns(rows, right)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        from rich.style import Style

        print(Style(bold=True).render(_safe(heading, sys.stdout)))
    else:
        say(heading)
    for line in lines:
        say(line)


def show_bytes(num_bytes: int) -> str:
    """A size in the unit that suits it.

    Ranks: local.
    """
    size, unit = float(num_bytes), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{num_bytes} bytes" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def show_seconds(seconds: float) -> str:
    """A length of time in the unit that suits it.

    Ranks: local.
    """
    for limit, unit in ((86400 * 2, "days"), (3600 * 2, "hours"), (120, "minutes")):
        if seconds >= limit:
            return f"{seconds / (limit / 2):.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def drop_output() -> None:
    """Let the interpreter's own flush at its end find somewhere to write to.

    Ranks: local.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _print(text: str, stream: TextIO) -> None:
    print(_safe(text, stream), file=stream, flush=True)


def _safe(text: str, stream: TextIO) -> str:
    # Names of files need not be text, and what stands in a file may be made to steer a terminal.
    encoding = stream.encoding or "ascii"
    return _CONTROL.sub("?", text).encode(encoding, "backslashreplace").decode(encoding)
