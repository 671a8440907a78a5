"""The index of a folder: made in slices, so that other ranks hear of it while a large folder is looked into.

It is kept as JSON in the run directory; the data folder is only read. A row is used again while the file's size and
modification time are the same, and files that failed are tried again at every start.
"""

import dataclasses
import json
import logging
import os
import stat
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from rankwise.files import write_atomic
from videovae.data.ffmpeg import printable, reason_of
from videovae.data.index import VideoEntry, VideoIndex, find_videos
from videovae.data.video import VideoInfo, probe
from videovae.errors import DataError

logger = logging.getLogger(__name__)

Rows = dict[str, dict[str, Any]]
"""What the cache says of each file, by name."""

_VERSION = 1
_NUM_PROBES = 4
_PROGRESS_SECONDS = 10.0
_WRITE_SHARE = 0.1  # of the time may go into writing the cache of a very large folder


def build_index(data_dir: str | os.PathLike[str], cache_file: str | os.PathLike[str]) -> VideoIndex:
    """Every video of a folder with what it holds: an `IndexBuilder` until it is done.

    Ranks: main process only; may take long on a large folder.
    """
    with IndexBuilder(data_dir, cache_file) as builder:
        while not builder.step():
            pass
        return builder.index


class IndexBuilder:
    """Lists a folder and looks into its videos, some seconds at a time; only new or changed files are opened.

    Close it, or use it as a context manager.

    Args:
        cache_file: where the index is kept, between slices and between runs. A damaged one, one of another version or
            of another folder is made anew.
    Ranks: main process only.
    """

    def __init__(self, data_dir: str | os.PathLike[str], cache_file: str | os.PathLike[str]) -> None:
        self._root = Path(data_dir).absolute()
        self._cache_file = Path(cache_file)
        self._pool = ThreadPoolExecutor(_NUM_PROBES)
        self._listing: Future[tuple[list[VideoEntry], Rows]] | None = None
        self._entries: list[VideoEntry] = []
        self._cached: Rows = {}
        self._pending: deque[int] = deque()
        self._probing: dict[Future[VideoEntry], int] = {}
        self._num_to_probe = self._num_unwritten = 0
        self._next_line = self._next_write = 0.0
        self._index: VideoIndex | None = None

    @property
    def index(self) -> VideoIndex:
        """What `step` has built once it has returned True."""
        assert self._index is not None, "step() has not returned True yet"
        return self._index

    def step(self, seconds: float = 5.0) -> bool:
        """Go on for about so long; True when the index is whole. Neither a slow listing nor a slow video holds it up.

        Raises:
            DataError: there is no such folder, no video in it, or the cache cannot be written.
        """
        if self._index is not None:
            return True
        deadline = time.monotonic() + seconds
        if not self._list(deadline):
            return False
        self._probe(deadline)
        if self._pending or self._probing:
            if self._num_unwritten and time.monotonic() >= self._next_write:
                self._write()
            return False
        self._write()
        self._index = VideoIndex(self._root, tuple(self._entries))
        return True

    def close(self) -> None:
        """Begin nothing more; what is being read in the background ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "IndexBuilder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _list(self, deadline: float) -> bool:
        """Whether it is known by now which files there are."""
        if self._entries:
            return True
        if self._listing is None:
            self._listing = self._pool.submit(_list_entries, self._root, self._cache_file)
        if not wait([self._listing], max(0.0, deadline - time.monotonic())).done:
            return False
        self._entries, self._cached = self._listing.result()
        self._pending.extend(i for i, entry in enumerate(self._entries) if not _is_known(entry))
        self._num_to_probe = len(self._pending)
        if self._pending:
            where = f"{len(self._entries)} videos in {printable(self._root)}"
            logger.info(f"looking into {self._num_to_probe} of {where}")
            self._next_line = time.monotonic() + _PROGRESS_SECONDS
        return True

    def _probe(self, deadline: float) -> None:
        """Look into videos until the deadline."""
        while self._pending or self._probing:
            while self._pending and len(self._probing) < 2 * _NUM_PROBES:
                number = self._pending.popleft()
                self._probing[self._pool.submit(_probe_entry, self._entries[number])] = number
            remaining = max(0.0, deadline - time.monotonic())
            for future in wait(self._probing, remaining, FIRST_COMPLETED).done:
                self._entries[self._probing.pop(future)] = future.result()
                self._num_unwritten += 1
            now = time.monotonic()
            if now >= self._next_line:
                done = self._num_to_probe - len(self._pending) - len(self._probing)
                logger.info(f"looked into {done} of {self._num_to_probe} videos")
                self._next_line = now + _PROGRESS_SECONDS
            if now >= deadline:
                break

    def _write(self) -> None:
        """Keep what is known so far."""
        started = time.monotonic()
        rows = {entry.name: _to_row(entry) for entry in self._entries if _is_known(entry)}
        if rows != self._cached:
            _write_cache(self._cache_file, self._root, rows)
            self._cached = rows
        self._num_unwritten = 0
        now = time.monotonic()
        self._next_write = now + (now - started) / _WRITE_SHARE


def _list_entries(root: Path, cache_file: Path) -> tuple[list[VideoEntry], Rows]:
    """The folder's files, with what the cache knows of them, and the cache."""
    cached = _read_cache(cache_file, root)
    files = [_stat(root, name) for name in find_videos(root)]
    return [_reuse(entry, cached.get(entry.name)) for entry in files], cached


