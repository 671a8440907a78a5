"""`rankwise ckpt ls`: the steps, what was left behind, and who writes there. Needs no torch."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rankwise.checkpoint.folder import read_checked
from rankwise.checkpoint.holder import Holder, read_highest
from rankwise.checkpoint.manifest import TENSORS, Manifest
from rankwise.ckpt.output import columns, say, say_table, show_bytes, show_seconds
from rankwise.ckpt.places import LEFTOVERS, Place, find_leftovers, find_place, kind_of, load_manifest, step_number
from rankwise.errors import CheckpointCorruptError

_HEADING = ("step", "epoch", "saved (UTC)", "size", "ranks", "tensors", "items", "whole")


@dataclass(frozen=True)
class Row:
    """What `ls` says of one step; None where its manifest cannot be read.

    Attributes:
        whole: whether every file is there in its size, and `tensors.json` what was written; `verify` reads them all.
        problem: what is wrong where it is not whole.
    """

    step: int | None
    path: str
    whole: bool
    problem: str | None = None
    epoch: int | None = None
    saved: str | None = None
    bytes: int | None = None
    world_size: int | None = None
    num_tensors: int | None = None
    items: Sequence[str] | None = None
    per_rank_items: Sequence[str] | None = None
    versions: dict[str, str] | None = None
    config_digest: str | None = None


def run(options: argparse.Namespace) -> int:
    """Print the list; the exit status is 0, whatever is in it.

    Raises:
        CheckpointError: there is no such folder.
        OSError: it cannot be read.
    Ranks: local, in no job.
    """
    place = find_place(options.run)
    rows = [describe(path) for path in place.steps]
    # A job that writes there may remove steps meanwhile.
    rows = [row for row in rows if row.whole or os.path.exists(row.path)]
    if options.json:
        say(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _say_all(place, rows)
    return 0


def describe(path: Path) -> Row:
    """What can be said of a step without reading its tensors.

    Ranks: local.
    """
    try:
        manifest = load_manifest(path)
    except CheckpointCorruptError as error:
        return Row(step_number(path), str(path), False, str(error))
    num_tensors, problem = None, None
    try:
        num_tensors = len(json.loads(read_checked(path, manifest, TENSORS)))
        check_sizes(path, manifest)
    except CheckpointCorruptError as error:
        problem = str(error)
    except (TypeError, ValueError) as error:
        problem = f"{path / TENSORS} cannot be read: {error}."
    return Row(
        step=manifest.step,
        path=str(path),
        whole=problem is None,
        problem=problem,
        epoch=manifest.epoch,
        saved=manifest.saved,
        bytes=sum(record.num_bytes for record in manifest.files.values()),
        world_size=manifest.world_size,
        num_tensors=num_tensors,
        items=manifest.shared_items,
        per_rank_items=manifest.per_rank_items,
        versions=dict(manifest.versions or {}),
        config_digest=manifest.config_digest or None,
    )


def check_sizes(path: Path, manifest: Manifest) -> None:
    """Compare the sizes of a step's files with its manifest.

    Raises:
        CheckpointCorruptError: names the first file that is missing or has another size.
    Ranks: local.
    """
    for name, record in manifest.files.items():
        try:
            num_bytes = (path / name).stat().st_size
        except OSError as error:
            raise CheckpointCorruptError(f"{path / name} cannot be read: {error.strerror}.") from error
        if num_bytes != record.num_bytes:
            raise CheckpointCorruptError(
                f"{path / name} is damaged: {num_bytes} bytes long, {record.num_bytes} were written."
            )


def size_and_age(path: Path) -> tuple[int, float]:
    """Bytes of what is in a directory, and the seconds since something in it was written last.

    Ranks: local; others may be writing there.
    """
    num_bytes, newest = 0, 0.0
    for directory, _, names in os.walk(path):
        for name in (".", *names):
            try:
                found = os.stat(os.path.join(directory, name))
            except OSError:
                continue
            newest = max(newest, found.st_mtime)
            num_bytes += found.st_size if name != "." else 0
    return num_bytes, time.time() - newest


def _say_all(place: Place, rows: Sequence[Row]) -> None:
    if not rows:
        say(f"no checkpoints in {place.folder}")
    else:
        say_table([_HEADING, *map(_cells, rows)], right=(0, 1, 3, 4, 5))
        if any(row.per_rank_items for row in rows):
            say("* every rank has its own")
    for row in rows:
        if row.problem:
            say(f"{row.step if row.step is not None else row.path}: {row.problem}")
    if place.folder is not None:
        for line in _leftover_lines(place.folder) + _lease_lines(place.folder):
            say(line)


def _cells(row: Row) -> tuple[str, ...]:
    if row.epoch is None:
        return (str(row.step), "-", "-", "-", "-", "-", "-", "no")
    items = [*(row.items or ()), *(f"{name}*" for name in row.per_rank_items or ())]
    return (
        str(row.step),
        str(row.epoch),
        (row.saved or "-")[:19].replace("T", " "),
        show_bytes(row.bytes or 0),
        str(row.world_size),
        "-" if row.num_tensors is None else str(row.num_tensors),
        ", ".join(items) or "-",
        "yes" if row.whole else "no",
    )


def _leftover_lines(directory: Path) -> list[str]:
    rows = []
    for path in find_leftovers(directory):
        num_bytes, seconds = size_and_age(path)
        rows.append((path.name, show_bytes(num_bytes), f"{show_seconds(seconds)} old", LEFTOVERS[kind_of(path)]))
    return ["", "left behind (rankwise ckpt prune):", *(f"  {line}" for line in columns(rows))] if rows else []


def _lease_lines(directory: Path) -> list[str]:
    found = read_highest(directory)
    return ["", describe_holder(found[0])] if found and not found[0].released else []


def describe_holder(holder: Holder) -> str:
    """Who holds a lease that was not released, and what is known of it.

    Ranks: local.
    """
    match holder.alive:
        case True:
            return f"written by {holder}"
        case False:
            return f"last written by {holder}, which is gone"
    return f"written by {holder}; whether it lives cannot be seen from here"
