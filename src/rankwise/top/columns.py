"""The columns of the table: what stands in them, how wide they are, what they are sorted by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.telemetry import OTHER, PHASES
from rankwise.top.rows import Row

LETTERS = dict(zip(PHASES, "DFBOCKV", strict=True)) | {OTHER: "."}
"""By phase its letter in the bars; every other phase is `UNKNOWN`."""
UNKNOWN = "+"
STYLES = {
    # The colours of Okabe and Ito, which people with any colour vision tell apart; the report has the same.
    "D": "black on #E69F00",
    "F": "black on #56B4E9",
    "B": "white on #0072B2",
    "O": "black on #009E73",
    "C": "black on #CC79A7",
    "K": "black on #F0E442",
    "V": "white on #D55E00",
    ".": "dim",
    UNKNOWN: "reverse",
}
MARK_STYLES = {"hang": "bold white on red", "stale": "red", "straggler": "bold yellow", "throttled": "magenta"}
MARK_STYLES |= {"hot": "magenta", "ended": "dim"}

Piece = tuple[str, str]
"""Text and its style, which may be empty."""
_MIN_BAR, _MAX_BAR = 8, 40


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: for --sort and the filter.
        value: what rows are sorted by; those that have None come last.
        text: what stands there.
        is_left: whether it stands at the left edge.
    """

    name: str
    header: str
    value: Callable[[Row], Any]
    text: Callable[[Row], str]
    is_left: bool = False


def _plain(value: Any, form: str = "") -> str:
    return "-" if value is None else format(value, form)


def _utilisation(row: Row) -> str:
    # Without an accelerator the process's own share of the CPU is what there is.
    if row.utilisation_percent is None and row.cpu_percent is not None:
        return f"c{row.cpu_percent:.0f}%"
    return "-" if row.utilisation_percent is None else f"{row.utilisation_percent:.0f}%"


def _memory(row: Row) -> str:
    if row.memory_used_gib is None:
        return "-" if row.rss_gib is None else f"r{row.rss_gib:.1f}"
    return f"{row.memory_used_gib:.0f}" + ("" if row.memory_total_gib is None else f"/{row.memory_total_gib:.0f}")


def _pace(row: Row) -> str:
    pace = row.steps_per_second
    if pace is None:
        return "-"
    return (
        f"{pace:.0f}"
        if pace >= 1000
        else f"{pace:.1f}"
        if pace >= 100
        else f"{pace:.2f}"
        if pace >= 0.1
        else f"{pace:.4f}"
    )


def duration(seconds: float | None) -> str:
    """Seconds in four characters: 0.4s, 12s, 3m05, 14m, 2h10, 26h, 5d.

    Ranks: local.
    """
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f}s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole}s"
    minutes = whole // 60
    if minutes < 100:
        return f"{minutes}m{whole % 60:02d}" if minutes < 10 else f"{minutes}m"
    hours = minutes // 60
    if hours < 100:
        return f"{hours}h{minutes % 60:02d}" if hours < 10 else f"{hours}h"
    return f"{min(hours // 24, 999)}d"


def note(row: Row) -> str:
    """The worst that is to be said of the rank.

    Ranks: local.
    """
    return row.marks[0] if row.marks else ""


def _memory_share(row: Row) -> float | None:
    return row.rss_gib if row.memory_used_gib is None else row.memory_used_gib


def _busy(row: Row) -> float | None:
    return row.cpu_percent if row.utilisation_percent is None else row.utilisation_percent


def _num_marks(row: Row) -> float | None:
    worst = ("hang", "stale", "straggler", "throttled", "hot")
    return next((float(index) for index, mark in enumerate(worst) if mark in row.marks), None)


COLUMNS = (
    Column("rank", "rank", lambda row: row.rank, lambda row: str(row.rank)),
    Column("host", "host", lambda row: row.host, lambda row: row.host or "-", is_left=True),
    Column("device", "device", lambda row: row.device, lambda row: row.device or "-", is_left=True),
    Column("step", "step", lambda row: row.step, lambda row: _plain(row.step)),
    Column("pace", "it/s", lambda row: row.steps_per_second, _pace),
    Column("own", "phases", lambda row: row.own_seconds, lambda row: "", is_left=True),
    Column("util", "util", _busy, _utilisation),
    Column("mem", "GiB", _memory_share, _memory),
    Column("temp", "C", lambda row: row.temperature_celsius, lambda row: _plain(row.temperature_celsius, ".0f")),
    Column("age", "age", lambda row: row.age_seconds, lambda row: duration(row.age_seconds)),
    Column("lag", "lag", lambda row: row.lag_steps, lambda row: _plain(row.lag_steps)),
    Column("note", "note", _num_marks, note, is_left=True),
)
"""As they stand from left to right. The bars are sorted by what a rank has to do itself."""
NAMES = tuple(column.name for column in COLUMNS)
_BARS, _HOST = NAMES.index("own"), NAMES.index("host")
_FIXED = {"util": 4, "mem": 5, "temp": 3, "age": 4, "note": 9, "pace": 5, "lag": 3}
# When the terminal is narrow: which columns are left out, the first first.
_EXPENDABLE = ("temp", "device", "mem", "note", "util", "pace")
_MIN_HOST = 6


