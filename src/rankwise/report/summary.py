"""What slowed the run, in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.logs.fold import ranks_as_text
from rankwise.report.heat import WAITING
from rankwise.report.loading import RunData
from rankwise.report.logsummary import LogSummary, ranks_text, shortened
from rankwise.report.lost_time import Blame
from rankwise.telemetry import ALARMING_REASONS

_MUCH_DATA, _MUCH_COMMUNICATION, _MUCH_OTHER = 0.1, 0.3, 0.2
_STALL = 3.0
_NEARLY_FULL = 0.95
_HOT_CELSIUS = 85.0
_MAX_NAMED = 4


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing: `level` is `bad`, `fact`, `note` or `good`."""

    level: str
    title: str
    text: str


def find_all(
    data: RunData,
    totals: dict[str, NDArray[Any]],
    phases: Sequence[str],
    blames: Sequence[Blame],
    logs: LogSummary | None,
) -> list[Finding]:
    """What slowed the run, the worst first.

    Ranks: local.
    """
    found = [
        *_hangs(data),
        *_unmeasured(totals),
        *_slow_ranks(data, totals, blames),
        *_shares(totals, phases),
        *_stalls(data, totals),
        *_devices(data),
        *_restarts(data),
        *_warnings(logs),
    ]
    order = {"bad": 0, "fact": 1, "note": 2, "good": 3}
    return sorted(found, key=lambda finding: order[finding.level])


def place_of(data: RunData, rank: int) -> str:
    """Where a rank runs: its host and device, as far as they are known.

    Ranks: local.
    """
    row = data.run.rows.get(rank, {})
    known = [shortened(str(row[name]), 100) for name in ("host", "device") if row.get(name)]
    return f"rank {rank} ({', '.join(known)})" if known else f"rank {rank}"


def duration(seconds: float) -> str:
    """A time for people: "12 ms", "1.2 s", "5 min 03 s", "2 h 10 min".

    Ranks: local.
    """
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 119.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _hangs(data: RunData) -> Iterator[Finding]:
    hangs = [event for event in data.run.events if event.kind == "hang"]
    for event in hangs[:_MAX_NAMED]:
        yield Finding("bad", f"Hang at step {event.step:,}", _begin(shortened(event.message, 400)))
    if len(hangs) > _MAX_NAMED:
        yield Finding("bad", f"{len(hangs) - _MAX_NAMED} more hangs", "They are in the list of events.")


def _unmeasured(totals: dict[str, NDArray[Any]]) -> Iterator[Finding]:
    if not np.isfinite(totals["mean"]).any():
        text = "Nobody has written steps to monitor/: a rankwise.Monitor does, whose step() ends each of them."
        yield Finding("note", "No step was measured", text)


def _slow_ranks(data: RunData, totals: dict[str, NDArray[Any]], blames: Sequence[Blame]) -> Iterator[Finding]:
    if np.isfinite(totals["mean"]).sum() < 2:
        return
    whole = float(np.nanmax(totals["mean"] * totals["num_steps"]))
    for blame in blames:
        where = f", most of it in {blame.phase}" if blame.phase else ""
        yield Finding(
            "bad" if blame.seconds > 0.03 * whole else "note",
            f"Rank {blame.rank} held the others up",
            f"{_begin(place_of(data, blame.rank))} was last in {blame.num_steps:,} steps between "
            f"{blame.first_step:,} and {blame.last_step:,}{where}: its own work took {blame.slowdown:.2f} times as "
            f"long as the middle rank's. The others waited {duration(blame.seconds)} for it, "
            f"{blame.seconds / whole:.1%} of the run.",
        )
    blamed = {blame.rank for blame in blames}
    told = [event for event in data.run.events if event.kind == "straggler" and not blamed & set(event.ranks)]
    for event in told[:_MAX_NAMED]:
        yield Finding("note", f"A slow rank from step {event.step:,} on", _begin(shortened(event.message, 400)))
    if not blames and not told:
        text = "No rank held the others up for a hundredth of the run and much longer than the others did."
        yield Finding("good", "No rank stands out", text)


def _shares(totals: dict[str, NDArray[Any]], phases: Sequence[str]) -> Iterator[Finding]:
    weights = totals["num_steps"]
    whole = float(np.nansum(totals["mean"] * weights))
    if not whole or not phases:
        return
    seconds = np.nansum(totals["phases"] * weights[:, None], axis=0)
    share = {phase: float(value) / whole for phase, value in zip(phases, seconds, strict=True)}
    ordered = sorted(share.items(), key=lambda item: -item[1])
    told = ", ".join(f"{phase} {part:.0%}" for phase, part in ordered if part > 0.005)
    longest, middle = float(np.nanmax(totals["mean"] * weights)), float(np.nanmedian(totals["median"]))
    text = f"{int(weights.max()):,} steps took {duration(longest)}, the middle one {duration(middle)}."
    yield Finding("fact", "Where the time went", f"{text} Of all ranks' step time: {told}.")
    if share.get("data", 0) > _MUCH_DATA:
        text = "The ranks waited so long for their batches: more loader workers or faster storage would shorten steps."
        yield Finding("note", f"{share['data']:.0%} of the time went to data", text)
    if share.get(WAITING, 0) > _MUCH_COMMUNICATION:
        text = "That is the exchange of gradients and waiting for slower ranks; the ranks' own work tells which."
        yield Finding("note", f"{share[WAITING]:.0%} of the time went to communication", text)
    if share.get("other", 0) > _MUCH_OTHER:
        text = "No phase covers it: wrap more of the loop in monitor.phase(...) to see what it is."
        yield Finding("note", f"{share['other']:.0%} of the time is in no phase", text)


