"""Where each rank is now, from the ends of the files alone."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from rankwise.errors import RankwiseError
from rankwise.runreader.history import require_shape
from rankwise.runreader.run import is_event, planned_steps, rank_files, read_info, require_run, rows_of
from rankwise.telemetry import End, Event, Start, Tick, event_from_json, from_json, is_finite

NUM_RECENT = 15
"""Of how many ticks that finished steps the recent pace is made up: about so many seconds."""
NUM_EVENTS = 50

_FIRST_BYTES, _MANY_FIRST_BYTES, _MANY = 8 << 10, 4 << 10, 2000
"""What is read of a file at the first look, and less where there are many."""
_MAX_FIRST_BYTES = 1 << 20
_EVENT_BYTES = 256 << 10
_OPENS = {"straggler": "straggler_over", "hang": "hang_over"}


@dataclass(frozen=True)
class RankState:
    """What a rank last told."""

    rank: int
    tick: Tick | None
    """None before the first of its newest session."""
    ended: bool
    """Whether its session ended in good order."""
    age_seconds: float
    """Since its file last grew, by this reader's own clock; at the first look, by the file's time of change."""
    num_recent_steps: int = 0
    recent_seconds: float = 0.0
    """What the recent steps took."""
    recent_phases: Mapping[str, float] = field(default_factory=dict)
    """What they spent in each phase."""
    own_seconds: float | None = None
    """What is left of a step without `communication`, where a rank waits for others: the median of the recent ones."""


@dataclass(frozen=True)
class Look:
    """The run at one moment.

    Attributes:
        states: by rank; ranks that the newest session does not have are left out.
        rows, info, num_steps: as in `Run`.
        events: the newest, by time.
        stragglers, hangs: by rank the event that said so, of those that are not over.
        trouble: what could not be read.
    """

    states: Mapping[int, RankState]
    rows: Mapping[int, Mapping[str, Any]]
    info: Mapping[str, Any]
    num_steps: int | None
    events: tuple[Event, ...]
    stragglers: Mapping[int, Event]
    hangs: Mapping[int, Event]
    trouble: tuple[str, ...] = ()


class Tail:
    """Looks at a run again and again, and reads what is new since the last time.

    Ages are those of the files as this reader sees them change: clocks of other hosts are not asked, but at the first
    look, which has nothing else than the time that the file system gives.

    Args:
        monotonic, now: clocks of this host, in seconds; `now` since 1970.
    Raises:
        RankwiseError: it is no run directory.
    Ranks: local, in no job; one thread.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._folder = require_run(run_dir)
        self._monotonic, self._now = monotonic, now
        self._ranks: dict[int, _RankTail] = {}
        self._event_files: dict[int, _Lines] = {}
        self._events: deque[Event] = deque(maxlen=NUM_EVENTS)
        self._open: dict[str, dict[int, Event]] = {kind: {} for kind in _OPENS}
        self._run_file_sign: tuple[int, ...] | None = None
        self._info: dict[str, Any] = {}
        self._rows: dict[int, Mapping[str, Any]] = {}
        self._num_steps: int | None = None
        self._run_trouble: list[str] = []

    def look(self) -> Look:
        """The run now.

        Raises:
            RankwiseError: the folder is gone.
        """
        trouble: list[str] = []
        files = rank_files(self._folder / "monitor", trouble)
        if not files and not self._folder.is_dir():
            raise RankwiseError(f"{str(self._folder)!r} is gone. Give a run directory that stays.")
        self._read_run_file(files)
        if self._rows:
            files = {rank: entry for rank, entry in files.items() if rank in self._rows}
        monotonic, now = self._monotonic(), self._now()
        unreadable = 0
        for rank, entry in files.items():
            own = self._ranks.get(rank)
            if own is None:
                first_bytes = _FIRST_BYTES if len(files) < _MANY else _MANY_FIRST_BYTES
                own = self._ranks[rank] = _RankTail(Path(entry.path), first_bytes)
            try:
                own.read(entry.stat(), monotonic, now)
            except OSError:
                unreadable += 1
        if unreadable:
            trouble.append(f"{unreadable} of {len(files)} files in monitor/ cannot be read")
        self._read_events()
        states = {rank: self._ranks[rank].state(rank, monotonic) for rank in sorted(files)}
        stragglers, hangs = (dict(self._open[kind]) for kind in ("straggler", "hang"))
        events = tuple(sorted(self._events, key=lambda event: event.time))
        everything = (*self._run_trouble, *trouble)
        return Look(states, self._rows, self._info, self._num_steps, events, stragglers, hangs, everything)

    def _read_run_file(self, files: Mapping[int, os.DirEntry[str]]) -> None:
        try:
            sign = _sign(os.stat(self._folder / "run.json"))
        except OSError:
            sign = ()
        # Without run.json the ranks' own first lines say who they are, and there may be more of them now.
        if sign == self._run_file_sign and (sign or len(self._rows) == len(files)):
            return
        before = self._info.get("started")
        self._run_file_sign, self._run_trouble = sign, []
        self._info = read_info(self._folder, self._run_trouble)
        self._rows = rows_of(self._folder, self._info, tuple(sorted(files)))
        self._num_steps = planned_steps(self._folder)
        if before is not None and before != self._info.get("started"):
            # Nobody is slow any more of those that were before the job was started again.
            for opened in self._open.values():
                opened.clear()

    def _read_events(self) -> None:
        started = seconds_of(self._info.get("started"))
        new = []
        for rank, entry in rank_files(self._folder / "events").items():
            lines = self._event_files.setdefault(rank, _Lines(Path(entry.path), _EVENT_BYTES))
            try:
                new += [event_from_json(line) for line in lines.read(entry.stat())]
            except OSError:
                continue
        events = [event for event in new if event is not None and is_event(event)]
        for event in sorted(events, key=lambda event: event.time):
            self._events.append(event)
            for kind, end in _OPENS.items():
                for rank in event.ranks if event.time >= started - 1 else ():
                    if event.kind == kind:
                        self._open[kind][rank] = event
                    elif event.kind == end:
                        self._open[kind].pop(rank, None)


