"""One daemon thread that does one thing after the other, and does not keep the program from ending."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future


class Worker:
    """A thread for work that must come in order.

    Unlike an executor's, it is no reason for Python to wait at the end: a save that waits for a rank that is gone
    would hold up a program that has failed. Whoever wants the work done waits for it.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], None]) -> Future[None]:
        """Have `task` done after all that came before it.

        Ranks: local.
        """
        future: Future[None] = Future()
        self._queue.put((task, future))
        return future

    def close(self) -> None:
        """Let the thread end after what it has; does not wait for it.

        Ranks: local.
        """
        self._queue.put(None)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            task, future = job
            try:
                task()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
            del job, task, future  # or the state that was saved would stay until the next
