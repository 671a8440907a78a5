"""A whole run directory: the small files at once, the ranks' histories one after another."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.checkpoint.manifest import read_manifest
from rankwise.errors import CheckpointCorruptError, RankwiseError
from rankwise.runreader.history import RankHistory, read_history
from rankwise.telemetry import Event, event_from_json, is_finite, is_step, monitor_path

PARTS = ("run.json", "monitor", "events", "metrics", "logs", "checkpoints")
"""Of these a run directory has at least one."""

_RANK_FILE = re.compile(r"rank-(\d{5,7})\.jsonl", re.ASCII)
_STEP_FOLDER = re.compile(r"step-(\d{8,})", re.ASCII)
_LENGTHS = ("num_steps", "max_steps", "total_steps")


@dataclass(frozen=True)
class Series:
    """One measure over the steps at which it was logged, in ascending order, each once."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    """nan where it was no finite number."""
    times: NDArray[np.float64]
    """Seconds since 1970; nan where none was told."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint that is there now."""

    step: int
    time: float
    """When it was saved, seconds since 1970; nan where its manifest does not say."""
    num_bytes: int
    path: Path


@dataclass(frozen=True)
class Run:
    """What a run directory says, but for the ranks' histories, which are read when they are asked for.

    Attributes:
        info: the content of run.json; empty without one. `info["ranks"]` are `rows`.
        rows: by rank what run.json or, without it, the start of the rank's own file says of it: `rank`, `local_rank`,
            `node_rank`, `host`, `pid`, `device` and, where known, `device_name`, `device_uuid`.
        monitored: ranks that have a file in monitor/.
        events: of all ranks, by time.
        metrics: by name.
        checkpoints: by step.
        num_steps: how long the run is to become; None where config.json does not say.
        trouble: what could not be read, in words for people.
    """

    folder: Path
    info: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    monitored: tuple[int, ...] = ()
    events: tuple[Event, ...] = ()
    metrics: Mapping[str, Series] = field(default_factory=dict)
    checkpoints: tuple[Checkpoint, ...] = ()
    num_steps: int | None = None
    trouble: tuple[str, ...] = ()

    def history(self, rank: int) -> RankHistory:
        """The history of one rank; read anew each time, so that a reader keeps what it needs alone.

        Raises:
            RankwiseError: there is none, or it cannot be read.
        Ranks: local.
        """
        path = monitor_path(self.folder, rank)
        try:
            return read_history(path, rank)
        except OSError as error:
            raise RankwiseError(f"{path} cannot be read: {error.strerror}.") from error

    def histories(self) -> Iterator[RankHistory]:
        """The histories of all monitored ranks in order; those that cannot be read are left out.

        Ranks: local.
        """
        for rank in self.monitored:
            with contextlib.suppress(RankwiseError):
                yield self.history(rank)


def read_run(run_dir: str | os.PathLike[str]) -> Run:
    """What a run directory says; of a run that goes on, until now.

    Raises:
        RankwiseError: there is no such folder, it cannot be listed, or it is no run directory.
    Ranks: local.
    """
    folder = require_run(run_dir)
    trouble: list[str] = []
    info = read_info(folder, trouble)
    monitored = tuple(sorted(rank_files(folder / "monitor", trouble)))
    return Run(
        folder,
        info,
        rows_of(folder, info, monitored),
        monitored,
        _events(folder, trouble),
        _metrics(folder, trouble),
        _checkpoints(folder, trouble),
        planned_steps(folder),
        tuple(trouble),
    )


def require_run(run_dir: str | os.PathLike[str]) -> Path:
    """The folder, if it is a run directory.

    Raises:
        RankwiseError: it is none; the message says why.
    Ranks: local.
    """
    folder = Path(run_dir)
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise RankwiseError(f"there is no folder {str(folder)!r}. Give the run directory.") from error
        raise RankwiseError(f"{str(folder)!r} cannot be listed: {error.strerror}. Give the run directory.") from error
    if not names & set(PARTS):
        raise RankwiseError(
            f"{str(folder)!r} is no run directory: it has none of {', '.join(PARTS)}. Give the folder that "
            "rankwise.init got."
        )
    return folder


def read_info(folder: Path, trouble: list[str]) -> dict[str, Any]:
    """The content of run.json; empty without one, or where it is damaged, which is added to `trouble`.

    Ranks: local.
    """
    try:
        info = json.loads(_content(folder / "run.json"))
        if isinstance(info, dict):
            return info
        trouble.append("run.json is no object")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        trouble.append(f"run.json cannot be read: {_say(error)}")
    return {}


def rank_files(folder: Path, trouble: list[str] | None = None) -> dict[int, os.DirEntry[str]]:
    """The files of ranks in a folder, by rank; none where there is no such folder.

    Ranks: local.
    """
    try:
        with os.scandir(folder) as entries:
            found = ((_RANK_FILE.fullmatch(entry.name), entry) for entry in entries)
            ranks = {int(match[1]): entry for match, entry in found if match is not None}
            return {rank: entry for rank, entry in ranks.items() if _can_be_read(entry, trouble)}
    except OSError as error:
        if trouble is not None and not isinstance(error, FileNotFoundError):
            trouble.append(f"{folder.name}/ cannot be listed: {_say(error)}")
        return {}