def _stalls(data: RunData, totals: dict[str, NDArray[Any]]) -> Iterator[Finding]:
    if not np.isfinite(totals["median"]).any():
        return
    rank = data.ranks[int(np.nanargmax(totals["mean"] * totals["num_steps"]))].steps
    limit = _STALL * float(np.nanmedian(rank.seconds))
    is_slow = rank.seconds > limit
    lost = float(rank.seconds[is_slow].sum() - is_slow.sum() * limit / _STALL)
    whole = float(np.nansum(rank.seconds))
    if is_slow.any() and lost > 0.01 * whole:
        inside = {phase: float(np.nansum(seconds[is_slow])) for phase, seconds in rank.phases.items()}
        phase = max(inside, key=inside.__getitem__, default=None)
        yield Finding(
            "note",
            f"{int(is_slow.sum()):,} steps took more than {_STALL:.0f} times the middle one",
            f"On rank {rank.rank} they cost {duration(lost)} beyond it, {lost / whole:.1%} of the run"
            + (f"; most of their time is in {phase}." if phase else "."),
        )


def _devices(data: RunData) -> Iterator[Finding]:
    throttled = [rank for rank in data.ranks if rank.num_held_back]
    for rank in sorted(throttled, key=lambda rank: -rank.num_held_back)[:_MAX_NAMED]:
        # The power limit is reached at full load, and clocks are what somebody has set: neither is worth a word.
        words = [word for word, _ in rank.words["throttle_reasons"].most_common() if word in ALARMING_REASONS]
        text = (
            f"{_begin(place_of(data, rank.rank))} said so in {rank.num_held_back:,} of {rank.num_samples:,} samples: "
            f"{', '.join(words[:3])}."
        )
        yield Finding("note", f"The device of rank {rank.rank} was held back", text)
    for rank in [rank for rank in data.ranks if rank.words.get("xid_errors")][:_MAX_NAMED]:
        numbers = ", ".join(shortened(word, 20) for word in sorted(rank.words["xid_errors"])[:8])
        yield Finding(
            "bad", f"Driver errors on rank {rank.rank}", f"{_begin(place_of(data, rank.rank))} told of XID {numbers}."
        )
    errors = [rank.rank for rank in data.ranks if rank.highest.get("ecc_uncorrected", 0) > 0]
    if errors:
        text = f"On the devices of ranks {ranks_as_text(errors[:64])}, since their drivers started."
        yield Finding("bad", "Memory errors that were not corrected", text)
    hot = [rank.rank for rank in data.ranks if rank.highest.get("temperature_celsius", 0) >= _HOT_CELSIUS]
    if hot:
        highest = max(data.ranks, key=lambda rank: rank.highest.get("temperature_celsius", 0))
        text = f"{highest.highest['temperature_celsius']:.0f} C at most, on {place_of(data, highest.rank)}."
        yield Finding("note", f"{_count(len(hot), 'device')} reached {_HOT_CELSIUS:.0f} C", text)
    full = [
        rank.rank
        for rank in data.ranks
        if rank.highest.get("memory_used_gib", 0) > _NEARLY_FULL * rank.highest.get("memory_total_gib", np.inf)
    ]
    if full:
        text = f"More than {_NEARLY_FULL:.0%} of it was used on ranks {ranks_as_text(full[:64])}."
        yield Finding("note", "Device memory was nearly full", text)


def sessions_of(data: RunData) -> list[dict[str, Any]]:
    """Each start of the program: its time, its first step, how many steps it made again, and the pause before it.

    The times are of one rank's host, so the pause is a duration on one clock (if the rank stayed on its host).

    Ranks: local.
    """
    teller = max(data.ranks, key=lambda rank: len(rank.spans), default=None)
    found: list[dict[str, Any]] = []
    if teller is None:
        return found
    for place, span in enumerate(teller.spans):
        step = teller.first_steps[place]
        row: dict[str, Any] = {"time": span.first_time, "step": step, "lastStep": span.last_step, "ended": span.ended}
        if found:
            before = teller.spans[place - 1]
            row["pause"] = max(span.first_time - before.last_time, 0.0)
            row["again"] = max(before.last_step - step + 1, 0) if step is not None else 0
        found.append(row)
    return found


def _restarts(data: RunData) -> Iterator[Finding]:
    sessions = sessions_of(data)
    if len(sessions) > 1:
        again, pause = (sum(session.get(name, 0) for session in sessions) for name in ("again", "pause"))
        yield Finding(
            "note",
            f"Started {len(sessions)} times",
            f"{again:,} steps were made twice, and {duration(pause)} passed between one session's last sign and the "
            "next one's first.",
        )


def _warnings(logs: LogSummary | None) -> Iterator[Finding]:
    if logs is None:
        return
    if not logs.said:
        yield Finding("good", "No warnings", "The logs have no record from WARNING on.")
        return
    total = sum(said.count for said in logs.said)
    most = max(logs.said, key=lambda said: said.count)
    message = shortened(str(most.first.first.fields.get("message", "")).split("\n")[0], 160)
    often = f"Most often, {most.count:,} times," if most.count > 1 else "The first,"
    noun = "rank" if most.rank_bits.bit_count() == 1 else "ranks"
    yield Finding(
        "note",
        f"{_count(total, 'warning')} of {_count(len(logs.said), 'kind')}",
        f"{often} on {noun} {ranks_text(most.rank_bits)}: {message}",
    )


def _begin(text: str) -> str:
    return text[:1].upper() + text[1:]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
