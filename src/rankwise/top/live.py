"""The table while it lives: one thread looks at the run, the main thread draws and takes keys."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from rankwise.top.frame import View
from rankwise.top.rows import Snapshot
from rankwise.top.terminal import Terminal

_IDLE_SECONDS = 60.0
_SWITCH_SECONDS = 0.0005


class Looker:
    """Looks again and again, in a thread: a slow file system must not hold the keys up.

    Args:
        look: makes a snapshot.
        wake: called when there is a new one, or an error.
    """

    def __init__(self, look: Callable[[], Snapshot], interval_seconds: float, wake: Callable[[], None]) -> None:
        self._look, self._interval_seconds, self._wake = look, interval_seconds, wake
        self._newest: Snapshot | None = None
        self._error: BaseException | None = None
        self._over = threading.Event()
        # A daemon: a file system that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="rankwise-top", daemon=True)
        self._thread.start()

    def take(self) -> Snapshot | None:
        """The newest snapshot, if it was not taken yet.

        Raises:
            BaseException: what the look raised.
        """
        if self._error is not None:
            raise self._error
        found, self._newest = self._newest, None
        return found

    def close(self) -> None:
        """End the thread, unless it hangs in a look."""
        self._over.set()
        self._thread.join(timeout=0.5)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self._newest = self._look()
            except BaseException as error:
                self._error = error
                self._wake()
                return
            self._wake()
            self._over.wait(self._interval_seconds)


def run(look: Callable[[], Snapshot], view: View, interval_seconds: float) -> None:
    """Show the run until the person leaves, or the terminal is gone.

    Raises:
        RankwiseError: the run directory is gone.
        KeyboardInterrupt: Ctrl-C.
    Ranks: local; main thread.
    """
    before = sys.getswitchinterval()
    # A key must not wait while the other thread reads ten thousand files: it lets go of the interpreter sooner.
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        _run(look, view, interval_seconds)
    finally:
        sys.setswitchinterval(before)


def _run(look: Callable[[], Snapshot], view: View, interval_seconds: float) -> None:
    with Terminal() as terminal:
        looker = Looker(look, interval_seconds, terminal.wake)
        try:
            while not view.is_done:
                size = terminal.size()
                terminal.draw(view.frame(size.columns, size.lines))
                try:
                    keys = terminal.keys(_IDLE_SECONDS)
                except EOFError:
                    return
                for key in keys:
                    view.press(key)
                snapshot = looker.take()
                if snapshot is not None:
                    view.show(snapshot)
        finally:
            looker.close()
