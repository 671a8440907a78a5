"""Which rank holds the others up: robust statistics over one row of durations per rank. No ranks, no clocks, no torch.

Durations of one host are compared with durations of another, never their clocks. A rank's *own* time is its step
without communication; the rank that the others wait for has more of it, and waits less, than they do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

COMMUNICATION = "communication"
MAX_PHASES = 16
"""Phases that are told apart; further ones count as `other`."""

_OTHER = "other"
_SIGMA_OF_MAD = 1.4826
_CAPPED_SHARE = 25
"""One step in so many, the longest, counts as no longer than those after it."""

_NUM_BATCHES = 5
_MEASURED_SHARE = 0.01
_EXPLAINED = 1.5
# Where nobody measures the waiting it hides in the phases at the end of this list, most likely in the last.
_LEAST_LIKELY_TO_WAIT = ("data", "checkpoint", "validation", "optimizer", _OTHER)
_LIKELY_TO_WAIT = ("forward", "backward")


@dataclass(frozen=True)
class Limits:
    """What counts as slow."""

    share: float = 0.05
    """Of a step: what is less holds nobody up to speak of."""
    seconds: float = 0.001
    """Per step, likewise."""
    num_sigmas: float = 5.0
    """How far above the noise the mean of `num_windows` has to be."""
    num_windows: int = 5
    """Windows that are looked at together."""
    num_bad: int = 3
    """So many of these must be over the limit: an alarm, and so many well ones to take it back."""
    well_share: float = 0.6
    """Of the limit: a rank is well again below that."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Row:
    """One rank's durations in one window, seconds a step."""

    seconds: float
    own: float
    own_error: float
    """Standard error of `own`."""
    phases: Mapping[str, tuple[float, float]]
    """Mean and its standard error; `communication` may be among them."""

    @classmethod
    def of(cls, seconds: Sequence[float], phases: Mapping[str, Sequence[float]]) -> Row:
        """The row of some steps, of which `phases` has as many numbers each as `seconds`.

        Ranks: local.
        """
        whole = np.asarray(seconds, dtype=np.float64)
        waiting = np.asarray(phases.get(COMMUNICATION, 0.0), dtype=np.float64)
        told = {name: _pair(summarise(np.asarray(values))) for name, values in phases.items() if name != COMMUNICATION}
        if COMMUNICATION in phases:
            # All of it counts, though it may come once in many steps, as it does where gradients are accumulated.
            told[COMMUNICATION] = (float(waiting.mean()), _pair(summarise(waiting))[1])
        own, own_error = _pair(summarise(whole - waiting))
        return cls(float(whole.mean()), own, own_error, told)

    def is_finite(self) -> bool:
        """Whether all of it are numbers that can be compared.

        Ranks: local.
        """
        numbers = [self.seconds, self.own, self.own_error, *itertools.chain(*self.phases.values())]
        return all(map(math.isfinite, numbers))


