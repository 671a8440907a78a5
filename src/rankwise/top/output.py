"""A snapshot as text or JSON, for pipes and programs."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import IO, Any

from rankwise.top.columns import cells, header, sort_rows, widths
from rankwise.top.filters import Keep
from rankwise.top.frame import Line, legend, select, summary
from rankwise.top.rows import Row, Snapshot
from rankwise.top.terminal import Painter, color_system

_PIPE_WIDTH = 120


def as_text(snapshot: Snapshot, rows: Sequence[Row], width: int, sort: str, *, descending: bool) -> Iterator[Line]:
    """The job, and the table of these rows.

    Ranks: local.
    """
    yield from summary(snapshot, width)
    wide = widths(snapshot.rows, width)
    yield header(wide, sort, descending=descending)
    for row in rows:
        yield cells(row, wide)
    if any(row.phases for row in rows):
        yield from legend(width)


def as_object(snapshot: Snapshot, rows: Sequence[Row]) -> dict[str, Any]:
    """The object that --json prints; docs/top.md gives its keys.

    Ranks: local.
    """
    job = {name: getattr(snapshot, name) for name in ("run", "state", "world_size", "num_nodes", "job_id", "step")}
    job |= {name: getattr(snapshot, name) for name in ("num_steps", "steps_per_second", "remaining_seconds", "slowest")}
    # Row by row instead of asdict, which copies each phase of ten thousand ranks one by one.
    told = [vars(row) for row in rows]
    return job | {
        "ranks": told,
        "events": [asdict(event) for event in snapshot.events],
        "trouble": list(snapshot.trouble),
    }


def print_once(
    snapshot: Snapshot, keep: Keep | None, sort: str, *, descending: bool, as_json: bool, out: IO[str]
) -> None:
    """Print it; colours go to a terminal alone.

    Raises:
        OSError: it cannot be written.
    Ranks: local.
    """
    rows = sort_rows(select(snapshot.rows, keep), sort, descending=descending)
    if as_json:
        out.write(json.dumps(_finite(as_object(snapshot, rows)), default=str) + "\n")
    else:
        is_terminal = out.isatty()
        painter = Painter(color_system())
        for line in as_text(snapshot, rows, _width(is_terminal), sort, descending=descending):
            text = painter.paint(line) if is_terminal else "".join(text for text, _ in line)
            out.write(text.rstrip() + "\n")
    out.flush()


def _width(is_terminal: bool) -> int:
    if is_terminal:
        return shutil.get_terminal_size().columns
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdecimal() and 20 <= int(given) <= 10_000 else _PIPE_WIDTH


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def drop_output() -> None:
    """Let the interpreter's own flush at its end find somewhere to write to.

    Ranks: local.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
