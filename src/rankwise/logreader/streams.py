"""The files of one process as one stream of lines, also while it writes and rotates them.

    rank-00003.000001.jsonl  rank-00003.000002.jsonl  ...  rank-00003.jsonl
    oldest                                                 the one being written; it will be number 3

A place in a stream is the number that a file has, or will have once it is rotated, and an offset in it: so it stays
right when the file is renamed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

MAX_LINE_BYTES = 16 << 20
"""What is longer is no log record: a file without line ends must not fill the memory."""

_NAME = re.compile(r"(rank-(\d{1,7})(?:\.worker-(\d{1,18}))?)(?:\.(\d{1,9}))?\.jsonl", re.ASCII)


@dataclass
class Tally:
    """What could not be shown."""

    num_foreign: dict[str, int] = field(default_factory=dict)
    """Lines that are no whole log record, by file."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Why a file could not be read, by file."""

    def add_foreign(self, name: str) -> None:
        """Count a line of the file as none of ours.

        Ranks: local.
        """
        self.num_foreign[name] = self.num_foreign.get(name, 0) + 1


def find_streams(names: Iterable[str]) -> dict[str, dict[int, str]]:
    """The streams among the names of files, in order of rank, and the names of their rotated files by number.

    Ranks: local.
    """
    found: dict[tuple[int, int, str], dict[int, str]] = {}
    for name in sorted(names):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        stem, rank, worker, number = match.groups()
        rotated = found.setdefault((int(rank), int(worker or -1), stem), {})
        if number is not None:
            rotated[int(number)] = name
    return {stem: rotated for (_, _, stem), rotated in sorted(found.items())}


def rank_of(stem: str) -> int:
    """The rank that a stream belongs to.

    Ranks: local.
    """
    return int(stem[len("rank-") :].partition(".")[0])


def worker_of(stem: str) -> int | None:
    """The process id of the worker that wrote the stream; None where it was the rank itself.

    Ranks: local.
    """
    _, _, pid = stem.partition(".worker-")
    return int(pid) if pid else None


class Stream:
    """The lines of one process from where it was read up to, over all its files.

    Args:
        block_bytes: how much is read at once.
        keep_open: whether the file stays open between reads; else it costs a descriptor only while it is read.

    Ranks: local.
    """

    def __init__(self, folder: Path, stem: str, tally: Tally, *, block_bytes: int, keep_open: bool) -> None:
        self.stem, self.rank, self.worker = stem, rank_of(stem), worker_of(stem)
        self._folder, self._tally = folder, tally
        self._block_bytes, self._keep_open = block_bytes, keep_open
        self._rotated: dict[int, str] = {}
        self._number = 0  # 0 until it is known which is the first
        self._offset = 0
        self._is_inside_line = False
        self._descriptor = -1

    @property
    def file(self) -> str:
        """The name of the file that is being read."""
        return self._rotated_name if self._is_rotated else f"{self.stem}.jsonl"

    def update(self, rotated: dict[int, str]) -> None:
        """Take note of the rotated files there are now: their names by number."""
        self._rotated = rotated
        if not self._number:
            self._number = min(rotated, default=1)

    def lines(self, *, is_final: bool) -> Iterator[bytes]:
        """The lines from here on. An unfinished last line is given only if `is_final`: else it is waited for."""
        while self._is_rotated:
            yield from self._whole_lines_of_file(take_rest=True)
            self._go_to(min((n for n in self._rotated if n > self._number), default=max(self._rotated) + 1))
        yield from self._whole_lines_of_file(take_rest=is_final)
        if is_final:
            self.close()

    def go_back(self, num_bytes: int) -> bool:
        """Go to about so many bytes before the end; False where that is the beginning."""
        self._go_to(max(self._rotated, default=0) + 1)
        numbers = sorted(self._rotated)
        while (size := self._size_of_file()) < num_bytes and numbers:
            num_bytes -= size
            self._go_to(numbers.pop())
        self._offset = max(size - num_bytes, 0)
        self._is_inside_line = self._offset > 0
        return self._is_inside_line or bool(numbers)

    def close(self) -> None:
        """Close the file; reading goes on where it was if it is asked for again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def _is_rotated(self) -> bool:
        # A number that is missing among higher ones was removed to save space.
        return self._number <= max(self._rotated, default=0)

    @property
    def _rotated_name(self) -> str:
        return self._rotated.get(self._number, f"{self.stem}.{self._number:06d}.jsonl")

    def _go_to(self, number: int) -> None:
        self.close()
        self._number, self._offset, self._is_inside_line = number, 0, False

    def _size_of_file(self) -> int:
        try:
            return os.stat(self._folder / self.file).st_size
        except OSError:  # `_read` will say why
            return 0

    def _whole_lines_of_file(self, *, take_rest: bool) -> Iterator[bytes]:
        lines = self._lines_of_file(take_rest=take_rest)
        if self._is_inside_line:
            # The line that `go_back` went into the middle of; a live one may have no end yet.
            self._is_inside_line = next(lines, None) is None
        yield from lines

    def _lines_of_file(self, *, take_rest: bool) -> Iterator[bytes]:
        pieces: list[bytes] = []  # of a line that is longer than a block
        num_bytes = 0
        while block := self._read(self._offset + num_bytes):
            pieces.append(block)
            num_bytes += len(block)
            if b"\n" not in block and num_bytes < MAX_LINE_BYTES:
                continue
            *lines, rest = b"".join(pieces).split(b"\n")
            if len(rest) >= MAX_LINE_BYTES:
                lines.append(rest)
                rest = b""
            yield from filter(None, lines)
            self._offset += num_bytes - len(rest)
            pieces, num_bytes = [rest], len(rest)
        if num_bytes and take_rest:
            self._offset += num_bytes
            yield b"".join(pieces)

    def _read(self, offset: int) -> bytes:
        try:
            if self._descriptor < 0:
                self._descriptor = self._open()
            block = os.pread(self._descriptor, self._block_bytes, offset)
            if not block and self._was_replaced():
                self._go_to(self._number)
            return block
        except FileNotFoundError:
            return b""  # not written yet, or removed: its turn may come
        except OSError as error:
            self._tally.unreadable[self.file] = error.strerror or str(error)
            return b""
        finally:
            if not self._keep_open:
                self.close()

    def _open(self) -> int:
        descriptor = self._open_file(self.file)
        if not self._is_rotated:
            # The file may have been rotated since the folder was listed: then this is the next one already.
            with contextlib.suppress(FileNotFoundError):
                rotated = self._open_file(self._rotated_name)
                os.close(descriptor)
                return rotated
        return descriptor

    def _open_file(self, name: str) -> int:
        # Without O_NONBLOCK a named pipe in the folder would be waited for forever.
        return os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def _was_replaced(self) -> bool:
        """Whether the run was removed and begun anew under the same names, or its file cut short."""
        status = os.fstat(self._descriptor)
        return not self._is_rotated and (status.st_nlink == 0 or status.st_size < self._offset)
