"""A rank's lines in `monitor/` and `events/` of the run directory."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from rankwise import telemetry
from rankwise.logs import get_logger
from rankwise.monitor.metrics import append_bytes, end_last_line
from rankwise.monitor.phases import FinishedStep
from rankwise.telemetry import Event, Line, Steps

logger = get_logger(__name__)


class Recorder:
    """Appends lines, whole or not at all; what the disk refuses is dropped, and the log says so once.

    Args:
        run_dir: None: nothing is written.
    Ranks: local; each rank has files of its own.
    """

    def __init__(self, run_dir: Path | None, rank: int) -> None:
        self._lines = None if run_dir is None else telemetry.monitor_path(run_dir, rank)
        self._events = None if run_dir is None else telemetry.events_path(run_dir, rank)
        self._ready: set[Path] = set()
        self._is_told = False
        # Events come from several threads, and may be told while a line is written.
        self._lock = threading.Lock()

    def write(self, lines: Iterable[Line]) -> None:
        """Add lines about this rank.

        Ranks: local.
        """
        self._append(self._lines, [telemetry.to_json(line) for line in lines])

    def event(self, event: Event) -> None:
        """Add an event.

        Ranks: local; from any thread.
        """
        self._append(self._events, [telemetry.to_json(event)])

    def _append(self, path: Path | None, lines: list[str]) -> None:
        if path is None or not lines:
            return
        with self._lock:
            try:
                if path not in self._ready:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    end_last_line(path)
                    self._ready.add(path)
                append_bytes(path, "".join(f"{line}\n" for line in lines).encode())
                return
            except OSError as error:
                reason = f"{path}: {error.strerror or error}"
        if not self._is_told:
            self._is_told = True
            logger.warning("what the monitor writes is no longer complete: %s. Training goes on.", reason)


def batches(steps: Iterable[FinishedStep]) -> list[Steps]:
    """The steps as lines hold them: a new batch where a number is left out or comes again.

    Ranks: local.
    """
    runs: list[list[FinishedStep]] = []
    for step in steps:
        if runs and runs[-1][-1].number + 1 == step.number:
            runs[-1].append(step)
        else:
            runs.append([step])
    return [_batch(run) for run in runs]


def _batch(run: list[FinishedStep]) -> Steps:
    names = dict.fromkeys(name for step in run for name in step.phases)
    # A phase that a step did not come to took no time of it.
    phases = {name: [step.phases.get(name, 0.0) for step in run] for name in names}
    return Steps(run[0].number, [step.seconds for step in run], phases)
