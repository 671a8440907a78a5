"""Which videos a folder holds, what is in each, and which of them are held out from training.

The index is kept as JSON in the run directory; the data folder is only read. A row is used again while the
file's size and modification time are the same, and files that failed are tried again at every start.
"""

import dataclasses
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.files import write_atomic
from videovae.data.ffmpeg import printable, reason_of
from videovae.data.video import VideoInfo, probe
from videovae.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".avi", ".mkv", ".mov", ".mp4", ".webm"})
"""What a video's name ends with, in any case."""

_VERSION = 1
_NUM_PROBES = 4
_MIN_VIDEOS_TO_HOLD_OUT = 4


@dataclass(frozen=True)
class VideoEntry:
    """One file of the folder, and the frames of it that clips may be cut from."""

    name: str
    """Path relative to the data folder, with forward slashes."""
    path: Path
    """Where the file is."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Time of the last modification, in nanoseconds."""
    info: VideoInfo | None
    """What the video holds; None where it cannot be decoded."""
    error: str | None = None
    """Why it cannot be decoded."""
    start_frame: int = 0
    """First frame that clips may use."""
    stop_frame: int = 0
    """One past the last frame that clips may use."""

    @property
    def num_frames(self) -> int:
        """Frames that clips may use."""
        return self.stop_frame - self.start_frame


@dataclass(frozen=True)
class VideoIndex:
    """Every video file of a folder, sorted by name."""

    data_dir: Path
    entries: tuple[VideoEntry, ...]


def find_videos(data_dir: str | os.PathLike[str]) -> list[str]:
    """Names of the video files in a folder and below, sorted: relative, with forward slashes.

    Links are followed, hidden files and folders are left out. A folder that cannot be listed stands in the list
    itself, with a slash at its end.

    Raises:
        DataError: there is no such folder, or no video in it.
    Ranks: local; reads the file system.
    """
    root = Path(data_dir)
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"data folder {printable(root)} {what}. Give a folder that holds videos.")
    try:
        num_entries = len(os.listdir(root))
    except OSError as error:
        raise DataError(f"data folder {printable(root)} cannot be read ({reason_of(error)}).") from error
    names = sorted(_walk(root, "", frozenset()))
    if not names:
        seen = f"holds {num_entries} entries but no video" if num_entries else "is empty"
        raise DataError(
            f"data folder {printable(root)} {seen}. "
            f"Put videos there ({', '.join(sorted(SUFFIXES))}; subfolders count, hidden files do not)."
        )
    return names


def build_index(data_dir: str | os.PathLike[str], cache_file: str | os.PathLike[str]) -> VideoIndex:
    """Every video of a folder with what it holds; only files that are new or changed are opened.

    Args:
        cache_file: where the index is kept between runs; rewritten when it no longer fits the folder. A damaged
            one, one of another version or of another folder is made anew.
    Raises:
        DataError: there is no such folder, no video in it, or `cache_file` cannot be written.
    Ranks: main process only; may take minutes on a large folder.
    """
    root = Path(data_dir).absolute()
    known = _read_cache(Path(cache_file), root)
    files = [_stat(root, name) for name in find_videos(root)]
    entries = [_reuse(entry, known.get(entry.name)) for entry in files]
    pending = [i for i, entry in enumerate(entries) if entry.info is None and entry.error is None]
    if pending:
        logger.info(f"looking into {len(pending)} of {len(entries)} videos in {printable(root)}")
        with ThreadPoolExecutor(_NUM_PROBES) as pool:
            for i, entry in zip(pending, pool.map(_probe, [entries[i] for i in pending]), strict=True):
                entries[i] = entry
    if {entry.name: _to_row(entry) for entry in entries} != known:
        _write_cache(Path(cache_file), root, entries)
    return VideoIndex(root, tuple(entries))