def _can_be_read(entry: os.DirEntry[str], trouble: list[str] | None) -> bool:
    """False for what a reader would wait for without end, a pipe or a device; a folder fails when it is read."""
    if entry.is_file() or entry.is_dir():
        return True
    if trouble is not None:
        trouble.append(f"{Path(entry.path).parent.name}/{entry.name} cannot be read: it is no file")
    return False


def _content(path: Path) -> bytes:
    """All of a file.

    Raises:
        OSError: it cannot be read, or is no file: a pipe would be waited for without end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return path.read_bytes()


def rows_of(folder: Path, info: Mapping[str, Any], ranks: tuple[int, ...]) -> dict[int, Mapping[str, Any]]:
    """By rank what is known of its place: by run.json, and of ranks that it does not name by their own files.

    Ranks: local.
    """
    rows: dict[int, Mapping[str, Any]] = {}
    told = info.get("ranks")
    for row in told if isinstance(told, list) else ():
        if isinstance(row, dict) and is_step(row.get("rank")):
            rows[row["rank"]] = row
    for rank in ranks if not rows else ():
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            with open(monitor_path(folder, rank), "rb") as file:
                first = json.loads(file.readline(1 << 20))
            if first.get("is") == "start":
                rows[rank] = {name: value for name, value in first.items() if name not in ("is", "time", "format")}
    return dict(sorted(rows.items()))


def planned_steps(folder: Path) -> int | None:
    """How many steps the run is to make, where config.json says so.

    Ranks: local.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError):
        config = json.loads(_content(folder / "config.json"))
        for name in _LENGTHS if isinstance(config, dict) else ():
            if is_step(config.get(name)) and config[name] > 0:
                return int(config[name])
    return None


def is_event(event: Event | None) -> bool:
    """Whether a line that was read is an event of which every field can be used.

    Ranks: local.
    """
    return (
        event is not None
        and isinstance(event.kind, str)
        and isinstance(event.message, str)
        and isinstance(event.details, dict)
        and isinstance(event.ranks, list | tuple)
        and all(map(is_step, (event.step, *event.ranks)))
        and is_finite(event.time)
    )


def _lines(path: str | Path, trouble: list[str]) -> list[bytes]:
    try:
        return Path(path).read_bytes().splitlines()
    except OSError as error:
        trouble.append(f"{Path(path).parent.name}/{Path(path).name} cannot be read: {_say(error)}")
        return []


def _events(folder: Path, trouble: list[str]) -> tuple[Event, ...]:
    found = []
    for _, entry in sorted(rank_files(folder / "events", trouble).items()):
        read = map(event_from_json, _lines(entry.path, trouble))
        found += [event for event in read if event is not None and is_event(event)]
    return tuple(sorted(found, key=lambda event: event.time))


def _metrics(folder: Path, trouble: list[str]) -> dict[str, Series]:
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for _, entry in sorted(rank_files(folder / "metrics", trouble).items()):
        for line in _lines(entry.path, trouble):
            with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError):
                row = json.loads(line)
                step, time = row.pop("step"), row.pop("time", None)
                if not is_step(step):
                    continue
                for name, value in row.items():
                    if value is None or type(value) in (int, float):
                        number = float(value) if is_finite(value) else math.nan
                        found.setdefault(name, {})[step] = (number, float(time) if is_finite(time) else math.nan)
    return {name: _series(points) for name, points in found.items()}


def _series(points: Mapping[int, tuple[float, float]]) -> Series:
    steps = sorted(points)
    values, times = (np.array([points[step][index] for step in steps], dtype=np.float64) for index in (0, 1))
    return Series(np.array(steps, dtype=np.int64), values, times)


def _checkpoints(folder: Path, trouble: list[str]) -> tuple[Checkpoint, ...]:
    try:
        with os.scandir(folder / "checkpoints") as entries:
            paths = [Path(entry.path) for entry in entries if _STEP_FOLDER.fullmatch(entry.name)]
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            trouble.append(f"checkpoints/ cannot be listed: {_say(error)}")
        return ()
    found = []
    for path in paths:
        if (path / "manifest.json").exists() and not (path / "manifest.json").is_file():
            trouble.append(f"checkpoints/{path.name}/manifest.json cannot be read: it is no file")
            continue
        try:
            manifest = read_manifest(path)
        except CheckpointCorruptError as error:
            trouble.append(str(error))
            continue
        time = math.nan
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            time = datetime.fromisoformat(manifest.saved).timestamp()
        num_bytes = sum(record.num_bytes for record in manifest.files.values())
        found.append(Checkpoint(manifest.step, time, num_bytes, path))
    return tuple(sorted(found, key=lambda checkpoint: checkpoint.step))


def _say(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
