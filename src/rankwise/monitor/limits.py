"""How long a rank may go without a sign of progress: set by the user, or learned from its own steps, phase by phase.

What a run has lived through is no hang: the limit of a phase is three times the longest stretch that was seen in it, no
less than a minute and not more than the session's timeout. Before a phase was seen three times, which takes in the
steps that compile, and the first checkpoint or validation, the limit is the session's timeout. What no phase covers may
be anything, a first checkpoint or the samples at the end, so there it is half of the session's timeout at least.
"""

from __future__ import annotations

from collections.abc import Mapping

FLOOR_SECONDS = 60.0
"""Below it there are pauses that heal: a network file system that asks again, a node that swaps, garbage collection."""

STRETCHES = 3.0
"""How much longer than the longest seen: shapes that compile anew, a larger validation, a slower disk."""

NUM_KNOWN = 3
"""How often a phase must have been seen: twice could be two compilations."""

UNCOVERED_SHARE = 0.5
"""Of the session's timeout: the least limit outside of phases, so that who it is is told before collectives give up."""


class Limits:
    """The limits of one rank.

    Args:
        set_seconds: the user's own limit, for every phase; None learns.
        timeout_seconds: the session's, at which collectives give up anyway.
    """

    def __init__(self, set_seconds: float | None, timeout_seconds: float) -> None:
        self._set_seconds = set_seconds
        self._timeout_seconds = timeout_seconds
        self._longest: dict[str | None, float] = {}
        self._num_seen: dict[str | None, int] = {}

    @property
    def smallest_seconds(self) -> float:
        """What no limit is below.

        Ranks: local.
        """
        return self._set_seconds if self._set_seconds is not None else min(FLOOR_SECONDS, self._timeout_seconds)

    def note(self, phase: str | None, seconds: float) -> None:
        """Know that a stretch of this phase took so long, and ended well; many of them may be one validation.

        Ranks: local.
        """
        if seconds > self._longest.get(phase, -1.0):
            self._longest[phase] = seconds

    def learn(self, phase: str | None, seconds: float) -> None:
        """Know that the whole of this phase in a finished step took so long.

        Ranks: local.
        """
        self.note(phase, seconds)
        self._num_seen[phase] = self._num_seen.get(phase, 0) + 1

    def learn_step(self, seconds: float, phases: Mapping[str, float]) -> None:
        """Know a finished step by its phases; without any the step is one stretch outside of them.

        Ranks: local.
        """
        for phase, share in (phases or {"other": seconds}).items():
            self.learn(None if phase == "other" else phase, share)

    def of(self, phase: str | None) -> float:
        """The limit while the training thread is in this phase, in seconds.

        Ranks: local.
        """
        if self._set_seconds is not None:
            return self._set_seconds
        if self._num_seen.get(phase, 0) < NUM_KNOWN:
            return self._timeout_seconds
        floor = FLOOR_SECONDS if phase is not None else max(FLOOR_SECONDS, UNCOVERED_SHARE * self._timeout_seconds)
        return min(max(floor, STRETCHES * self._longest[phase]), self._timeout_seconds)