def usable(index: VideoIndex, min_frames: int) -> tuple[list[VideoEntry], list[tuple[str, str]]]:
    """Videos that give a clip of `min_frames`, and those that do not, each as (name, reason).

    Ranks: local.
    """
    good, skipped = [], []
    for entry in index.entries:
        if entry.error is not None:
            skipped.append((printable(entry.name), entry.error))
        elif entry.num_frames < min_frames:
            skipped.append((printable(entry.name), f"{entry.num_frames} frames, and a clip needs {min_frames}"))
        else:
            good.append(entry)
    return good, skipped


def check_failures(failed: Sequence[tuple[str, str]], num_videos: int, max_failed_fraction: float) -> None:
    """Refuse to go on where too few videos are left.

    Args:
        failed: (name, reason) of each video that cannot be used, once.
    Raises:
        DataError: none is left, or more than `max_failed_fraction` of all failed; names the first few.
    Ranks: local.
    """
    if len(failed) < num_videos and len(failed) <= max_failed_fraction * num_videos:
        return
    first = "; ".join(f"{name}: {reason}" for name, reason in failed[:3])
    more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
    raise DataError(
        f"{len(failed)} of {num_videos} videos cannot be used, and at most {max_failed_fraction:.0%} may fail "
        f"({first}{more}). Replace or remove them, or raise max_failed_fraction."
    )


def split(
    entries: Sequence[VideoEntry], num_heldout: int, *, min_frames: int
) -> tuple[list[VideoEntry], list[VideoEntry]]:
    """Videos to train on, and videos to evaluate on.

    From four videos on, whole ones are held out: up to `num_heldout`, but no more than a quarter, chosen by a
    hash of the name, so that a new file moves at most one other. Of fewer videos the last part is held out: a
    tenth of the frames, or one clip where that is longer, of each that keeps a clip to train on. Where none is
    long enough, the evaluation sees the videos that the model trains on, and the log says so.

    Args:
        min_frames: frames that one clip spans.
    Ranks: local, and equal on every rank that gives equal entries.
    """
    if num_heldout == 0:
        return list(entries), []
    if len(entries) >= _MIN_VIDEOS_TO_HOLD_OUT:
        num_videos = min(num_heldout, len(entries) // _MIN_VIDEOS_TO_HOLD_OUT)
        chosen = {name for _, name in sorted((_hash(entry.name), entry.name) for entry in entries)[:num_videos]}
        return [e for e in entries if e.name not in chosen], [e for e in entries if e.name in chosen]
    train, heldout = [], []
    for entry in entries:
        cut = entry.stop_frame - max(min_frames, entry.num_frames // 10)
        if cut - entry.start_frame >= min_frames:
            train.append(dataclasses.replace(entry, stop_frame=cut))
            heldout.append(dataclasses.replace(entry, start_frame=cut))
        else:
            train.append(entry)
    if not heldout:
        logger.warning(f"{len(entries)} short videos leave nothing to hold out: the evaluation uses training videos")
        return train, list(entries)
    return train, heldout


def _walk(root: Path, folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Video names below a folder; a link back to a folder above is not followed again."""
    try:
        status = os.stat(root / folder)
        found = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
    except OSError:
        yield folder
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    for entry in found:
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path):
            yield from _walk(root, f"{folder}{entry.name}/", above | {identity})
        elif Path(entry.name).suffix.lower() in SUFFIXES:
            yield folder + entry.name


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


def _probe(entry: VideoEntry) -> VideoEntry:
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


def _read_cache(cache_file: Path, root: Path) -> dict[str, dict[str, Any]]:
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


def _write_cache(cache_file: Path, root: Path, entries: Sequence[VideoEntry]) -> None:
    rows = ",\n".join(json.dumps(_to_row(entry)) for entry in entries)
    head = f'{{"version": {_VERSION}, "data_dir": {json.dumps(str(root))}, "videos": ['
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cache_file, f"{head}\n{rows}\n]}}\n")
    except OSError as error:
        raise DataError(f"video index {printable(cache_file)} cannot be written ({reason_of(error)}).") from error


def _hash(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()
