"""Trackers behind a thread of their own: whatever they do, training goes on at its own speed."""

from __future__ import annotations

import functools
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import RankwiseError
from rankwise.logs import get_logger
from rankwise.redact import redact

logger = get_logger(__name__)

MAX_WAITING = 10_000
"""Steps that wait for a tracker at most: some 10 MB."""
MAX_IMAGES_WAITING = 8
CLOSE_SECONDS = 5.0
RETRY_SECONDS = 60.0
MAX_RETRY_SECONDS = 600.0

_MAX_REASON_LENGTH = 300


class Tracker:
    """Takes a run's numbers to some other place. A subclass says how; all its methods are called on one thread."""

    name = "tracker"
    """For people and for the thread's name."""
    package: str | None = None
    """What must be installed."""
    distribution: str | None = None
    """What pip installs for it, where that has another name."""

    def open(self) -> None:
        """Connect. It is called again later if it raises."""

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Pass on the values of one step.

        Args:
            seconds: since 1970, when they were logged; this call may come later.
        """
        raise NotImplementedError

    def image(self, step: int, name: str, pixels: NDArray[np.uint8], seconds: float) -> None:
        """Pass on a picture, `h w c`; trackers that show none leave this out."""

    def close(self, *, failed: bool) -> None:
        """Say that the run is over.

        Args:
            failed: whether by an exception.
        """


class Guarded:
    """A tracker that neither slows nor ends the training, even if it hangs, raises or its server is away.

    What it does not take is dropped and counted, and the log says so: once when it begins, and once at the end.

    Args:
        max_waiting: steps that wait for it at most; more are dropped.
        close_seconds: what it gets at the end for what still waits.
        retry_seconds: after which it is opened again where that failed; then twice that, and so on.
    Raises:
        RankwiseError: its package is not installed.
    Ranks: main process only.
    """

    def __init__(
        self,
        tracker: Tracker,
        *,
        max_waiting: int = MAX_WAITING,
        close_seconds: float = CLOSE_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        _require_installed(tracker)
        self._tracker = tracker
        self._max_waiting = max_waiting
        self._close_seconds = close_seconds
        self._retry_seconds = retry_seconds
        # Putting into a SimpleQueue never waits, not even in a signal handler that interrupts another put.
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_closing = threading.Event()
        self._deadline = 0.0
        self._run_failed = False
        self._is_told = False
        # Each is written by one thread only: the training's, and the tracker's.
        self._num_dropped = 0
        self._num_images_put = 0
        self._num_images_taken = 0
        self._num_lost = 0
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run, name=f"rankwise-{tracker.name}", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as error:
            self._thread = None
            logger.warning(f"nothing goes to {tracker.name}: {_reason(error)}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over the values of one step; returns at once.

        Ranks: main process only.
        """
        self._put(functools.partial(self._tracker.log, step, dict(values), time.time()))

    def image(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """Hand over a picture, `h w c`; returns at once. Few may wait, since they are large.

        Ranks: main process only.
        """
        self._put(functools.partial(self._image, step, name, pixels, time.time()), is_image=True)

    def stop(self, *, failed: bool = False) -> None:
        """Take nothing more, and let the tracker finish; returns at once. Closing counts its time from here on.

        Args:
            failed: whether the run ends by an exception.
        Ranks: main process only.
        """
        if self._thread is not None and not self._is_closing.is_set():
            self._run_failed = failed
            self._deadline = time.monotonic() + self._close_seconds
            self._is_closing.set()
            self._waiting.put(None)

    def close(self, *, failed: bool = False) -> None:
        """Let the tracker take what waits, a few seconds at most; what it does after that, nobody waits for.

        Ranks: main process only.
        """
        self.stop(failed=failed)
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        thread.join(max(self._deadline - time.monotonic(), 0.0))
        num_missing = self._num_dropped + self._num_lost
        if thread.is_alive():
            num_missing += max(self._waiting.qsize() - 1, 0)
            logger.warning(
                f"{self._tracker.name} did not finish within {self._close_seconds:g} s and is left alone"
                + (f"; {num_missing} entries have not reached it" if num_missing else "")
            )
        elif num_missing:
            logger.warning(f"{num_missing} entries have not reached {self._tracker.name}")

    def _put(self, work: Callable[[], None], *, is_image: bool = False) -> None:
        if self._thread is None or self._is_closing.is_set():
            return
        has_room = self._waiting.qsize() < self._max_waiting
        if is_image:
            has_room = has_room and self._num_images_put - self._num_images_taken < MAX_IMAGES_WAITING
            self._num_images_put += has_room
        if has_room:
            self._waiting.put(work)
            return
        self._num_dropped += 1
        if self._num_dropped == 1:
            logger.warning(f"{self._tracker.name} does not keep up: from now on entries are dropped")

    def _image(self, step: int, name: str, pixels: NDArray[np.uint8], seconds: float) -> None:
        self._num_images_taken += 1
        self._tracker.image(step, name, pixels, seconds)

    def _run(self) -> None:
        is_open = self._open()
        while (work := self._waiting.get()) is not None:
            if not is_open:
                self._num_lost += 1
                continue
            try:
                work()
            except BaseException as error:  # SystemExit too: libraries have been seen to exit for the program
                self._num_lost += 1
                self._tell("takes not all values", error)
        if is_open:
            try:
                self._tracker.close(failed=self._run_failed)
            except BaseException as error:
                self._tell("was not closed", error)

    def _open(self) -> bool:
        """Whether it is open; tries until the run ends."""
        pause_seconds = self._retry_seconds
        while True:
            try:
                self._tracker.open()
                return True
            except BaseException as error:
                self._tell("cannot be used yet", error)
            if self._is_closing.wait(pause_seconds):
                return False
            pause_seconds = min(2 * pause_seconds, MAX_RETRY_SECONDS)

    def _tell(self, what: str, error: BaseException) -> None:
        if not self._is_told:
            self._is_told = True
            logger.warning(f"{self._tracker.name} {what}, and training goes on: {_reason(error)}")


def close_all(trackers: Sequence[Guarded], *, failed: bool = False) -> None:
    """Close them at the same time: several that hang take no longer than one.

    Ranks: main process only.
    """
    for tracker in trackers:
        tracker.stop(failed=failed)
    for tracker in trackers:
        tracker.close()


def _reason(error: BaseException) -> str:
    """The first line of an error, with its kind."""
    text = str(error).strip()
    first = redact(text.splitlines()[0])[:_MAX_REASON_LENGTH] if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _require_installed(tracker: Tracker) -> None:
    if tracker.package is None or importlib.util.find_spec(tracker.package) is not None:
        return
    raise RankwiseError(
        f"{tracker.name} was asked for, and the package {tracker.package} is not installed. Install it "
        f"(pip install {tracker.distribution or tracker.package}), or leave the tracker out."
    )
