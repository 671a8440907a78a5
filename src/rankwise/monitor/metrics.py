"""The losses and quality of a run by step: `metrics/rank-00000.jsonl`, one JSON object a line."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.logs import get_logger

logger = get_logger(__name__)

_OUR_NAMES = ("step", "time")


class MetricsFile:
    """Adds lines of values to a run's metrics; what cannot be written is dropped, and the log says so once.

    A resumed run appends: where the file holds a step twice, the later line counts.

    Args:
        first_step: the step that this session begins at: 0 for a fresh run, which sets aside the lines of an earlier
            one. None: they are set aside where the first step that is written is not above their first.
    Ranks: main process only.
    """

    def __init__(self, run_dir: Path, first_step: int | None = None) -> None:
        self._path = run_dir / "metrics" / "rank-00000.jsonl"
        self._is_told = False
        self._first_step = first_step
        self._is_ready = False
        if first_step is not None:
            self._prepare(is_fresh=first_step == 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the values of one step; those that are no finite numbers are null.

        Ranks: main process only.
        """
        if not self._is_ready:
            # All that the earlier lines hold is made again: they are of another run.
            self._prepare(is_fresh=step <= _first_logged_step(self._path))
        row = {"step": step, "time": time.time(), **values}
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        try:
            append_line(self._path, json.dumps(finite, allow_nan=False))
        except OSError as error:
            self._tell(error)

    def _prepare(self, *, is_fresh: bool) -> None:
        self._is_ready = True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if is_fresh:
                _set_aside(self._path)
            end_last_line(self._path)
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._is_told:
            logger.warning(f"metrics are no longer complete: {error}")
        self._is_told = True


def plain_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values as Python's numbers: tensors, numpy's and whatever else `float` takes.

    Raises:
        RankwiseError: one of them is no number, or has a name that every line has already.
    Ranks: local.
    """
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if name in _OUR_NAMES:
            raise RankwiseError(f"A value is called {name!r}, which every line of metrics has already. Rename it.")
        if isinstance(value, int | float):
            numbers[name] = value
            continue
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise RankwiseError(
                f"The value {name!r} is a {type(value).__name__} that is no single number ({error}). Give a float."
            ) from error
    return numbers


def append_line(path: Path, line: str) -> None:
    """Add one line to a file, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there is unchanged.
    Ranks: local; no two ranks may write one path.
    """
    append_bytes(path, (line + "\n").encode())


def append_bytes(path: Path, content: bytes) -> None:
    """Add to a file, all or nothing.

    Raises:
        OSError: it cannot be written; what was there is unchanged.
    Ranks: local; no two ranks may write one path.
    """
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def end_last_line(path: Path) -> None:
    """End the half line that a killed run may have left; what follows must not be glued to it.

    Raises:
        OSError: the file cannot be read or written.
    Ranks: local; no two ranks may write one path.
    """
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as lines:
            lines.seek(-1, os.SEEK_END)
            if lines.read() != b"\n":
                lines.write(b"\n")


def _set_aside(path: Path) -> None:
    """Keep the lines of an earlier run, but not among those of this one."""
    if path.exists() and path.stat().st_size:
        numbers = (number for number in itertools.count(1) if not path.with_suffix(f".jsonl.{number}").exists())
        path.rename(path.with_suffix(f".jsonl.{next(numbers)}"))


def _first_logged_step(path: Path) -> float:
    """Of the file's first whole line; below all steps where there is none."""
    try:
        with path.open("rb") as lines:
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):
                    return int(json.loads(line)["step"])
    except OSError:
        pass
    return -math.inf
