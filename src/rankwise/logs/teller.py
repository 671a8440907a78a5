"""Tells people of records on a thread of its own: on the main process's console, or by sending them there."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from typing import Any

from rankwise.logs import screen, state
from rankwise.logs.background import Background
from rankwise.logs.files import say_on_stderr
from rankwise.logs.fold import Folder, Line, is_urgent
from rankwise.logs.record import Form, Item, notice

Told = Item | dict[str, Any]

MAX_WAITING = 20_000
END_SECONDS = 2.0


class Teller:
    """Shows what was put into it; on ranks other than the main process it sends it there first.

    Where nobody hears, a rank prints its own records itself, labelled.
    """

    def __init__(self, form: Form, *, rank: int, world_size: int) -> None:
        self._form = form
        self._rank = rank
        self._is_alone = world_size == 1 or rank != 0
        self._own_rank: int | None = 0 if rank == 0 else None
        self._background = Background("rankwise-console", self._work)
        self.reset()

    def reset(self) -> None:
        """Forget what waits, and the thread: after a fork both belong to the parent.

        Ranks: local.
        """
        # WARNING and above has a queue of its own, so that a flood of what is below displaces none of it.
        self._urgent: deque[tuple[int, Told]] = deque(maxlen=MAX_WAITING)
        self._plain: deque[tuple[int, Told]] = deque(maxlen=MAX_WAITING)
        self._numbers = itertools.count()
        self._num_overflown = 0
        self._folder = Folder(self._rank, is_alone=self._is_alone or state.is_worker)
        self._background.reset()

    def put(self, record: Told) -> None:
        """Take a record of this process, or one that another process has sent.

        Ranks: local.
        """
        queue = self._urgent if _is_urgent(record) else self._plain
        if len(queue) == MAX_WAITING:
            with contextlib.suppress(IndexError):
                self._num_overflown += _count(queue[0][1])
        queue.append((next(self._numbers), record))
        self._background.wake()

    def flush(self, timeout_seconds: float = END_SECONDS) -> bool:
        """Show all that waits; False where the terminal or the network did not take it in time.

        Ranks: local.
        """
        return self._background.finish(timeout_seconds)

    def close(self) -> None:
        """Flush, end the thread, and say how many records were not shown.

        Ranks: local.
        """
        self._background.end(END_SECONDS)
        if num_left := self._num_left():
            _say_soon(f"rankwise: {num_left:,} log records were not shown here in time")

    def is_current_thread(self) -> bool:
        """Whether the caller runs on this teller's thread: its own records are not told, or it would never end.

        Ranks: local.
        """
        return self._background.is_current()

    def _work(self, is_final: bool) -> float | None:
        while self._urgent or self._plain:
            with contextlib.suppress(IndexError):
                self._tell(self._older().popleft()[1])
        if self._num_overflown:
            told = self._form.told(notice("records that came faster than they could be shown"))
            told["count"], self._num_overflown = self._num_overflown, 0
            self._tell(told)
        now = time.monotonic()
        self._tell_lines(self._folder.flush(now) if is_final else self._folder.due(now))
        due = self._folder.next_due()
        return None if due is None else max(0.0, due - time.monotonic())

    def _num_left(self) -> int:
        waiting = sum(_count(record) for _, record in [*self._urgent.copy(), *self._plain.copy()])
        return waiting + self._num_overflown + self._folder.num_records()

    def _older(self) -> deque[tuple[int, Told]]:
        """The queue whose head came first, so that lines stand in the order in which they were said."""
        if self._urgent and self._plain:
            return self._urgent if self._urgent[0][0] < self._plain[0][0] else self._plain
        return self._urgent or self._plain

    def _tell(self, record: Told) -> None:
        told = self._form.told(record) if isinstance(record, Item) else record
        self._tell_lines(self._folder.add(told, time.monotonic()))

    def _tell_lines(self, lines: list[Line]) -> None:
        if self._rank != 0 or state.is_worker:
            lines = [line for line in lines if not _send(line.as_record())]
        with contextlib.suppress(Exception):
            screen.show(lines, self._own_rank)


def _count(record: Told) -> int:
    """For how many the record stands."""
    return 1 if isinstance(record, Item) else int(record.get("count", 1))


def _is_urgent(record: Told) -> bool:
    if isinstance(record, Item):
        return record.level_number >= logging.WARNING
    return is_urgent(str(record.get("level", "")))


def _say_soon(text: str) -> None:
    """Say it, but do not wait for a terminal that is stopped."""
    thread = threading.Thread(target=say_on_stderr, args=(text,), daemon=True)
    try:
        thread.start()
    except RuntimeError:
        say_on_stderr(text)  # no thread can start while the interpreter ends
    else:
        thread.join(1.0)


def _send(record: dict[str, Any]) -> bool:
    """Hand the record to whoever carries it to the main process; False where nobody does."""
    if state.send is None:
        return False
    try:
        return bool(state.send(record))
    except Exception:
        return False