class _Lines:
    """The lines of a file that were added since the last time; at first those near its end, the first of them cut."""

    def __init__(self, path: Path, first_bytes: int) -> None:
        self._path = path
        self._first_bytes = first_bytes
        self._sign: tuple[int, ...] | None = None
        self._offset = -1

    def read(self, stat: os.stat_result) -> Iterator[bytes]:
        sign = _sign(stat)
        if sign == self._sign:
            return iter(())
        with open(self._path, "rb") as file:
            size = stat.st_size
            is_new = self._offset < 0 or size < self._offset or (self._sign is not None and sign[0] != self._sign[0])
            begin = max(size - self._first_bytes, 0) if is_new else self._offset
            content = _from(file, begin)
            end = content.rfind(b"\n") + 1
            self._sign, self._offset = sign, begin + end
        return iter(content[:end].splitlines())

    def go_back(self, num_bytes: int) -> bool:
        """Begin anew, so far before the end; False where that is the beginning already."""
        was_all = self._sign is None or self._sign[1] <= self._first_bytes
        self._first_bytes, self._offset, self._sign = num_bytes, -1, None
        return not was_all


def _from(file: Any, begin: int) -> bytes:
    file.seek(begin)
    return bytes(file.read())


class _Done(NamedTuple):
    """The steps of one tick: how many, and what they took."""

    steps: int
    seconds: float
    phases: dict[str, float]
    own: list[float]


class _RankTail:
    """One rank's newest lines."""

    def __init__(self, path: Path, first_bytes: int) -> None:
        self._lines = _Lines(path, first_bytes)
        self._first_bytes = first_bytes
        self._sign: tuple[int, ...] | None = None
        self._changed = 0.0
        self._tick: Tick | None = None
        self._ended = False
        self._recent: deque[_Done] = deque(maxlen=NUM_RECENT)

    def read(self, stat: os.stat_result, monotonic: float, now: float) -> None:
        sign = _sign(stat)
        if sign == self._sign:
            return
        self._changed = monotonic if self._sign is not None else monotonic - max(now - stat.st_mtime, 0.0)
        found = self._take(self._lines.read(stat))
        # Lines may be long: where steps are short, or phases many.
        num_bytes = self._first_bytes
        while self._sign is None and not found and num_bytes < _MAX_FIRST_BYTES:
            num_bytes *= 8
            if not self._lines.go_back(num_bytes):
                break
            found = self._take(self._lines.read(stat))
        self._sign = sign

    def state(self, rank: int, monotonic: float) -> RankState:
        phases: dict[str, float] = {}
        for done in self._recent:
            for name, seconds in done.phases.items():
                phases[name] = phases.get(name, 0.0) + seconds
        count, seconds = sum(done.steps for done in self._recent), sum(done.seconds for done in self._recent)
        age = max(monotonic - self._changed, 0.0)
        alone = [value for done in self._recent for value in done.own]
        own = statistics.median(alone) if alone else None
        return RankState(rank, self._tick, self._ended, age, count, seconds, phases, own)

    def _take(self, lines: Iterator[bytes]) -> bool:
        found = False
        for text in lines:
            line = from_json(text)
            match line:
                case Start():
                    self._tick, self._ended, found = None, False, True
                    self._recent.clear()
                case Tick():
                    self._tick, self._ended, found = line, False, True
                    self._add(line)
                case End():
                    self._ended = found = True
        return found

    def _add(self, tick: Tick) -> None:
        try:
            if tick.steps is not None and len(tick.steps.seconds):
                require_shape(tick.steps)
                own = {name: sum(values) for name, values in tick.steps.phases.items()}
                waits = tick.steps.phases.get("communication") or [0.0] * len(tick.steps.seconds)
                alone = [whole - wait for whole, wait in zip(tick.steps.seconds, waits, strict=True)]
                whole = sum(tick.steps.seconds)
                if all(map(is_finite, (whole, *own.values()))):
                    self._recent.append(_Done(len(alone), whole, own, alone))
        except (TypeError, ValueError, AttributeError, OverflowError):
            return


def seconds_of(text: object) -> float:
    """A time of run.json in seconds since 1970; 0 where it is none.

    Ranks: local.
    """
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def _sign(stat: os.stat_result) -> tuple[int, ...]:
    """What changes when a file does: which it is, its size, when it was written."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
