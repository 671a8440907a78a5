"""Which videos a folder holds, which of them can be used, and which are held out from training."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from videovae.data.ffmpeg import printable, reason_of
from videovae.data.video import VideoInfo
from videovae.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".avi", ".mkv", ".mov", ".mp4", ".webm"})
"""What a video's name ends with, in any case."""

HeldoutRange = tuple[str, int, int]
"""(name, first frame, one past the last frame) of what a run holds out: what its checkpoints remember."""

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
    is_heldout: bool = False
    """Whether no clip of these frames is ever trained on."""

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
    entries: Sequence[VideoEntry],
    num_heldout: int,
    *,
    min_frames: int,
    previous: Sequence[HeldoutRange] | None = None,
) -> tuple[list[VideoEntry], list[VideoEntry]]:
    """Videos to train on, and videos to evaluate on.

    From four videos on, whole ones are held out: up to `num_heldout`, but no more than a quarter, chosen by a hash of
    the name. Of fewer videos the last part is held out: a tenth of the frames, or one clip where that is longer, of
    each that keeps a clip to train on. Where none is long enough, the evaluation sees the videos that the model trains
    on, and the log says so.

    Args:
        min_frames: frames that one clip spans; each entry has them.
        previous: what this run held out so far. Exactly that stays held out, as far as it is still there, and
            everything else trains: whatever was added to the folder, no clip that was trained on is evaluated.
    Ranks: local, and equal on every rank that gives equal entries.
    """
    if previous is not None:
        train, heldout = _split_as_before(entries, previous, min_frames)
    elif num_heldout == 0:
        return list(entries), []
    elif len(entries) >= _MIN_VIDEOS_TO_HOLD_OUT:
        num_videos = min(num_heldout, len(entries) // _MIN_VIDEOS_TO_HOLD_OUT)
        chosen = {name for _, name in sorted((_hash(entry.name), entry.name) for entry in entries)[:num_videos]}
        train = [entry for entry in entries if entry.name not in chosen]
        heldout = [dataclasses.replace(entry, is_heldout=True) for entry in entries if entry.name in chosen]
    else:
        train, heldout = _split_each(entries, min_frames)
    if not heldout and not previous and num_heldout:
        logger.warning(f"nothing is held out of {len(entries)} videos: the evaluation uses training videos")
        return train, list(entries)
    return train, heldout


def heldout_ranges(entries: Sequence[VideoEntry]) -> list[HeldoutRange]:
    """What of these videos no clip is ever trained on: what `split` takes as `previous` when the run goes on.

    Ranks: local.
    """
    return [(entry.name, entry.start_frame, entry.stop_frame) for entry in entries if entry.is_heldout]


def _split_each(entries: Sequence[VideoEntry], min_frames: int) -> tuple[list[VideoEntry], list[VideoEntry]]:
    """Each video's last part held out, where both parts give a clip."""
    train, heldout = [], []
    for entry in entries:
        cut = entry.stop_frame - max(min_frames, entry.num_frames // 10)
        if cut - entry.start_frame >= min_frames:
            train.append(dataclasses.replace(entry, stop_frame=cut))
            heldout.append(dataclasses.replace(entry, start_frame=cut, is_heldout=True))
        else:
            train.append(entry)
    return train, heldout


def _split_as_before(
    entries: Sequence[VideoEntry], previous: Sequence[HeldoutRange], min_frames: int
) -> tuple[list[VideoEntry], list[VideoEntry]]:
    """What was held out stays so, and the frames before it train; those behind it do neither."""
    ranges = {name: (start_frame, stop_frame) for name, start_frame, stop_frame in previous}
    train, heldout = [], []
    for entry in entries:
        start, stop = ranges.get(entry.name, (entry.stop_frame, entry.stop_frame))
        before = dataclasses.replace(entry, stop_frame=min(start, entry.stop_frame))
        kept = dataclasses.replace(entry, start_frame=start, stop_frame=min(stop, entry.stop_frame), is_heldout=True)
        if before.num_frames >= min_frames:
            train.append(before)
        if kept.num_frames >= min_frames:
            heldout.append(kept)
    if lost := sorted(printable(name) for name in ranges.keys() - {entry.name for entry in heldout}):
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        logger.warning(f"held-out videos that are gone or too short are not evaluated: {', '.join(lost[:3])}{more}")
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


def _hash(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()
