"""`rankwise ckpt verify`: every file of a step against its checksum, and every piece of a tensor against its own."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import xxhash

from rankwise.checkpoint import folder
from rankwise.checkpoint.manifest import TENSORS, Chunk, FileRecord, Manifest, say
from rankwise.checkpoint.reader import read_records
from rankwise.ckpt.output import say as say_line
from rankwise.ckpt.output import show_bytes, tell
from rankwise.ckpt.places import find_place, load_manifest, step_number
from rankwise.errors import CheckpointCorruptError

Advance = Callable[[int], object]
"""Called with the number of bytes that were read."""

_BUFFER_BYTES = 1 << 23
_NUM_NAMED = 3


def run(options: argparse.Namespace) -> int:
    """Check the steps and print what was found.

    Returns:
        The exit status: 0 where all is well, or nothing is there yet; 1 where something is damaged.
    Raises:
        CheckpointError: there is no such folder or step.
        OSError: the folder cannot be read.
    Ranks: local, in no job.
    """
    place = find_place(options.run)
    steps = place.steps if options.step is None else (place.step(options.step),)
    reports = []
    for path in steps:
        with _progress(path) as advance:
            problems = find_problems(path, advance)
        if problems and not path.exists():
            tell(f"{path} was removed meanwhile")  # by the job that writes there
            continue
        reports.append(_report(path, problems))
        if not options.json:
            _say_report(reports[-1])
    if options.json:
        say_line(json.dumps(reports, indent=1))
    elif not steps:
        say_line(f"no checkpoints in {place.folder}")
    return 0 if all(report["ok"] for report in reports) else 1


def find_problems(path: Path, advance: Advance = lambda num_bytes: None) -> list[str]:
    """What is wrong with a step, one sentence for each file; nothing where it is what was written.

    Ranks: local.
    """
    try:
        manifest = load_manifest(path)
    except CheckpointCorruptError as error:
        return [str(error)]
    problems = []
    chunks: Mapping[str, list[tuple[str, Chunk]]] = {}
    try:
        chunks = _chunks_by_file(path, manifest)
    except CheckpointCorruptError as error:
        problems.append(str(error))
    for name, record in manifest.files.items():
        problem = _examine_file(path / name, record, chunks.get(name, ()), advance)
        # A damaged tensors.json was told above, with the same words.
        problems += [problem] if problem and problem not in problems else []
    return problems


def _chunks_by_file(path: Path, manifest: Manifest) -> dict[str, list[tuple[str, Chunk]]]:
    """Where tensors lie, in the order of their places; the reading has seen to it that none overlap."""
    found: dict[str, list[tuple[str, Chunk]]] = {}
    for name, record in read_records(path, manifest).items():
        for chunk in record.chunks:
            found.setdefault(chunk.file, []).append((name, chunk))
    for chunks in found.values():
        chunks.sort(key=lambda each: each[1].start)
    return found


def _examine_file(path: Path, record: FileRecord, chunks: Iterable[tuple[str, Chunk]], advance: Advance) -> str:
    """What is wrong with a file, in one pass over it; empty where nothing is."""
    wrong: list[str] = []
    try:
        with open(folder.open_regular(path), "rb", buffering=0) as file:
            reader = _Reader(file, advance)
            for name, chunk in chunks:
                reader.read(chunk.start - reader.position)
                if reader.read(chunk.num_bytes) != chunk.xxh3:
                    wrong.append(name)
            reader.read(None)
    except OSError as error:
        return f"{path} cannot be read: {say(error)}."
    names = ", ".join(repr(name) for name in wrong[:_NUM_NAMED]) + (", ..." if len(wrong) > _NUM_NAMED else "")
    try:
        folder.require_same(path, FileRecord(reader.position, reader.digest.hexdigest()), record)
    except CheckpointCorruptError as error:
        return f"{error} Tensors that it hit: {names}." if wrong else str(error)
    return f"{path} is what was written, but not what {TENSORS} says of {names}." if wrong else ""


class _Reader:
    """A file that is read from its beginning, summed up as a whole and in parts."""

    def __init__(self, file: io.FileIO, advance: Advance) -> None:
        self.position = 0
        self.digest = xxhash.xxh3_128()
        self._file = file
        self._advance = advance
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    def read(self, num_bytes: int | None) -> str:
        """Read on; gives the checksum of that part alone. None reads to the end."""
        part, end = xxhash.xxh3_128(), None if num_bytes is None else self.position + num_bytes
        while wanted := _BUFFER_BYTES if end is None else min(end - self.position, _BUFFER_BYTES):
            count = self._file.readinto(self._buffer[:wanted])
            if not count:
                break
            for digest in (self.digest, part):
                digest.update(self._buffer[:count])
            self.position += count
            self._advance(count)
        return part.hexdigest()


def _report(path: Path, problems: list[str]) -> dict[str, Any]:
    report: dict[str, Any] = {"step": step_number(path), "path": str(path), "ok": not problems, "problems": problems}
    try:
        manifest = load_manifest(path)
    except CheckpointCorruptError:
        return report | {"num_files": None, "bytes": None}
    num_bytes = sum(record.num_bytes for record in manifest.files.values())
    return report | {"step": manifest.step, "num_files": len(manifest.files) + 1, "bytes": num_bytes}


def _say_report(report: Mapping[str, Any]) -> None:
    if report["ok"]:
        say_line(f"well     {report['path']}: {report['num_files']} files, {show_bytes(report['bytes'])}")
    for problem in report["problems"]:
        say_line(f"DAMAGED  {problem}")


def _progress(path: Path) -> AbstractContextManager[Advance]:
    """A bar on a terminal, while a step is read."""
    try:
        total = sum(record.num_bytes for record in load_manifest(path).files.values())
    except CheckpointCorruptError:
        total = 0
    return _Bar(path.name, total) if total and sys.stderr.isatty() else nullcontext(lambda num_bytes: None)


class _Bar(AbstractContextManager[Advance]):
    def __init__(self, title: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        parts = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
        self._progress = Progress(*parts, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(title, total=total)

    def __enter__(self) -> Advance:
        self._progress.start()
        return lambda num_bytes: self._progress.advance(self._task, num_bytes)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
