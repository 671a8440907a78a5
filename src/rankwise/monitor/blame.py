"""Whether the ranks hang, and which of them the others wait for: judged from what each said last.

A rank that waits for others is never the cause: it is the one that is behind, is deaf, or left. Pure functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rankwise.monitor.peers import state_in_words

MAX_NAMED = 4


@dataclass(frozen=True)
class Row:
    """What one rank last said of itself, and how long ago that was."""

    rank: int
    step: int = 0
    """The last step that it finished."""
    phase: str | None = None
    collective: str | None = None
    """What of ours it waits in."""
    number: int = 0
    """How many signs of progress it has given."""
    idle_seconds: float = 0.0
    """Since the last sign of progress; what passed since it spoke is in it."""
    limit_seconds: float = float("inf")
    waits: bool = False
    """Whether it waits for other ranks, or for the device."""
    where: str = ""
    at_prompt: bool = False
    """Whether a person holds it, in a debugger."""
    left: bool = False
    """Whether it has left its loop, in good order."""
    enqueued: int = 0
    """How many collectives torch has begun there; 0 where that is not known."""
    host: str = ""
    device: str = ""
    pid: int = 0
    started: int | None = None
    machine: str = ""
    silent: bool = False
    """Whether it has missed several of its beats."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the system says of it, where it is silent; see `peers.look_at_process`."""

    @property
    def is_held(self) -> bool:
        """Whether a person holds it: that is no hang."""
        return self.at_prompt or self.facts.get("state") == "t" or bool(self.facts.get("tracer"))

    @property
    def is_over(self) -> bool:
        """Whether it has gone without progress for longer than its limit."""
        return self.idle_seconds > self.limit_seconds


@dataclass(frozen=True)
class Hang:
    """What `find_hang` found."""

    causes: tuple[Row, ...]
    """The ranks that the others wait for; empty where none is behind the others."""
    others: tuple[Row, ...]
    """The other ranks that are in their loop."""
    absent: tuple[int, ...] = ()
    """Ranks that never said a word."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Whom it is about: the causes, or all where there are none."""
        named = tuple(row.rank for row in self.causes) + self.absent
        return tuple(sorted(named)) or tuple(row.rank for row in self.others)

    @property
    def idle_seconds(self) -> float:
        """How long nothing has gone on."""
        return max((row.idle_seconds for row in (*self.causes, *self.others) if not row.left), default=0.0)


def find_hang(rows: Iterable[Row], absent: Sequence[int] = ()) -> Hang | None:
    """Whether the ranks hang, and which of them the others wait for.

    A rank at work, within the limit of its phase, keeps those from an alarm that may be waiting for it.

    Args:
        rows: of every rank that has spoken.
        absent: ranks that have not.
    Ranks: local; the main process, or who stands in for it.
    """
    every = sorted(rows, key=lambda row: row.rank)
    inside = [row for row in every if not row.left]
    if any(row.is_held for row in inside) or not any(row.is_over for row in inside):
        return None
    late = [row for row in inside if row.silent or not row.waits]
    if late:
        over = [row for row in late if row.is_over]
        # One that has come as far, or less, and may take its time: it may be what the others wait for, in ways that
        # cannot be told from work.
        if not over or any(not row.is_over and row.step <= max(each.step for each in over) for row in late):
            return None
        causes = _behind(over, inside)
    else:
        gone = [row for row in every if row.left]
        causes = gone if gone or absent else _behind(inside, inside)
    others = tuple(row for row in inside if row not in causes)
    return Hang(tuple(causes), others, tuple(absent) if not late else ())


def in_words(hang: Hang, stacks: str | None, witness: Row | None = None) -> str:
    """A hang as one line: which ranks are missing where, and what the others do.

    Args:
        stacks: where the stacks are written; None where they are not.
        witness: who tells it, where that is not the main process, and the others cannot be heard.
    Ranks: local.
    """
    parts = [_cause_in_words(row) for row in hang.causes[:MAX_NAMED]]
    if len(hang.causes) > MAX_NAMED:
        parts.append(f"{len(hang.causes) - MAX_NAMED} more ranks too")
    if hang.absent:
        parts.append(f"rank {', '.join(map(str, hang.absent[:MAX_NAMED]))} has never been heard of")
    rest = _others_in_words(hang.others, is_all=not parts)
    if witness is not None:
        what = witness.collective or _phase_in_words(witness)
        rest = f"rank {witness.rank}, which tells it, {'waits' if witness.waits else 'is'} in {what}"
    told = "; ".join(filter(None, (", ".join(parts), rest)))
    tail = f". Stacks: {stacks}" if stacks is not None else ""
    return f"no progress for {hang.idle_seconds:.0f} s: {told}{tail}"


