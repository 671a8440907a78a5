"""Who speaks where the main process is the one that hangs: nobody can reach the others through it then.

Each rank that is stuck sees that the main process has not beaten for a while. They agree on one of them by a file in
the run directory that only one can make; without a run directory it is rank 1.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rankwise.monitor.blame import Hang, Row, in_words, with_facts
from rankwise.monitor.peers import look_at_process
from rankwise.monitor.testimony import Order, failure_of, within
from rankwise.monitor.voice import Voice
from rankwise.store import machine
from rankwise.telemetry import Event

_TURN_SECONDS = 0.3
"""A rank gives each of those before it so long to speak first."""

_MAX_BEFORE = 10
_CLAIM_SECONDS = 3.0


class StandIn:
    """What a rank other than the main process does while that one is silent."""

    def __init__(self, voice: Voice) -> None:
        self._voice = voice
        self._session = voice.session
        self._machine = machine()
        self._main: tuple[Row, float] | None = None
        self._suspected: float | None = None
        self._has_acted = False
        self._told: tuple[Event, float] | None = None
        self._num_hangs = 0

    def hear(self, row: Row) -> bool:
        """A beat of the main process; True for the first."""
        is_new = self._main is None
        self._main = row, time.monotonic()
        return is_new

    def wake(self, now: float) -> None:
        """Nobody could be heard for a while, and that was this process's own doing."""
        self._suspected = None
        if self._main is not None:
            self._main = self._main[0], now

    def turn(self, now: float, own: Row) -> None:
        """Look whether this rank has to speak."""
        if self._main is None:
            return
        main, heard = self._main
        silence = now - heard
        if silence <= self._voice.silence_seconds:
            self._suspected = None
            if self._has_acted:
                self._end_hang(now, own)
            return
        main = replace(main, idle_seconds=main.idle_seconds + silence, silent=not main.left)
        if self._has_acted or own.left or not own.is_over or own.at_prompt or not (main.is_over or main.left):
            return
        if main.machine == self._machine:
            main = with_facts(main, look_at_process(main.pid, main.started))
        if main.is_held or self._session.first_failure(0.0) is not None:
            return
        if self._suspected is None:
            self._suspected = now
        if now - self._suspected >= _TURN_SECONDS * min(own.rank, _MAX_BEFORE):
            self._has_acted = True
            threading.Thread(target=self._speak, args=(main, own), name="rankwise-standin", daemon=True).start()

    def _end_hang(self, now: float, own: Row) -> None:
        """The main process is back: whoever told of the hang tells that too."""
        self._has_acted = False
        self._voice.over()
        told, self._told = self._told, None
        if told is not None:
            event, begin = told
            message = f"rank 0 goes on after {event.details['idle_seconds'] + now - begin:.0f} s without progress"
            self._voice.tell(Event("hang_over", time.time(), own.step, message, ranks=(0,)))

    def _speak(self, main: Row, own: Row) -> None:
        """Agree on who speaks, and do this rank's part."""
        self._num_hangs += 1
        wanted = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-rank-{own.rank}"
        folder, run_dir = None, self._session.run_dir
        if run_dir is not None:
            path = run_dir / "hangs" / f".speaker-{self._session.token}-{self._num_hangs}"
            folder = within(_CLAIM_SECONDS, lambda: _claim(path, wanted), "rankwise-standin-claim")
        speaks = folder == wanted if folder is not None else own.rank == 1
        stacks = str(run_dir / "hangs" / folder) if run_dir is not None and folder is not None else None
        # Where the main process has left in good order, a rank that works has only itself to wait for.
        cause = own if main.left and not own.waits else main
        hang = Hang((cause,), () if cause is own else (own,))
        message = in_words(hang, stacks, witness=None if cause is own else own)
        event = Event(
            "hang",
            time.time(),
            own.step,
            message if speaks else "",
            ranks=(cause.rank,),
            phase=cause.phase,
            details={"folder": folder, "idle_seconds": round(hang.idle_seconds, 3), "causes": [asdict(cause)]},
        )
        deaf: dict[str, Any] = {}
        if main.machine == self._machine:
            deaf["0"] = {"reporter": own.rank, "pid": main.pid, "started": main.started, "left": main.left}
        order = Order(
            self._num_hangs,
            folder,
            (cause.rank,),
            end=self._voice.ends,
            failure=asdict(failure_of(cause, stacks)),
            deaf=deaf,
            alone=True,
        )
        self._told = (event, time.monotonic()) if speaks else None
        self._voice.declare(event, order, say=speaks)


def _claim(path: Path, content: str) -> str:
    """What the one who came first has written there, which may be this rank."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    staged.write_text(content)
    try:
        # Linked into place: it appears with its content, and for one rank only, also on a network file system.
        with contextlib.suppress(FileExistsError):
            os.link(staged, path)
    finally:
        staged.unlink()
    return path.read_text()
