"""The main process's part of the watchdog: what every rank said last, and what follows from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from rankwise.group import tell_main, tell_others
from rankwise.monitor.blame import Hang, Row, find_hang, in_words, with_facts
from rankwise.monitor.peers import look_at_process
from rankwise.monitor.testimony import Order, failure_of
from rankwise.monitor.voice import TOPIC, Voice
from rankwise.telemetry import Event


class Judge:
    """On the main process: what every rank said last, and what follows from it."""

    def __init__(self, voice: Voice) -> None:
        self._voice = voice
        self._world_size = voice.session.identity.world_size
        self._rows: dict[int, tuple[Row, float]] = {}
        self._facts: dict[int, dict[str, Any]] = {}
        self._suspected: float | None = None
        self._declared: tuple[Hang, float] | None = None
        self._num_hangs = 0

    def hear(self, rank: int, content: Mapping[str, Any]) -> bool:
        """A beat of another rank, or what it found out about one of its host; True for the first beat."""
        is_new = "beat" in content and rank not in self._rows
        if "beat" in content:
            self._rows[rank] = (Row(**content["beat"]), time.monotonic())
        elif "facts" in content:
            self._facts.update({int(about): facts for about, facts in content["facts"].items()})
        return is_new

    def wake(self, now: float) -> None:
        """Nobody could be heard for a while, and that was this process's own doing."""
        self._rows = {rank: (row, now) for rank, (row, _) in self._rows.items()}
        self._suspected = None

    def turn(self, now: float, own: Row) -> None:
        """Look at all ranks once."""
        self._rows[own.rank] = (own, now)
        if self._declared is not None:
            self._look_for_end(now, *self._declared)
            return
        rows = self._rows_at(now)
        hang = find_hang(rows, self._absent())
        if hang is None or self._voice.session.first_failure(0.0) is not None:
            self._suspected = None
        elif self._suspected is None:
            self._suspected, self._facts = now, {}
            self._ask_peers(rows, own)
        elif now - self._suspected > self._voice.silence_seconds or not self._is_waiting_for_facts(rows):
            self._declare(now, hang, rows, own)

    def _rows_at(self, now: float) -> list[Row]:
        found = []
        for rank, (row, heard) in list(self._rows.items()):
            silence = now - heard
            is_deaf = silence > self._voice.silence_seconds and not row.left
            row = replace(row, idle_seconds=row.idle_seconds + silence, silent=is_deaf)
            found.append(with_facts(row, self._facts.get(rank) if is_deaf else None))
        return found

    def _absent(self) -> list[int]:
        if len(self._rows) == self._world_size:
            return []
        return [rank for rank in range(self._world_size) if rank not in self._rows]

    def _deaf(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """By rank those that cannot speak, each with the lowest rank of its machine that can."""
        speaking: dict[str, int] = {}
        for row in sorted(rows, key=lambda row: row.rank):
            if not row.silent:
                speaking.setdefault(row.machine, row.rank)
        return {
            str(row.rank): {"reporter": speaking.get(row.machine), "pid": row.pid, "started": row.started}
            for row in rows
            if row.silent
        }

    def _ask_peers(self, rows: list[Row], own: Row) -> None:
        asked = {rank: told | {"rank": int(rank)} for rank, told in self._deaf(rows).items()}
        if any(told["reporter"] not in (None, own.rank) for told in asked.values()):
            tell_others(TOPIC, {"look": asked})
        for told in asked.values():
            if told["reporter"] == own.rank:
                self._facts[told["rank"]] = look_at_process(told["pid"], told["started"])

    def _is_waiting_for_facts(self, rows: list[Row]) -> bool:
        return any(
            told["reporter"] is not None and int(rank) not in self._facts for rank, told in self._deaf(rows).items()
        )

    def _declare(self, now: float, hang: Hang, rows: list[Row], own: Row) -> None:
        self._num_hangs += 1
        self._declared, self._suspected = (hang, now), None
        run_dir = self._voice.session.run_dir
        folder = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ") if run_dir is not None else None
        stacks = None if run_dir is None else str(run_dir / "hangs" / str(folder))
        message = in_words(hang, stacks)
        first = hang.causes[0] if hang.causes else Row(hang.absent[0]) if hang.absent else hang.others[0]
        event = Event(
            "hang",
            time.time(),
            own.step,
            message,
            ranks=hang.ranks,
            phase=first.phase,
            details={
                "folder": folder,
                "idle_seconds": round(hang.idle_seconds, 3),
                "causes": [asdict(row) for row in hang.causes],
            },
        )
        order = Order(
            self._num_hangs,
            folder,
            tuple(hang.ranks),
            end=self._voice.ends,
            failure=asdict(failure_of(first, stacks)),
            deaf=self._deaf(rows),
        )
        if self._world_size > 1:
            tell_others(TOPIC, {"order": asdict(order)})
        self._voice.declare(event, order, say=False)

    def _look_for_end(self, now: float, hang: Hang, declared: float) -> None:
        watched = [row for row in hang.causes if not row.left] or list(hang.others)
        if not all(self._goes_on(row) for row in watched):
            return
        self._declared = None
        self._voice.over()
        if self._world_size > 1:
            tell_others(TOPIC, {"over": self._num_hangs})
        who = f"rank {', '.join(map(str, hang.ranks[:8]))}"
        seconds = hang.idle_seconds + now - declared
        message = f"{who} {'go' if len(hang.ranks) > 1 else 'goes'} on after {seconds:.0f} s without progress"
        step = max(row.step for row, _ in self._rows.values())
        self._voice.tell(Event("hang_over", time.time(), step, message, ranks=hang.ranks))

    def _goes_on(self, then: Row) -> bool:
        now = self._rows[then.rank][0]
        return now.left or now.number > then.number


def answer_look(rank: int, asked: Mapping[str, Mapping[str, Any]]) -> None:
    """Tell the main process what the system says of the silent ranks that this one is asked about, in the background.

    Ranks: local.
    """
    mine = [told for told in asked.values() if told["reporter"] == rank]
    if mine:
        threading.Thread(target=_look, args=(mine,), name="rankwise-hang-look", daemon=True).start()


def _look(asked: Sequence[Mapping[str, Any]]) -> None:
    facts = {str(told["rank"]): look_at_process(told["pid"], told["started"]) for told in asked}
    tell_main(TOPIC, {"facts": facts})
