"""Damage to the files of a step, and what the ranks of a job make of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from crash_ranks import MANY, Journal, make_state, require_equal

import rankwise
from rankwise import CheckpointManager
from rankwise.errors import CheckpointError

Change = Callable[[Path], None]


def positions(path: Path, num_sampled: int, seed: int) -> list[int]:
    """Places in a file: all of a small one; of a larger one a sample, both ends, and both ends of each tensor in it."""
    num_bytes = path.stat().st_size
    if num_bytes <= num_sampled:
        return list(range(num_bytes))
    found = {0, num_bytes - 1}
    for tensor in json.loads((path.parent / "tensors.json").read_bytes()).values():
        for chunk in tensor["chunks"]:
            if chunk["file"] == path.name:
                ends = (chunk["start"], chunk["start"] + chunk["num_bytes"])
                found |= {place + near for place in ends for near in (-1, 0)}
    found |= set(random.Random(seed).sample(range(num_bytes), num_sampled))
    return sorted(found)


@contextlib.contextmanager
def changed_byte(path: Path, place: int, change: int) -> Iterator[None]:
    """One byte of a file, XORed."""
    with open(path, "r+b", buffering=0) as file:
        whole = os.pread(file.fileno(), 1, place)
        os.pwrite(file.fileno(), bytes([whole[0] ^ change]), place)
        try:
            yield
        finally:
            os.pwrite(file.fileno(), whole, place)


def cut(num_bytes: int) -> Change:
    """To this length; counted from the end where it is negative."""

    def change(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[:num_bytes])

    return change


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_end(path: Path) -> None:
    """As a file system may leave a file whose length was written and whose last block was not."""
    content = path.read_bytes()
    kept = max(0, len(content) - 4096)
    path.write_bytes(content[:kept] + bytes(len(content) - kept))


def remove(path: Path) -> None:
    path.unlink()


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def from_other_step(path: Path) -> None:
    other = path.parent.parent / "step-00000001" / path.name
    content = other.read_bytes()
    assert content != path.read_bytes()
    path.write_bytes(content)


CHANGES: dict[str, Change] = {
    "empty": cut(0),
    "one byte left": cut(1),
    "half": halve,
    "two bytes short": cut(-2),
    "one byte more": lengthen,
    "zeros at the end": zero_end,
    "missing": remove,
    "a folder in its place": make_folder,
    "a pipe in its place": make_pipe,
    "that of another step": from_other_step,
}


@contextlib.contextmanager
def changed(path: Path, change: Change) -> Iterator[None]:
    """A file as `change` leaves it, and then as it was."""
    content = path.read_bytes()
    change(path)
    try:
        yield
    finally:
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(content)


def files_of(step_directory: Path) -> list[Path]:
    return sorted(path for path in step_directory.iterdir() if path.is_file())


def load_damaged(rank: int, journal: Journal, directory: str, num_flips: int) -> None:
    """Load the newest step on all ranks with one damage after the other; each must be refused on every rank."""
    manager = CheckpointManager(directory)
    newest = manager.path(2)
    sampler = random.Random(7)
    flips = []
    for path in files_of(newest):
        places = positions(path, num_flips, 7)
        flips += [(path.name, place, 1 << place % 8) for place in sampler.sample(places, min(num_flips, len(places)))]
    with rankwise.init(device_type="cpu"):
        for name, place, change in flips:
            with on_main(rank, lambda: changed_byte(newest / name, place, change)):  # noqa: B023
                try_to_load(rank, journal, manager, f"bit of {name}", name)
        for name in [path.name for path in files_of(newest)]:
            for what, change_file in CHANGES.items():
                with on_main(rank, lambda: changed(newest / name, change_file)):  # noqa: B023
                    try_to_load(rank, journal, manager, what, name)
        state = make_state(MANY, rank)
        assert manager.load(state) == 2, "the step is as it was"
        require_equal(manager, 2, state, rank)


@contextlib.contextmanager
def on_main(rank: int, context: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """A block in which the main process has changed something."""
    with context() if rank == 0 else contextlib.nullcontext():
        rankwise.barrier()
        yield
        rankwise.barrier()


def try_to_load(rank: int, journal: Journal, manager: CheckpointManager, what: str, name: str) -> None:
    state = make_state(MANY, rank)
    before = {key: tensor.clone() for key, tensor in state["net"].items()}
    told, error_type = "", ""
    begin = time.monotonic()
    try:
        manager.load(state, 2)
    except CheckpointError as error:
        told, error_type = str(error), type(error).__name__
    seconds = time.monotonic() - begin
    untouched = all(torch.equal(tensor, before[key]) for key, tensor in state["net"].items())
    older = manager.load(state)
    if older == 1:
        require_equal(manager, 1, state, rank)
    row = {"name": name, "error": error_type, "told": told, "untouched": untouched, "older": older, "seconds": seconds}
    journal.note("tried", damage=what, **row)


def swap_steps(directory: Path) -> None:
    """Each of two steps under the other's name."""
    one, two = directory / "step-00000001", directory / "step-00000002"
    shutil.move(one, directory / "aside")
    shutil.move(two, one)
    shutil.move(directory / "aside", two)


def change_number(step_directory: Path, name: str, value: int) -> None:
    """A manifest that somebody has edited."""
    path = step_directory / "manifest.json"
    body = json.loads(path.read_text())
    body[name] = value
    path.write_text(json.dumps(body))
