"""A file of whole lines, which this process alone writes, and which starts anew when it has grown large."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

DEFAULT_MAX_BYTES = 64 << 20


class LinesFile:
    """Appends lines, many with one system call; none that was written is lost when the process dies.

    A disk that is full, or gone, costs lines, which are counted, and never an exception in training. A file that was
    removed is begun anew, if its folder is still there. A file that would grow past `max_bytes` is renamed first, from
    rank-00000.jsonl to rank-00000.000001.jsonl and so on: a larger number is newer, and the file without number is the
    newest.

    Args:
        max_bytes: size at which a new file is begun; a single line may be longer.
        num_backups: how many older files are kept; None keeps all.
    """

    def __init__(self, path: Path, max_bytes: int = DEFAULT_MAX_BYTES, num_backups: int | None = None) -> None:
        self.path = path
        self.num_dropped = 0
        self._max_bytes = max_bytes
        self._num_backups = num_backups
        self._has_failed = False
        self._descriptor = -1
        self._open()

    def write(self, lines: Sequence[bytes]) -> int:
        """Append lines, each of which ends with a newline.

        Returns:
            How many of them are in the file now; the others are given up.
        Ranks: local.
        """
        if self._is_removed() and not self._begin_again():
            self.num_dropped += len(lines)
            return 0
        num_written = 0
        chunk: list[bytes] = []
        size = self._size
        for line in lines:
            if size and size + len(line) > self._max_bytes:
                num_written += self._write_chunk(chunk)
                chunk = []
                self._rotate()
                size = self._size
            chunk.append(line)
            size += len(line)
        return num_written + self._write_chunk(chunk)

    def close(self) -> None:
        """Close the file; a second call does nothing.

        Ranks: local.
        """
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._descriptor).st_size
        self._is_torn = self._size > 0 and not _ends_whole(self.path)

    def _is_removed(self) -> bool:
        """Whether nobody can read any more what would be written."""
        with contextlib.suppress(OSError):
            return os.fstat(self._descriptor).st_nlink == 0
        return False

    def _begin_again(self) -> bool:
        """Open a new file in place of the one that was removed; a folder that was removed stays so."""
        removed = self._descriptor
        try:
            self._open()
        except OSError as error:
            self._say_failed(error)
            return False
        os.close(removed)
        return True

    def _write_chunk(self, lines: list[bytes]) -> int:
        if not lines:
            return 0
        # The rest of a line that did not fit on a full disk, or that a kill cut, must not run into this one.
        torn_end = b"\n" if self._is_torn else b""
        content = torn_end + b"".join(lines)
        num_bytes = 0
        try:
            num_bytes = os.write(self._descriptor, content)
            if num_bytes < len(content):
                raise OSError(f"{num_bytes} of {len(content)} bytes written")
        except OSError as error:
            self._say_failed(error)
        self._size += num_bytes
        if num_bytes:
            self._is_torn = content[num_bytes - 1] != ord("\n")
        num_written = content.count(b"\n", len(torn_end), num_bytes)
        self.num_dropped += len(lines) - num_written
        return num_written

    def _rotate(self) -> None:
        with contextlib.suppress(OSError):
            numbers = sorted(_rotated(self.path))
            numbers.append(numbers[-1] + 1 if numbers else 1)
            os.rename(self.path, rotated_path(self.path, numbers[-1]))
            full = self._descriptor
            self._open()  # where this fails the full file is written on
            os.close(full)
            if self._num_backups is not None:
                for number in numbers[: max(0, len(numbers) - self._num_backups)]:
                    os.unlink(rotated_path(self.path, number))

    def _say_failed(self, error: OSError) -> None:
        if not self._has_failed:
            say_on_stderr(f"rankwise: cannot write {self.path} ({error}); the run goes on without it")
        self._has_failed = True


def rotated_path(path: Path, number: int) -> Path:
    """Where the `number`-th full file goes: rank-00000.000001.jsonl.

    Ranks: local.
    """
    return path.with_name(f"{path.stem}.{number:06d}{path.suffix}")


def say_on_stderr(text: str) -> None:
    """Write lines with one call to whatever `sys.stderr` is now, so that ranks do not cut into each other.

    Ranks: local.
    """
    with contextlib.suppress(Exception):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _rotated(path: Path) -> list[int]:
    form = re.compile(rf"{re.escape(path.stem)}\.([0-9]{{6,}}){re.escape(path.suffix)}")
    return [int(match[1]) for name in os.listdir(path.parent) if (match := form.fullmatch(name))]


def _ends_whole(path: Path) -> bool:
    """Whether the last byte is a newline; taken for granted where the file cannot be read."""
    try:
        with path.open("rb") as content:
            content.seek(-1, os.SEEK_END)
            return content.read(1) == b"\n"
    except OSError:
        return True
