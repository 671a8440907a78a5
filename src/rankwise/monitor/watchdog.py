"""Hangs: every rank beats outside of the training thread and of process groups; whoever stops is named, once.

The main process judges. Where it is itself the one that hangs, another rank stands in: see `standin`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

from rankwise import lastwords, logs
from rankwise.group import at_session_end, listen, tell_main, tell_others
from rankwise.monitor.blame import Row
from rankwise.monitor.judge import Judge, answer_look
from rankwise.monitor.limits import Limits
from rankwise.monitor.metrics import append_bytes
from rankwise.monitor.peers import is_traced
from rankwise.monitor.position import Position
from rankwise.monitor.stacks import HeldTimer, look_at_thread, torch_collectives
from rankwise.monitor.standin import StandIn
from rankwise.monitor.testimony import Order, carry_out, held_path, within
from rankwise.monitor.voice import TOPIC
from rankwise.parent import start_time
from rankwise.session import Session
from rankwise.store import machine
from rankwise.telemetry import Event, events_path, to_json

BEAT_SECONDS = 1.0
BEATS_PER_SECOND = 1000
"""Of all ranks together: the main process reads them beside its own training."""

SILENCE_SECONDS = 5.0
"""Without a beat a rank is deaf: stopped, dead, or a thread of it holds the GIL."""

_TELL_SECONDS = 3.0
_SPARE_SECONDS = 10.0
_logger = logs.get_logger(__name__)
_running: Watchdog | None = None


class Watchdog:
    """This rank's heartbeat, and on the main process the judge of all.

    Args:
        position: where the training thread is; called from the watchdog's own thread.
        timeout_seconds: how long a rank may go without a sign of progress; None learns it, see `limits`.
        on_hang: `tell` who hangs, or tell it and `end` the job.
        tell: called with the events, in a thread of its own.
        use_held_timer: take the one timer of `faulthandler`, which writes the stacks even where the GIL is held.
    """

    def __init__(
        self,
        session: Session,
        position: Callable[[], Position],
        *,
        timeout_seconds: float | None,
        on_hang: Literal["tell", "end"],
        tell: Callable[[Event], None],
        use_held_timer: bool = True,
    ) -> None:
        identity = session.identity
        self._session = session
        self._position = position
        self._tell = tell
        self._ends = on_hang == "end"
        self._limits = Limits(timeout_seconds, session.timeout_seconds)
        least = self._limits.smallest_seconds
        self._turn_seconds = min(BEAT_SECONDS, least / 5)
        self._beat_seconds = max(self._turn_seconds, identity.world_size / BEATS_PER_SECOND)
        self._silence_seconds = max(3 * self._beat_seconds, min(SILENCE_SECONDS, least / 2))
        self._timer: HeldTimer | None = None
        if use_held_timer:
            # A process that is alone has nobody who would find the file and say so.
            is_file = session.run_dir is not None and identity.world_size > 1
            self._timer = HeldTimer(held_path(session.run_dir, identity.rank) if session.run_dir and is_file else None)
        self._about = Row(
            identity.rank,
            host=identity.hostname,
            device=str(session.device),
            pid=os.getpid(),
            started=start_time(os.getpid()),
            machine=machine(),
        )
        self._last = self._about
        self._judge = Judge(self) if identity.is_main_process else None
        self._stand_in = None if identity.is_main_process else StandIn(self)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._trained_by = threading.get_ident()
        self._left_at: Position | None = None
        self._seen: Position | None = None
        self._seen_idle = 0.0
        self._turned = self._awake = time.monotonic()
        self._beaten = 0.0
        self._counts_collectives = True
        self._in_hang: int | None = None
        self._is_ending = False
        self._forget: list[Callable[[], None]] = []

    @property
    def session(self) -> Session:
        """Whose ranks are watched."""
        return self._session

    @property
    def silence_seconds(self) -> float:
        """Without a beat for so long a rank is deaf."""
        return self._silence_seconds

    @property
    def ends(self) -> bool:
        """Whether a hang ends the job."""
        return self._ends

    def start(self) -> None:
        """Watch from now on; the calling thread is the one that trains.

        Ranks: local, on every rank.
        """
        global _running
        if _running is not None:
            _running.end()
        _running = self
        self._trained_by = threading.get_ident()
        self._turned = self._awake = time.monotonic()
        self._forget = [listen(TOPIC, self._hear), at_session_end(lambda failed: self.end())]
        self._last = self._row(self._turned)
        # Before the first step: a rank that stops in it must be known by then.
        self._beat(self._turned, self._last)
        self._thread = threading.Thread(target=self._run, name="rankwise-watchdog", daemon=True)
        self._thread.start()

    def finished(self, step: int, seconds: float, phases: Mapping[str, float] | None = None) -> None:
        """Learn from a finished step how long its phases take.

        Ranks: local.
        """
        self._limits.learn_step(seconds, phases or {})

    def close(self) -> None:
        """This rank leaves its loop in good order: it is watched no more, and answers those that still run.

        Ranks: local.
        """
        if self._left_at is not None or self._thread is None:
            return
        self._left_at = self._position()
        if self._session.identity.world_size == 1:
            self.end()
        else:
            self._beat(time.monotonic(), self._row(time.monotonic()))
        self._release()

    def end(self) -> None:
        """Stop everything.

        Ranks: local.
        """
        global _running
        self._stop.set()
        for forget in self._forget:
            forget()
        self._forget = []
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2.0)
        self._release()
        if _running is self:
            _running = None

    def declare(self, event: Event, order: Order, *, say: bool) -> None:
        """Tell of a hang, and do this rank's own part.

        Args:
            say: print the line here: the main process, whose console it is, does not answer.
        Ranks: local.
        """
        self._in_hang = order.number
        if say:
            _print(event.message)
            within(_TELL_SECONDS, lambda: self._keep(event), "rankwise-hang-keep")
        elif event.message:
            self.tell(event)
        self.obey(order)

    def _keep(self, event: Event) -> None:
        """Write an event that is on the console already: through the logs it would come there again, once they can."""
        _logger.warning("%s", event.message, extra=logs.FILE_ONLY)
        if self._session.run_dir is not None:
            path = events_path(self._session.run_dir, self._about.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            append_bytes(path, f"{to_json(event)}\n".encode())

    def tell(self, event: Event) -> None:
        """Hand an event over; the line is printed past the logs where they do not take it in time.

        Ranks: local.
        """
        told = within(_TELL_SECONDS, lambda: (self._tell(event), True), "rankwise-hang-tell")
        if told is None:
            _print(event.message)

    def obey(self, order: Order) -> None:
        """Do this rank's part in an order, in the background.

        Ranks: local.
        """
        self._in_hang = order.number
        self._is_ending = self._is_ending or order.end
        carry_out(order, self._session, self._last, self._stop.is_set, self._release)

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.close()

    def _run(self) -> None:
        while not self._stop.wait(self._turn_seconds):
            try:
                self._turn(time.monotonic())
            except Exception:
                _logger.exception("the watchdog stumbled, and goes on", extra=logs.FILE_ONLY)

    def _turn(self, now: float) -> None:
        if now - self._turned > self._turn_seconds + self._silence_seconds:
            # The whole process was asleep: stopped, or the machine was. What passed then says nothing of anybody.
            self._awake = now
            for watcher in (self._judge, self._stand_in):
                if watcher is not None:
                    watcher.wake(now)
        self._turned = now
        row = self._last = self._row(now)
        if self._timer is not None and self._left_at is None:
            self._wind(self._timer, row)
        if now - self._beaten >= 0.9 * self._beat_seconds:
            self._beat(now, row)
        if self._judge is not None:
            self._judge.turn(now, row)
        elif self._stand_in is not None:
            self._stand_in.turn(now, row)
        if self._ends and row.is_over and not (row.left or row.is_held or self._is_ending):
            self._end_after_failure()

    def _row(self, now: float) -> Row:
        """What this rank says of itself."""
        left = self._left_at
        at = left or self._position()
        idle = max(0.0, now - max(at.since, self._awake))
        if self._seen is not None and at.number != self._seen.number and self._in_hang is None:
            self._limits.note(self._seen.phase, self._seen_idle)
        self._seen, self._seen_idle = at, idle
        row = replace(self._about, step=at.step, phase=at.phase, collective=at.collective, number=at.number)
        limit = self._limits.of(at.phase)
        waits = at.collective is not None or at.phase == "communication"
        row = replace(row, idle_seconds=idle, limit_seconds=limit, waits=waits, left=left is not None)
        if left is not None or idle < limit / 2:
            return row
        look = look_at_thread(self._trained_by)
        held = look.at_prompt or is_traced()
        enqueued = self._num_collectives()
        return replace(row, where=look.where, waits=waits or look.waits, at_prompt=held, enqueued=enqueued)

    def _num_collectives(self) -> int:
        if not self._counts_collectives:
            return 0
        told = within(0.2, torch_collectives, "rankwise-hang-torch")
        self._counts_collectives = bool(told)
        return int((told or {}).get("enqueued", 0))

    def _wind(self, timer: HeldTimer, row: Row) -> None:
        """The timer goes off only if this thread does not come by any more: it then has no GIL."""
        if self._ends and self._session.identity.local_world_size == 1:
            # Nobody else of this host can end it. Late, so that it is told first.
            timer.wind(row.limit_seconds + _SPARE_SECONDS, end=True)
        elif self._session.identity.world_size == 1:
            timer.wind(row.limit_seconds)
        else:
            # The file is found by others when they miss this one, so it may come early.
            timer.wind(0.9 * self._limits.smallest_seconds)

    def _beat(self, now: float, row: Row) -> None:
        self._beaten = now
        told = asdict(row)
        if self._judge is None:
            tell_main(TOPIC, {"beat": told})
        elif self._session.identity.world_size > 1:
            tell_others(TOPIC, {"main": told})

    def _hear(self, rank: int, content: Any) -> None:
        """In the lifeline's thread. Whoever hears of another for the first time answers: it may have started later."""
        if self._judge is not None:
            if self._judge.hear(rank, content):
                self._answer()
        elif "main" in content and self._stand_in is not None:
            if self._stand_in.hear(Row(**content["main"])):
                self._answer()
        elif "look" in content:
            answer_look(self._about.rank, content["look"])
        elif "order" in content:
            self.obey(Order.of(content["order"]))
        elif "over" in content:
            self._in_hang = None

    def _answer(self) -> None:
        now = time.monotonic()
        if now - self._beaten > self._turn_seconds / 10:
            self._beat(now, self._last)
        else:
            self._beaten = 0.0  # at the next turn: a thousand that start at once are answered once

    def over(self) -> None:
        """The hang is over: what is seen from now on may be learned from.

        Ranks: local.
        """
        self._in_hang = None

    def _end_after_failure(self) -> None:
        """Another rank has failed, which all know, and this one is stuck, maybe in an accelerator's collective."""
        failure = self._session.first_failure(0.0)
        if failure is not None:
            self.obey(Order(0, "after-failure", (), end=True, failure=asdict(failure), alone=True))


def _print(message: str) -> None:
    within(_TELL_SECONDS, lambda: lastwords.print_words(f"rankwise: {message}"), "rankwise-hang-print")
