"""A thread that works when it is woken, so that the caller need not wait for the disk, the network or a terminal."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable

Work = Callable[[bool], float | None]


class Background:
    """Calls `work` on a thread of its own.

    Args:
        work: does all that waits now; its argument says whether to hold nothing back for later. Gives the seconds
            after which it wants to be called again, or None.
        pause_seconds: between being woken and working, so that many records cost one wake.
    """

    def __init__(self, name: str, work: Work, pause_seconds: float = 0.0) -> None:
        self._name = name
        self._work = work
        self._pause_seconds = pause_seconds
        self.reset()

    def reset(self) -> None:
        """Forget a thread that a fork has left behind in the parent.

        Ranks: local.
        """
        self._lock = threading.Lock()
        # Unlike an event, a bell that a signal handler or a destructor rings while this thread rings it does not hang.
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_rung = False
        self._hurried = threading.Event()
        self._asked: deque[threading.Event] = deque()
        self._thread: threading.Thread | None = None
        self._is_ended = False

    def wake(self) -> None:
        """Have the work done soon.

        Ranks: local.
        """
        if not self._is_rung:
            self._is_rung = True
            self._bell.put(None)
            if self._thread is None:
                self._start()

    def finish(self, timeout_seconds: float) -> bool:
        """Have all work done now, with nothing held back.

        Returns:
            False where it did not end in time: a terminal that is stopped, say.
        Ranks: local.
        """
        if self._thread is None or not self._thread.is_alive():
            self._work(True)
            return True
        if self.is_current():
            return False
        done = threading.Event()
        self._asked.append(done)
        self._hurried.set()
        self._bell.put(None)
        return done.wait(timeout_seconds)

    def end(self, timeout_seconds: float) -> bool:
        """Finish, and end the thread.

        Ranks: local.
        """
        is_done = self.finish(timeout_seconds)
        self._is_ended = True
        self._bell.put(None)
        self._hurried.set()
        if self._thread is not None and not self.is_current():
            self._thread.join(timeout_seconds if is_done else 0.0)
        return is_done

    def is_current(self) -> bool:
        """Whether the caller runs on this thread.

        Ranks: local.
        """
        return self._thread is threading.current_thread()

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None or self._is_ended:
                return
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                self._thread.start()
                return
            except RuntimeError:
                # None can start while the interpreter ends, or while the system has too many.
                self._thread = None
        # Without the lock, and still as if rung: work that wakes this again only leaves more for the next wake.
        try:
            self._work(True)
        except Exception:
            pass  # as on the thread: the next records may fare better
        finally:
            self._is_rung = False

    def _run(self) -> None:
        delay = None
        while not self._is_ended:
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=delay)
                if self._pause_seconds:
                    self._hurried.wait(self._pause_seconds)
            self._is_rung = False
            self._hurried.clear()
            asked = [self._asked.popleft() for _ in range(len(self._asked))]
            try:
                delay = self._work(bool(asked))
            except Exception:
                delay = 1.0  # the next records may fare better, and nobody is there to catch it
            finally:
                for done in asked:
                    done.set()
