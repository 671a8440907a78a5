"""What one rank's file in `monitor/` holds, as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.telemetry import End, Start, Steps, Tick, from_json, is_finite, is_step

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

WORDS = ("throttle_reasons", "xid_errors")
"""Readings that are lists; all others are numbers."""


@dataclass(frozen=True)
class Span:
    """One session of a rank, from its start to its last sign."""

    start: Start | None
    """None where its line is missing."""
    first_time: float
    last_time: float
    """Seconds since 1970, by the rank's host; of the newest line."""
    last_step: int
    ended: bool
    """Whether it ended in good order; False too while it goes on."""


@dataclass(frozen=True)
class RankHistory:
    """Everything that a rank told.

    Attributes:
        steps: finished steps in ascending order, each once: of one that was made twice the later is kept.
        seconds: of each of `steps`.
        times: when each was told, within a second of its end; seconds since 1970 by the rank's host.
        sessions: of each of `steps` the place in `spans`.
        phases: by name, seconds for each of `steps`; 0 where the step did not go through it.
        sample_times, sample_steps: of the samples: once a second the time and the last finished step.
        device, process: by name, a number for each sample; nan where there was none.
        words: by name (`WORDS`), what the samples list, as (index of the sample, the words), where there are any.
        num_foreign: lines that are none of ours, or cut short.
    """

    rank: int
    steps: Integers
    seconds: Floats
    times: Floats
    sessions: Integers
    phases: Mapping[str, Floats]
    sample_times: Floats
    sample_steps: Integers
    device: Mapping[str, Floats]
    process: Mapping[str, Floats]
    words: Mapping[str, tuple[tuple[int, tuple[str, ...]], ...]] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()
    num_foreign: int = 0

    @property
    def start(self) -> Start | None:
        """The newest session's first line."""
        return self.spans[-1].start if self.spans else None


def read_history(path: Path, rank: int) -> RankHistory:
    """The history in a file; one that is empty gives empty arrays.

    Raises:
        OSError: the file cannot be read.
    Ranks: local.
    """
    gathered = _Gathered()
    with open(path, "rb") as file:
        gathered.take(file)
    return gathered.as_history(rank)


class _Gathered:
    """Lists that grow line by line; a line of another shape adds nothing, a value that is no number becomes nan."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.num_foreign = 0
        self._batches: list[tuple[int, int, float, int]] = []  # first step, how many, time, session
        self._seconds: list[Any] = []
        self._phases: dict[str, list[Any]] = {}
        self._samples: list[tuple[float, int]] = []
        self._device: list[Mapping[str, Any]] = []
        self._process: list[Mapping[str, Any]] = []
        self._words: dict[str, list[tuple[int, tuple[str, ...]]]] = {}

    def take(self, lines: Iterable[bytes]) -> None:
        for text in lines:
            line = from_json(text)
            try:
                if isinstance(line, Tick):
                    self._tick(line)
                elif isinstance(line, Start):
                    time = float(line.time)
                    self.spans.append(Span(line, time, time, 0, False))
                elif isinstance(line, End):
                    self._see(float(line.time), int(line.step), ended=True)
                elif text.strip():
                    self.num_foreign += 1
            except (TypeError, ValueError, OverflowError, AttributeError):
                self.num_foreign += 1

    def as_history(self, rank: int) -> RankHistory:
        firsts, counts, times, sessions = np.array(self._batches, dtype=np.float64).reshape(-1, 4).T
        num = counts.astype(np.int64)
        # Within its batch the n-th step is n after the first.
        offsets = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
        made = np.repeat(firsts.astype(np.int64), num) + offsets
        # The last of equal steps counts: looked for from the end, it is the first.
        steps, found = np.unique(made[::-1], return_index=True)
        kept = len(made) - 1 - found
        for values in self._phases.values():
            values += [0.0] * (len(self._seconds) - len(values))
        return RankHistory(
            rank,
            steps,
            _floats(self._seconds)[kept],
            np.repeat(times, num)[kept],
            np.repeat(sessions.astype(np.int64), num)[kept],
            {name: _floats(values)[kept] for name, values in self._phases.items()},
            np.array([time for time, _ in self._samples], dtype=np.float64),
            np.array([step for _, step in self._samples], dtype=np.int64),
            _columns(self._device),
            _columns(self._process),
            {name: tuple(told) for name, told in self._words.items()},
            tuple(self.spans),
            self.num_foreign,
        )

    def _see(self, time: float, step: int, *, ended: bool = False) -> None:
        if not self.spans:
            self.spans.append(Span(None, time, time, step, ended))
        last = self.spans[-1]
        self.spans[-1] = Span(last.start, last.first_time, time, step, ended)

    def _tick(self, tick: Tick) -> None:
        time, step, device = float(tick.time), int(tick.step), tick.device
        said = [(name, tuple(map(str, device[name]))) for name in WORDS if device.get(name)]
        if tick.steps is not None:
            require_shape(tick.steps)
        if not isinstance(tick.process, dict):
            raise TypeError("the readings of the process are no object")
        # From here on nothing can fail.
        self._see(time, step)
        if tick.steps is not None:
            self._batches.append((tick.steps.first, len(tick.steps.seconds), time, len(self.spans) - 1))
            before = len(self._seconds)
            self._seconds += tick.steps.seconds
            for name, values in tick.steps.phases.items():
                own = self._phases.setdefault(name, [])
                if len(own) < before:
                    own += [0.0] * (before - len(own))
                own += values
        for name, words in said:
            self._words.setdefault(name, []).append((len(self._samples), words))
        self._samples.append((time, step))
        self._device.append(device)
        self._process.append(tick.process)


def require_shape(steps: Steps) -> None:
    """Raise unless there are as many seconds of each phase as there are steps.

    Raises:
        TypeError, ValueError, AttributeError: it is otherwise.
    Ranks: local.
    """
    count = len(steps.seconds)
    lists = [steps.seconds, *steps.phases.values()]
    if not is_step(steps.first):
        raise ValueError("no step has that number")
    if any(type(values) is not list or len(values) != count for values in lists):
        raise ValueError("a phase has more or fewer steps than there are")


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Floats]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _floats([row.get(name) for row in rows]) for name in names if name not in WORDS}


def _floats(values: list[Any]) -> Floats:
    try:
        return np.array(values, dtype=np.float64)  # None becomes nan
    except (TypeError, ValueError, OverflowError):
        return np.array([value if is_finite(value) else np.nan for value in values], dtype=np.float64)