def summarise(seconds: Floats) -> tuple[Floats, Floats]:
    """Mean over the first axis and its standard error, with the longest few values capped.

    One long step, as of a garbage collection, moves the mean of a window no more than the next longest ones. The error
    is the larger of that of independent steps and that of the means of five batches: a machine that is busy with
    something else for a while makes neighbours alike.
    """
    num = len(seconds)
    num_capped = -(-num // _CAPPED_SHARE) if num > 3 else 0
    capped = seconds
    if num_capped:
        last = num - 1 - num_capped
        capped = np.minimum(seconds, np.partition(seconds, last, axis=0)[last])
    mean = capped.mean(axis=0)
    if num < 2:
        return mean, np.zeros_like(mean)
    error = capped.std(axis=0, ddof=1) / np.sqrt(num)
    length = num // _NUM_BATCHES
    if length > 3:
        batches = capped[: length * _NUM_BATCHES].reshape(_NUM_BATCHES, length, *capped.shape[1:]).mean(axis=1)
        error = np.maximum(error, batches.std(axis=0, ddof=1) / np.sqrt(_NUM_BATCHES))
    return mean, error


class Window:
    """The rows of all ranks for the same steps, as they come in."""

    def __init__(self, num_ranks: int) -> None:
        self.present = np.zeros(num_ranks, dtype=bool)
        self.seconds = np.zeros(num_ranks)
        self.own = np.zeros(num_ranks)
        self.own_errors = np.zeros(num_ranks)
        self.phases: dict[str, Floats] = {}
        """By name two rows: seconds of every rank, and their errors."""

    @property
    def is_whole(self) -> bool:
        """Whether every rank's row is in."""
        return bool(self.present.all())

    def put(self, rank: int, row: Row) -> None:
        """Keep the row of a rank."""
        self.present[rank] = True
        self.seconds[rank], self.own[rank], self.own_errors[rank] = row.seconds, row.own, row.own_error
        for name, (mean, error) in row.phases.items():
            if name not in self.phases and len(self.phases) >= MAX_PHASES and name != COMMUNICATION:
                name = _OTHER
            column = self.phases.get(name)
            if column is None:
                column = self.phases[name] = np.zeros((2, len(self.present)))
            column[0, rank] += mean
            column[1, rank] += error


@dataclass(frozen=True)
class Judgement:
    """What one window says of every rank."""

    held: Floats
    """Seconds of each step that the rank holds the others up, NaN where its row is missing."""
    noise: Floats
    """By how much `held` may be wrong: one standard deviation."""
    phase: Ints
    """Index into `names`: where the rank spends more than the others."""
    names: tuple[str, ...]
    limit: float
    """`held` over this is bad."""
    step_seconds: float
    transfer_seconds: float
    """Communication of the rank that waits least: what the transfer itself takes, when nobody is late."""


def judge(window: Window, limits: Limits = DEFAULT_LIMITS) -> Judgement:
    """Who holds the others up, from the rows that are there.

    Where communication is measured, a rank holds the others up by what its own time has more than the median's, but not
    by more than it waits less than they do: who only waits for others has no more time of its own. Where it is not, all
    steps are equally long and the wait hides in some phase: then a rank is to blame for its longer phase if that makes
    up for what it waits less in others. Medians of an even number are the lower one of own time and the upper one of
    waiting, so that of two ranks, or two halves, the slow one is told.

    Ranks: local.
    """
    at = np.flatnonzero(window.present)
    names = tuple(name for name in window.phases if name != COMMUNICATION)
    step_seconds = float(np.median(window.seconds[at])) if len(at) else 0.0
    limit = max(limits.seconds, limits.share * step_seconds)
    held = np.full(len(window.present), np.nan)
    noise, phase = np.zeros(len(held)), np.zeros(len(held), dtype=np.int64)
    communication = window.phases.get(COMMUNICATION, np.zeros((2, len(held))))[0, at]
    transfer = _lower(communication, 20) if len(at) else 0.0
    if len(at) > 1 and names:
        means = np.stack([window.phases[name][0, at] for name in names])
        errors = np.stack([window.phases[name][1, at] for name in names])
        more = np.stack([column - _lower_median(column) for column in means])
        if _upper_median(communication) > _MEASURED_SHARE * step_seconds:
            own = window.own[at]
            waits = window.seconds[at] - own
            excess = own - _lower_median(own)
            held[at] = np.clip(np.minimum(excess, _upper_median(waits) - waits), 0.0, None)
            noise[at] = _noise(excess, window.own_errors[at])
            phase[at] = more.argmax(axis=0)
        else:
            held[at], noise[at], phase[at] = _judge_phases(names, means, errors, more, limit)
    return Judgement(held, noise, phase, names, limit, step_seconds, transfer)


def _judge_phases(
    names: tuple[str, ...], means: Floats, errors: Floats, more: Floats, limit: float
) -> tuple[Floats, Floats, Ints]:
    """As `judge`, where nobody measures how long a rank waits."""
    less = np.stack([np.clip(_upper_median(column) - column, 0.0, None) for column in means])
    held = np.clip(np.minimum(more, less.sum(axis=0) - less), 0.0, None)
    blamed = np.zeros(means.shape[1], dtype=bool)
    surer: list[int] = []
    for index in sorted(range(len(names)), key=lambda index: _likelihood_to_wait(names[index])):
        bad = (held[index] > limit) & ~blamed
        others = held[surer][:, ~bad]
        if others.size and 2 * bad.sum() >= (~blamed).sum():
            # All that are left have more here, and no more than somebody holds them up elsewhere: they wait for him.
            held[index, bad & (held[index] <= _EXPLAINED * others.max())] = 0.0
        blamed |= bad & (held[index] > limit)
        surer.append(index)
    phase = held.argmax(axis=0)
    ranks = np.arange(means.shape[1])
    noise = np.stack([_noise(column, error) for column, error in zip(more, errors, strict=True)])
    return held[phase, ranks], noise[phase, ranks], phase


@dataclass(frozen=True)
class Change:
    """What `History.add` has found."""

    begun: Ints
    """Ranks that hold the others up from now on."""
    ended: Ints
    """Ranks that do so no more."""


class History:
    """The last few windows of all ranks: alarms are raised and taken back over several of them."""

    def __init__(self, num_ranks: int, limits: Limits = DEFAULT_LIMITS) -> None:
        self.alarmed = np.zeros(num_ranks, dtype=bool)
        self._limits = limits
        shape = (limits.num_windows, num_ranks)
        self._held = np.full(shape, np.nan)
        self._noise, self._limit = np.zeros(shape), np.ones((limits.num_windows, 1))
        self._phases: list[Sequence[str]] = [()] * limits.num_windows
        self._phase = np.zeros(shape, dtype=np.int64)

    def add(self, judgement: Judgement) -> Change:
        """Take in the next window.

        Ranks: local.
        """
        for kept in (self._held, self._noise, self._limit, self._phase):
            kept[:-1] = kept[1:]
        self._held[-1], self._noise[-1], self._limit[-1] = judgement.held, judgement.noise, judgement.limit
        self._phase[-1] = judgement.phase
        self._phases = [*self._phases[1:], judgement.names]
        limits = self._limits
        known = ~np.isnan(self._held)
        num_known = np.maximum(known.sum(axis=0), 1)
        bad = self._bad()
        limit = np.where(known, self._limit, 0.0).sum(axis=0) / num_known
        noise = np.sqrt(np.where(known, self._noise**2, 0.0).sum(axis=0)) / num_known
        is_clear = self.mean_held() > np.maximum(limit, limits.num_sigmas * noise)
        begun = (bad.sum(axis=0) >= limits.num_bad) & bad[-1] & is_clear & ~self.alarmed
        last = np.nan_to_num(self._held[-limits.num_bad :] / self._limit[-limits.num_bad :], nan=1.0)
        well = last.mean(axis=0) < limits.well_share
        ended = self.alarmed & well & ~bad[-1]
        self.alarmed = (self.alarmed | begun) & ~ended
        return Change(np.flatnonzero(begun), np.flatnonzero(ended))

    def mean_held(self) -> Floats:
        """Seconds of each step that each rank holds the others up, over the windows that are kept."""
        known = ~np.isnan(self._held)
        return np.asarray(np.nansum(self._held, axis=0) / np.maximum(known.sum(axis=0), 1))

    def mean_bad(self, rank: int) -> float:
        """Seconds of each step that this rank holds the others up, over the windows in which it does."""
        bad = self._bad()[:, rank]
        return float(self._held[bad, rank].mean()) if bad.any() else 0.0

    def num_windows(self, rank: int) -> int:
        """How many windows ago, of those that are kept, this rank was over the limit for the first time."""
        bad = np.flatnonzero(self._bad()[:, rank])
        return len(self._held) - int(bad[0]) if len(bad) else 0

    def phase(self, rank: int) -> str:
        """Where this rank spent more than the others, in most of the windows in which it held them up."""
        bad = np.flatnonzero(self._bad()[:, rank])
        found = [self._phases[index][self._phase[index, rank]] for index in bad]
        return max(found, key=found.count, default=_OTHER)

    def bad_now(self) -> Bools:
        """Ranks that are over the limit in the last window."""
        return np.asarray(self._bad()[-1])

    def _bad(self) -> Bools:
        return np.asarray(np.nan_to_num(self._held, nan=0.0) > self._limit)


def _noise(excess: Floats, errors: Floats) -> Floats:
    """How far apart ranks are that nothing is wrong with, or how exact the means are: the larger."""
    spread = _SIGMA_OF_MAD * _lower_median(np.abs(excess))
    return np.maximum(spread, np.hypot(errors, _lower_median(errors)))


def _lower_median(values: Floats) -> float:
    return float(np.partition(values, (len(values) - 1) // 2)[(len(values) - 1) // 2])


def _upper_median(values: Floats) -> float:
    return float(np.partition(values, len(values) // 2)[len(values) // 2])


def _lower(values: Floats, share: int) -> float:
    """What one value in `share` is below."""
    index = (len(values) - 1) // share
    return float(np.partition(values, index)[index])


def _likelihood_to_wait(name: str) -> int:
    if name in _LEAST_LIKELY_TO_WAIT:
        return _LEAST_LIKELY_TO_WAIT.index(name)
    return len(_LEAST_LIKELY_TO_WAIT) + (_LIKELY_TO_WAIT.index(name) + 1 if name in _LIKELY_TO_WAIT else 0)


def _pair(values: tuple[Floats, Floats]) -> tuple[float, float]:
    return float(values[0]), float(values[1])