def place_of(row: Row) -> str:
    """A rank with its host, device and process.

    Ranks: local.
    """
    inner = ", ".join(filter(None, (row.host, row.device, f"pid {row.pid}" if row.pid else "")))
    return f"rank {row.rank} ({inner})" if inner else f"rank {row.rank}"


def with_facts(row: Row, facts: Mapping[str, Any] | None) -> Row:
    """The row, with what the system says of its process.

    Ranks: local.
    """
    return replace(row, facts=facts) if facts else row


def _behind(candidates: Sequence[Row], inside: Sequence[Row]) -> list[Row]:
    """Those of the candidates that the others wait for; empty where they are all at one place, and more than one."""
    silent = [row for row in candidates if row.silent]
    if silent:
        return silent
    if len(inside) == 1:
        return list(candidates)
    first_step = min(row.step for row in inside)
    slowest = [row for row in candidates if row.step == first_step]
    if slowest and len(slowest) < len(inside) and first_step < max(row.step for row in inside):
        candidates = slowest
    if len(candidates) < len(inside):
        return list(candidates)
    begun = [row.enqueued for row in candidates]
    if min(begun) != max(begun) and min(begun) > 0:
        return [row for row in candidates if row.enqueued == min(begun)]
    places = Counter((row.phase, row.collective, row.where) for row in candidates)
    place, num_there = places.most_common(1)[0]
    if len(places) > 1 and num_there > len(candidates) / 2:
        return [row for row in candidates if (row.phase, row.collective, row.where) != place]
    return [] if len(places) == 1 else list(candidates)


def _cause_in_words(row: Row) -> str:
    if row.left:
        return f"{place_of(row)} left the loop after step {row.step}"
    verb = "was last" if row.silent else "is"
    where = f" ({row.where})" if row.where else ""
    inner = f"{row.collective} of step {row.step + 1}" if row.collective else _phase_in_words(row)
    told = f"{place_of(row)} {verb} in {inner}{where}"
    if not row.silent:
        asleep = row.facts.get("state") == "D"
        return f"{told}, {state_in_words('D')}" if asleep else told
    state = row.facts.get("state")
    return f"{told}, {state_in_words(state)}" if state else f"{told}, and does not answer"


def _phase_in_words(row: Row) -> str:
    return f"{row.phase} of step {row.step + 1}" if row.phase else f"step {row.step + 1}"


def _others_in_words(others: Sequence[Row], *, is_all: bool) -> str:
    if not others:
        return ""
    if is_all:
        row = others[0]
        verb = "wait in" if all(row.waits for row in others) else "are in"
        inner = row.collective or _phase_in_words(row)
        where = f" ({row.where})" if row.where and len({row.where for row in others}) == 1 else ""
        return f"all {len(others)} ranks {verb} {inner}{where}, and none is behind the others"
    waiting = [row for row in others if row.waits and not row.silent]
    working = [row for row in others if row not in waiting]
    told = []
    if waiting:
        whats = {row.collective or "communication" for row in waiting}
        what = whats.pop() if len(whats) == 1 else "communication"
        told.append(f"{_the_others(len(waiting), len(others))} in {what}")
    if working:
        phases = sorted({row.phase or "no phase" for row in working})
        told.append(f"{len(working)} more {'is' if len(working) == 1 else 'are'} in {', '.join(phases[:MAX_NAMED])}")
    return ", ".join(told)


def _the_others(num_waiting: int, num_others: int) -> str:
    if num_waiting < num_others:
        return f"{num_waiting} wait{'s' if num_waiting == 1 else ''}"
    return "the other waits" if num_waiting == 1 else f"the {num_waiting} others wait"
