"""The checks as people and programs read them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rankwise.doctor.fold import show_bytes
from rankwise.doctor.verdict import Check

MAX_TABLE_ROWS = 64
"""Devices that are shown one by one; --json has all of them."""

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}
_DEVICE_COLUMNS = ("rank", "host", "local rank", "device", "name", "memory", "uuid")


def as_json(checks: Sequence[Check], num_ranks: int) -> str:
    """One line: an object with `ranks`, `checks` and `ok`.

    Ranks: local.
    """
    return json.dumps({"ranks": num_ranks, "checks": [check.as_json() for check in checks], "ok": is_ok(checks)})


def is_ok(checks: Sequence[Check]) -> bool:
    """Whether no check failed.

    Ranks: local.
    """
    return all(check.status != "fail" for check in checks)


def as_lines(checks: Sequence[Check]) -> str:
    """Aligned lines for a pipe or a file, one check a line, with what to do below it.

    Ranks: local.
    """
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status}  {check.name:<{width}}  {_printable(check.message)}")
        if check.advice:
            lines.append(f"{'':<{width + 8}}-> {_printable(check.advice)}")
    devices = _device_cells(checks)
    if devices:
        widths = [max(len(cells[column]) for cells in devices) for column in range(len(_DEVICE_COLUMNS))]
        rows = ("  ".join(f"{cell:<{n}}" for cell, n in zip(cells, widths, strict=True)).rstrip() for cells in devices)
        lines += ["", *rows]
    return "\n".join([*lines, "", _summary(checks)])


def as_table(checks: Sequence[Check], width: int | None = None) -> str:
    """The same as tables, coloured, for a terminal.

    Args:
        width: columns of the terminal, None to ask it.
    Ranks: local.
    """
    table = Table(box=box.ASCII2)
    for heading in ("", "check", "found"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "found")
    for check in checks:
        found = Text(_printable(check.message))
        if check.advice:
            found.append(f"\n-> {_printable(check.advice)}", style="bold")
        table.add_row(Text(check.status, _STYLES[check.status]), Text(check.name), found)
    parts: list[Table | Text] = [table]
    if devices := _device_cells(checks):
        second = Table(*_DEVICE_COLUMNS, box=box.ASCII2)
        for device in devices[1:]:
            second.add_row(*(Text(cell) for cell in device))
        parts.append(second)
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    with console.capture() as captured:
        console.print(Group(*parts, Text(_summary(checks))))
    return captured.get().rstrip("\n")


def _device_cells(checks: Sequence[Check]) -> list[tuple[str, ...]]:
    """The device table with its headings; empty where no rank has an accelerator."""
    rows = next((check.rows for check in checks if check.name == "devices" and check.rows), [])
    if not rows:
        return []
    cells = [_DEVICE_COLUMNS, *(_cells(row) for row in rows[:MAX_TABLE_ROWS])]
    if len(rows) > MAX_TABLE_ROWS:
        cells.append(("...", f"{len(rows) - MAX_TABLE_ROWS} more", *[""] * (len(_DEVICE_COLUMNS) - 2)))
    return cells


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    shown = [str(row[name]) for name in ("rank", "host", "local_rank", "device", "name")]
    memory = show_bytes(row["memory_bytes"]) if row["memory_bytes"] else ""
    return (*(_printable(cell) for cell in shown), memory, row["uuid"] or "")


def _summary(checks: Sequence[Check]) -> str:
    num_fails, num_warnings = (sum(check.status == status for check in checks) for status in ("fail", "warn"))
    if not num_fails and not num_warnings:
        return f"all {len(checks)} checks pass"
    return f"{num_fails} failed, {num_warnings} with a warning, of {len(checks)} checks"


def _printable(text: str) -> str:
    """One line without control characters: host names and messages of drivers come from outside."""
    joined = " ".join(text.split())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in joined)