def _is_known(entry: VideoEntry) -> bool:
    return entry.info is not None or entry.error is not None


def _stat(root: Path, name: str) -> VideoEntry:
    path = root / name
    try:
        status = path.stat()
        if name.endswith("/"):
            os.listdir(path)
    except OSError as error:
        return VideoEntry(name, path, 0, 0, None, f"it cannot be read ({reason_of(error)})")
    # Opening a pipe or a device might wait for ever.
    reason = None if stat.S_ISREG(status.st_mode) else "it is not a regular file"
    return VideoEntry(name, path, status.st_size, status.st_mtime_ns, None, reason)


def _probe_entry(entry: VideoEntry) -> VideoEntry:
    try:
        info = probe(entry.path)
    except DataError as error:
        reason = str(error).removeprefix(f"{printable(entry.path)}: ")
        return dataclasses.replace(entry, error=reason)
    return dataclasses.replace(entry, info=info, stop_frame=info.num_frames)


def _reuse(entry: VideoEntry, row: Mapping[str, Any] | None) -> VideoEntry:
    # A row of a failure is not reused: permissions and mounts change without the file's time.
    if row is None or row["info"] is None or (row["size"], row["mtime_ns"]) != (entry.size, entry.mtime_ns):
        return entry
    try:
        info = VideoInfo(**row["info"] | {"irregular_pts": tuple(row["info"]["irregular_pts"])})
    except (KeyError, TypeError):
        return entry
    return dataclasses.replace(entry, info=info, stop_frame=info.num_frames)


def _to_row(entry: VideoEntry) -> dict[str, Any]:
    info = dataclasses.asdict(entry.info) if entry.info is not None else None
    if info is not None:
        info["irregular_pts"] = list(info["irregular_pts"])
    return {
        "name": entry.name,
        "size": entry.size,
        "mtime_ns": entry.mtime_ns,
        "info": info,
        "error": entry.error,
    }


def _read_cache(cache_file: Path, root: Path) -> Rows:
    """Rows by name; none where there is no cache, or not one of ours for this folder."""
    try:
        content = json.loads(cache_file.read_bytes())
        if (content["version"], content["data_dir"]) != (_VERSION, str(root)):
            return {}
        rows = {row["name"]: row for row in content["videos"]}
        complete = all(row.keys() == {"name", "size", "mtime_ns", "info", "error"} for row in rows.values())
        return rows if complete else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _write_cache(cache_file: Path, root: Path, rows: Rows) -> None:
    lines = ",\n".join(json.dumps(row) for row in rows.values())
    head = f'{{"version": {_VERSION}, "data_dir": {json.dumps(str(root))}, "videos": ['
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cache_file, f"{head}\n{lines}\n]}}\n")
    except OSError as error:
        raise DataError(f"video index {printable(cache_file)} cannot be written ({reason_of(error)}).") from error
