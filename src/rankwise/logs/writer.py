"""The rank's file, written behind the caller's back below WARNING and before its eyes from there on."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from pathlib import Path

from rankwise.logs.background import Background
from rankwise.logs.files import LinesFile, say_on_stderr
from rankwise.logs.record import Form, Item, notice, safe_text

PAUSE_SECONDS = 0.1
"""How long records wait to be written together; well under the half second that is promised."""
MAX_WAITING = 50_000
MAX_WAITING_CHARACTERS = 64 << 20


class FileWriter:
    """Puts items into a file in the order in which they came.

    WARNING and above is in the file when `put` returns. Below it, `put` only appends to a queue, and drops its oldest
    item where the disk does not keep up; how many are missing is written in their place.
    """

    def __init__(self, path: Path, form: Form, max_bytes: int, num_backups: int | None) -> None:
        self.path = path
        self._form = form
        self._limits = (max_bytes, num_backups)
        self._background = Background("rankwise-logs", self._work, PAUSE_SECONDS)
        self._queue: deque[Item] = deque()
        self._file: LinesFile | None = None
        # Taken again by a signal handler or a destructor that logs while this thread writes.
        self._file_lock = threading.RLock()
        self._count_lock = threading.RLock()
        self._clear()

    def open(self) -> None:
        """Open the file now.

        Raises:
            OSError: it cannot be opened.
        Ranks: local.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = LinesFile(self.path, *self._limits)

    def put(self, item: Item) -> None:
        """Take an item for the file.

        Ranks: local.
        """
        if item.level_number >= logging.WARNING:
            self.flush(item)
            return
        self._queue.append(item)
        self._num_characters += len(item.message)
        if len(self._queue) > MAX_WAITING or self._num_characters > MAX_WAITING_CHARACTERS:
            self._drop_oldest()
        self._background.wake()

    def flush(self, last: Item | None = None) -> None:
        """Write all that waits, and then `last`.

        Ranks: local; it waits for the disk.
        """
        with self._file_lock:
            items = self._take()
            if last is not None:
                items.append(last)
            try:
                if items and self._can_write(len(items)):
                    self._write(items)
            except Exception as error:
                # A log call is no place where training may end.
                self._num_overflown += len(items)
                say_on_stderr(f"rankwise: cannot write {self.path} ({type(error).__name__}: {safe_text(error)})")

    def close(self) -> None:
        """Write all that waits, close the file, and say how many records it lacks.

        Ranks: local.
        """
        self._background.end(timeout_seconds=2.0)
        self.flush()
        with self._file_lock:
            if self._file is not None:
                self._file.close()
            if num_missing := self._num_missing():
                say_on_stderr(f"rankwise: {num_missing} log records are missing in {self.path}")
            self._clear()
            self._cannot_open = True

    def move_to(self, path: Path) -> None:
        """Write into another file, opened with the first record: this process is a fork of the one that began.

        Ranks: local.
        """
        # Not written out: what waits is written by the parent, which has it too. Locks may be held by its threads.
        if self._file is not None:
            self._file.close()
        self.path = path
        self._background.reset()
        self._file_lock, self._count_lock = threading.RLock(), threading.RLock()
        self._clear()

    def _clear(self) -> None:
        self._queue.clear()
        self._num_characters = 0
        self._num_overflown = 0
        self._num_noted = 0
        self._file = None
        self._cannot_open = False

    def _work(self, is_final: bool) -> None:
        self.flush()

    def _take(self) -> list[Item]:
        items = []
        # No more than are there now: other threads go on adding, and dropping.
        with contextlib.suppress(IndexError):
            for _ in range(len(self._queue)):
                items.append(self._queue.popleft())
        self._num_characters = 0
        return items

    def _write(self, items: list[Item]) -> None:
        assert self._file is not None, "opened before"
        if (num_missing := self._num_missing()) > self._num_noted:
            words = f"{num_missing - self._num_noted} log records are missing here"
            # Not counted where it cannot be written either.
            num_dropped = self._file.num_dropped
            if self._file.write([self._form.line(notice(words))]):
                self._num_noted = num_missing
            self._file.num_dropped = num_dropped
        self._file.write([line for item in items if (line := self._line(item)) is not None])

    def _line(self, item: Item) -> bytes | None:
        """The item's line, or one that says why there is none; None, and counted, where not even that can be formed."""
        try:
            return self._form.line(item)
        except Exception as error:
            words = f"a record of {item.logger} cannot be written ({type(error).__name__}: {safe_text(error)})"
        try:
            return self._form.line(notice(words))
        except Exception:
            self._num_overflown += 1
            return None

    def _num_missing(self) -> int:
        return self._num_overflown + (self._file.num_dropped if self._file is not None else 0)

    def _can_write(self, num_items: int) -> bool:
        if self._file is None and not self._cannot_open:
            try:
                self.open()
            except OSError as error:
                self._cannot_open = True
                say_on_stderr(f"rankwise: cannot write {self.path} ({error}); the run goes on without it")
        if self._file is None:
            self._num_overflown += num_items
        return self._file is not None

    def _drop_oldest(self) -> None:
        with self._count_lock, contextlib.suppress(IndexError):
            while len(self._queue) > MAX_WAITING or self._num_characters > MAX_WAITING_CHARACTERS:
                self._num_characters -= len(self._queue.popleft().message)
                self._num_overflown += 1
