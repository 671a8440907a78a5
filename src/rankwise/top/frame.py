"""One screen: a snapshot as lines, by what the person at the keyboard has chosen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime

from rankwise.logs.fold import ranks_as_text
from rankwise.telemetry import OTHER, PHASES
from rankwise.top.columns import LETTERS, NAMES, STYLES, UNKNOWN, Piece, cells, duration, header, sort_rows, widths
from rankwise.top.filters import Keep, parse_filter
from rankwise.top.rows import Row, Snapshot

Line = list[Piece]
HELP = (
    "up down pgup pgdn home end   scroll (j and k as well)",
    "left right, or < >           sort by another column; 1-9: by that column",
    "r                            sort the other way round",
    "/                            filter: Enter applies it, Esc takes it away.",
    "    lag>0  age>=5  util<50   by a column          data>20   a phase's percent",
    "    host=node-3 phase=back   a part of a name     rank=0-7,12   ranks",
    "    note=stale  note!=ended  what is said of it   cuda:3   a word of it",
    "m                            only ranks of which something is to be said",
    "p                            hold the picture still",
    "q                            quit",
    "",
    "phases: the recent steps as a bar; a rank that does not get on shows where",
    "it is. lag: steps behind the foremost; a second's worth is nothing.",
    "",
)
_NUM_EVENTS = 2
_EVENT_STYLES = {"hang": "bold red", "straggler": "yellow", "device": "magenta"}


class View:
    """What is chosen: the order, the filter, how far it is scrolled. Keys change it.

    Attributes:
        is_done: whether the person wants to leave.
    """

    def __init__(self, sort: str = "rank", *, descending: bool = False, filter_text: str = "") -> None:
        self.is_done = False
        self._sort, self._descending = sort, descending
        self._filter_text = filter_text
        self._keep: Keep | None = parse_filter(filter_text)
        self._prompt: str | None = None
        self._error = ""
        self._only_marked = False
        self._shows_help = False
        self._offset = 0
        self._held: Snapshot | None = None
        self._newest: Snapshot | None = None
        self._ordered: tuple[Snapshot, tuple[object, ...], list[Row]] | None = None
        self._known_above: tuple[Snapshot, int, list[Line], dict[str, int]] | None = None
        self._page = 1

    def show(self, snapshot: Snapshot) -> None:
        """Take the newest snapshot."""
        self._newest = snapshot

    def press(self, key: str) -> None:
        """Do what a key means: a character, or a name such as `up`, `enter`, `escape`."""
        if self._prompt is not None:
            self._type(key)
            return
        self._error = ""
        if self._shows_help:
            self._shows_help = False
            self.is_done = key == "q"
            return
        rows = len(self._rows())
        moves = {
            "up": -1,
            "k": -1,
            "down": 1,
            "j": 1,
            "pgup": -self._page,
            "pgdn": self._page,
            " ": self._page,
            "home": -rows,
            "g": -rows,
            "end": rows,
            "G": rows,
        }
        if key in moves:
            self._offset += moves[key]
        elif key in ("left", "<", "right", ">"):
            self._choose((NAMES.index(self._sort) + (1 if key in ("right", ">") else -1)) % len(NAMES))
        elif key in "123456789" and len(key) == 1:
            self._choose(int(key) - 1)
        else:
            self._command(key)

    def frame(self, width: int, height: int) -> list[Line]:
        """The screen, of exactly `height` lines, none of which is wider than it."""
        snapshot = self._held or self._newest
        if snapshot is None:
            return _filled([[("reading ...", "dim")]], width, height)
        if self._shows_help:
            return _filled([[(line, "")] for line in HELP] + legend(width), width, height)
        head, wide = self._above(snapshot, width)
        rows = self._rows()
        self._page = max(height - len(head) - 2, 1)
        self._offset = max(0, min(self._offset, len(rows) - self._page))
        body = [header(wide, self._sort, descending=self._descending)]
        body += [cells(row, wide) for row in rows[self._offset : self._offset + self._page]]
        if snapshot.rows and not rows:
            body.append([("no rank is like that: / changes the filter, Esc takes it away", "dim")])
        lines = _filled([*head, *body], width, height - 1)
        return [*lines, _cut(self._footer(snapshot, len(rows)), width)]

    def _rows(self) -> list[Row]:
        snapshot = self._held or self._newest
        if snapshot is None:
            return []
        # Scrolling sorts nothing anew.
        wish = (self._sort, self._descending, self._filter_text, self._only_marked)
        known = self._ordered
        if known is None or known[0] is not snapshot or known[1] != wish:
            rows = select(snapshot.rows, self._keep, only_marked=self._only_marked)
            known = (snapshot, wish, sort_rows(rows, self._sort, descending=self._descending))
            self._ordered = known
        return known[2]

    def _above(self, snapshot: Snapshot, width: int) -> tuple[list[Line], dict[str, int]]:
        """What is above the table and how wide its columns are: of ten thousand rows, not worked out for each key."""
        known = self._known_above
        if known is None or known[0] is not snapshot or known[1] != width:
            known = (snapshot, width, summary(snapshot, width), widths(snapshot.rows, width))
            self._known_above = known
        return known[2], known[3]

    def _choose(self, number: int) -> None:
        self._sort = NAMES[number]
        # Whoever sorts by a number looks for the most of it, but for the places.
        self._descending = self._sort not in ("rank", "host", "device", "note")
        self._offset = 0

    def _command(self, key: str) -> None:
        if key == "q":
            self.is_done = True
        elif key == "r":
            self._descending = not self._descending
        elif key == "m":
            self._only_marked = not self._only_marked
            self._offset = 0
        elif key == "p":
            self._held = self._newest if self._held is None else None
        elif key in ("?", "h"):
            self._shows_help = True
        elif key == "/":
            self._prompt = self._filter_text
        elif key == "escape":
            self._apply("")

    def _type(self, key: str) -> None:
        assert self._prompt is not None, "only called while a filter is typed"
        if key == "enter":
            self._apply(self._prompt)
        elif key == "escape":
            self._prompt = None
            self._apply("")
        elif key == "backspace":
            self._prompt = self._prompt[:-1]
        elif key == "clear":
            self._prompt = ""
        elif len(key) == 1:
            self._prompt += key

    def _apply(self, text: str) -> None:
        rows = self._newest.rows if self._newest is not None else ()
        try:
            self._keep = parse_filter(text, {name for row in rows for name in row.phases})
        except ValueError as error:
            self._error = str(error)
            return
        self._filter_text, self._prompt, self._error, self._offset = text, None, "", 0

    def _footer(self, snapshot: Snapshot, num_shown: int) -> Line:
        if self._prompt is not None:
            return [("filter: ", "bold"), (self._prompt + "_", ""), (f"  {self._error}", "red")]
        last = min(self._offset + self._page, num_shown)
        place = f"{self._offset + 1 if num_shown else 0}-{last} of {num_shown}"
        if num_shown != len(snapshot.rows):
            place += f" ({len(snapshot.rows)} ranks)"
        chosen = f"sort {self._sort}"
        chosen += f"  filter {self._filter_text}" if self._filter_text else ""
        chosen += "  marked only" if self._only_marked else ""
        held = [("  HELD (p goes on)", "bold")] if self._held is not None else []
        return [(place, "bold"), (f"  {chosen}", ""), *held, ("  q quit  / filter  <> sort  r turn  ? help", "dim")]


def select(rows: Sequence[Row], keep: Keep | None, *, only_marked: bool = False) -> list[Row]:
    """The rows that are shown.

    Ranks: local.
    """
    return [
        row
        for row in rows
        if (keep is None or keep(row)) and (not only_marked or any(mark != "ended" for mark in row.marks))
    ]


def summary(snapshot: Snapshot, width: int) -> list[Line]:
    """The job in some lines, above the table.

    Ranks: local.
    """
    job = f"  job {snapshot.job_id}" if snapshot.job_id else ""
    size = f"  {_counted(snapshot.world_size, 'rank')} on {_counted(snapshot.num_nodes, 'node')}"
    style = {"running": "green", "silent": "bold red"}.get(snapshot.state, "")
    name = os.path.basename(os.path.normpath(snapshot.run)) or snapshot.run
    lines: list[Line] = [[(name, "bold"), ("  ", ""), (snapshot.state, style), (size, ""), (job, "")]]
    lines.append(_progress(snapshot, width))
    found = {mark: [row.rank for row in snapshot.rows if mark in row.marks] for mark in ("hang", "stale", "straggler")}
    told = [f"{mark}: {_shortened(ranks_as_text(ranks))}" for mark, ranks in found.items() if ranks]
    if snapshot.slowest and not found["straggler"]:
        told.append(f"slowest: {snapshot.slowest}")
    if told:
        lines.append([("  ".join(told), "yellow")])
    news = [event for event in snapshot.events if event.kind != "checkpoint"][-_NUM_EVENTS:]
    lines += [[(f"{_clock(event.time)} ", "dim"), (event.message, _EVENT_STYLES.get(event.kind, ""))] for event in news]
    lines += [[(f"note: {trouble}", "red")] for trouble in snapshot.trouble[:2]]
    if snapshot.state == "waiting":
        lines.append([("no rank has written to monitor/ yet; rankwise.Monitor does", "dim")])
    elif all(row.age_seconds is None for row in snapshot.rows):
        lines.append([("no rank has written to monitor/; rankwise.Monitor does", "dim")])
    return [_cut(line, width) for line in lines]


def legend(width: int) -> list[Line]:
    """What the letters of the bars mean, in lines of so many characters.

    Ranks: local.
    """
    lines: list[Line] = [[]]
    meanings = [(LETTERS[phase], phase) for phase in PHASES] + [(UNKNOWN, "your own"), (LETTERS[OTHER], OTHER)]
    for letter, meaning in meanings:
        if sum(len(text) for text, _ in lines[-1]) + len(meaning) + 2 > width:
            lines.append([])
        lines[-1] += [(letter, STYLES[letter]), (f" {meaning}  ", "")]
    return lines


def _progress(snapshot: Snapshot, width: int) -> Line:
    if snapshot.step is None:
        return [("no step yet", "dim")]
    told = [f"step {snapshot.step:,}" + (f" of {snapshot.num_steps:,}" if snapshot.num_steps else "")]
    if snapshot.steps_per_second:
        pace = snapshot.steps_per_second
        told.append(f"{pace:.2f} it/s" if pace >= 1 else f"{1 / pace:.2f} s a step")
    if snapshot.remaining_seconds is not None:
        told.append(f"{duration(snapshot.remaining_seconds)} left")
    shares: dict[str, float] = {}
    rows = [row for row in snapshot.rows if row.phases]
    for row in rows:
        for name, share in row.phases.items():
            shares[name] = shares.get(name, 0.0) + share / len(rows)
    known = [name for name in PHASES if name in shares] + sorted(set(shares) - set(PHASES))
    known = [name for name in known if shares[name] >= 0.005]
    whole = "  ".join([*told, " ".join(f"{name} {shares[name]:.0%}" for name in known)])
    if len(whole) <= width:
        return [(whole, "")]
    # Where there is no room for the names, the letters of the bars.
    return [("  ".join([*told, " ".join(f"{LETTERS.get(name, UNKNOWN)} {shares[name]:.0%}" for name in known)]), "")]


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _shortened(ranks: str) -> str:
    return ranks if len(ranks) <= 40 else ranks[:40].rpartition(",")[0] + ", ..."


def _clock(time: float) -> str:
    try:
        return datetime.fromtimestamp(time).strftime("%H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "--:--:--"


def _filled(lines: list[Line], width: int, height: int) -> list[Line]:
    cut = [_cut(line, width) for line in lines[:height]]
    return cut + [[] for _ in range(height - len(cut))]


def _cut(line: Line, width: int) -> Line:
    """The line in so many characters, without what a terminal would obey: others wrote the messages."""
    found: Line = []
    for text, style in line:
        clean = text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
        if len(clean) >= width:
            return [*found, (clean[:width], style)]
        found.append((clean, style))
        width -= len(clean)
    return found