def sort_rows(rows: Sequence[Row], name: str, *, descending: bool) -> list[Row]:
    """The rows by a column, equal ones by rank; those that have no value there come last.

    Ranks: local.
    """
    value = COLUMNS[NAMES.index(name)].value
    ordered = sorted(rows, key=lambda row: row.rank)
    known = [row for row in ordered if value(row) is not None]
    known.sort(key=value, reverse=descending)
    return known + [row for row in ordered if value(row) is None]


def widths(rows: Sequence[Row], total: int) -> dict[str, int]:
    """How wide each column is, so that all of them fit into `total` characters; those without room are left out.

    Ranks: local.
    """
    wanted = {column.name: len(column.header) for column in COLUMNS}
    for name, least in _FIXED.items():
        wanted[name] = max(wanted[name], least)
    for name in ("rank", "step", "lag"):
        value = COLUMNS[NAMES.index(name)].value
        most = max((value(row) or 0 for row in rows), default=0)
        wanted[name] = max(wanted[name], len(str(most)))
    for name in ("host", "device"):
        texts = {row.host if name == "host" else row.device for row in rows}
        wanted[name] = max([wanted[name], *(len(text) for text in texts if text)])
    if any(row.utilisation_percent is None and row.cpu_percent for row in rows):
        wanted["util"] += 1
    wanted["own"] = _MIN_BAR
    full_host = wanted["host"]
    wanted["host"] = min(full_host, _MIN_HOST)
    for name in _EXPENDABLE:
        if _sum(wanted) <= total:
            break
        del wanted[name]
    spare = max(total - _sum(wanted), 0)
    longer_host = min(full_host - wanted["host"], spare)
    wanted["host"] += longer_host
    wanted["own"] += min(spare - longer_host, _MAX_BAR - _MIN_BAR)
    return wanted


def _sum(wanted: Mapping[str, int]) -> int:
    return sum(wanted.values()) + len(wanted) - 1


def header(wide: Mapping[str, int], sorted_by: str, *, descending: bool) -> list[Piece]:
    """The line above the rows.

    Ranks: local.
    """
    pieces: list[Piece] = []
    for column in COLUMNS:
        if column.name in wide:
            title = column.header
            is_chosen = column.name == sorted_by
            if is_chosen and len(title) < wide[column.name]:
                title = title + ("v" if descending else "^")
            text = _fit(title, wide[column.name], is_left=column.is_left)
            pieces += [(text, "bold underline" if is_chosen else "bold"), (" ", "")]
    return pieces[:-1]


def cells(row: Row, wide: Mapping[str, int]) -> list[Piece]:
    """The line of one rank.

    Ranks: local.
    """
    base = MARK_STYLES.get(row.marks[0], "") if row.marks else ""
    pieces: list[Piece] = []
    for column in COLUMNS:
        if column.name not in wide:
            continue
        width = wide[column.name]
        if column.name == "own":
            pieces += bar(row, width)
        else:
            text = column.text(row)
            style = base if column.name in ("rank", "note") else _cell_style(column.name, row)
            # Of a long name the end tells more: node numbers stand there.
            cut = text if len(text) <= width else "~" + text[-width + 1 :] if column.name == "host" else text[:width]
            pieces.append((_fit(cut, width, is_left=column.is_left), style))
        pieces.append((" ", ""))
    return pieces[:-1]


def _cell_style(name: str, row: Row) -> str:
    if name == "age" and "stale" in row.marks:
        return MARK_STYLES["stale"]
    if name == "temp" and "hot" in row.marks:
        return MARK_STYLES["hot"]
    # Ranks do not write at the same moment: a second's steps behind, and one, are nothing.
    if name == "lag" and row.lag_steps and row.lag_steps > 2 + 2 * (row.steps_per_second or 0):
        return "yellow"
    return "dim" if "ended" in row.marks else ""


def bar(row: Row, width: int) -> list[Piece]:
    """The recent steps as a bar of letters, or, of a rank that does not get on, where it is.

    Ranks: local.
    """
    if row.is_stuck or not row.phases:
        said = f"{row.phase or 'between'} {duration(row.phase_seconds)}" if row.phase_seconds is not None else ""
        return [(_fit(said[:width], width, is_left=True), "bold" if row.is_stuck else "dim")]
    order = {name: index for index, name in enumerate(PHASES)}
    shares: dict[str, float] = {}
    for name in sorted(row.phases, key=lambda name: order.get(name, len(order) + (name == OTHER))):
        letter = LETTERS.get(name, UNKNOWN)
        shares[letter] = shares.get(letter, 0.0) + max(row.phases[name], 0.0)
    pieces = [(letter * count, STYLES[letter]) for letter, count in _parts(shares, width).items() if count]
    return pieces or [(" " * width, "")]


def _parts(shares: Mapping[str, float], width: int) -> dict[str, int]:
    """Whole characters for shares, which fill the width: the largest remainders are rounded up."""
    total = sum(shares.values())
    if total <= 0:
        return {}
    exact = {letter: share / total * width for letter, share in shares.items()}
    counts = {letter: int(value) for letter, value in exact.items()}
    for letter in sorted(exact, key=lambda letter: counts[letter] - exact[letter])[: width - sum(counts.values())]:
        counts[letter] += 1
    return counts


def _fit(text: str, width: int, *, is_left: bool) -> str:
    clean = text if text.isprintable() and text.isascii() else "".join(c if c.isprintable() else "?" for c in text)
    return clean[:width].ljust(width) if is_left else clean[:width].rjust(width)
