"""What the ranks of jobs do on bad disks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crash_faults import Watch
from crash_ranks import MANY, Journal, make_manager, make_state, require_equal, set_off

import rankwise
from rankwise import CheckpointManager
from rankwise.checkpoint.together import Assembly
from rankwise.errors import CheckpointError

DISK_BYTES = 4 << 20
NUM_ROWS = 1200
"""Of a state of 1 MB: three of them fit, beside the one that is being written, but not with what fills the disk."""


def attempt(manager: CheckpointManager, journal: Journal, rank: int, step: int) -> None:
    """Try to save, and note what came of it."""
    begin = time.monotonic()
    told, error_type = "", ""
    try:
        manager.save(step, make_state(step, rank, NUM_ROWS))
        manager.wait()
    except Exception as error:
        told, error_type = str(error), type(error).__name__
    seconds = time.monotonic() - begin
    rankwise.barrier()
    steps, loaded = manager.steps(), None
    if steps:
        state = make_state(MANY, rank, NUM_ROWS)
        loaded = manager.load(state)
        require_equal(manager, steps[-1], state, rank)
    there = os.listdir(manager.directory) if manager.directory.exists() else []
    leftovers = [name for name in there if name.startswith(".")]
    more = {"steps": steps, "loaded": loaded, "leftovers": leftovers, "user": os.getuid()}
    journal.note("tried", error=error_type, told=told, seconds=seconds, **more)
    rankwise.barrier()


def on_main(function: Callable[..., Any], *args: Any) -> None:
    rankwise.on_main_process(function, *args)


def mount(directory: Path, options: str) -> None:
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)


def fill(directory: Path) -> None:
    """Use up the disk but for less than a state takes."""
    free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
    (directory / "filler").write_bytes(bytes(max(0, free - (300 << 10))))


def meet_full_disk(rank: int, journal: Journal, directory: str, async_save: bool) -> None:
    disk = Path(directory)
    with rankwise.init(device_type="cpu"):
        on_main(mount, disk, f"size={DISK_BYTES}")
        with make_manager(disk / "checkpoints", async_save) as manager:
            attempt(manager, journal, rank, 1)
            on_main(fill, disk)
            attempt(manager, journal, rank, 2)
            attempt(manager, journal, rank, 2)
            try:
                rankwise.save_on_main(make_state(2, rank, NUM_ROWS)["net"], disk / "net.pt")
            except CheckpointError as error:
                journal.note("save_on_main", told=str(error), names=sorted(os.listdir(disk)))
            rankwise.barrier()
            on_main(os.unlink, disk / "filler")
            attempt(manager, journal, rank, 2)
            attempt(manager, journal, rank, 3)
        rankwise.barrier()
        on_main(lambda: subprocess.run(["umount", str(disk)], check=True))


def meet_read_only_disk(rank: int, journal: Journal, directory: str, from_start: bool = False) -> None:
    disk = Path(directory)
    with rankwise.init(device_type="cpu"):
        on_main(mount, disk, "size=64m" + (",ro" if from_start else ""))
        with make_manager(disk / "checkpoints", async_save=False) as manager:
            if not from_start:
                attempt(manager, journal, rank, 1)
                # What is open for writing, as the lease is, keeps a disk from becoming read-only: its files do not.
                on_main(lambda: subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True))
                on_main(lambda: subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True))
            step = 1 if from_start else 2
            attempt(manager, journal, rank, step)
            remount = "remount,rw" if from_start else "remount,bind,rw"
            on_main(lambda: subprocess.run(["mount", "-o", remount, str(disk)], check=True))
            attempt(manager, journal, rank, step)
        rankwise.barrier()
        on_main(lambda: subprocess.run(["umount", "--lazy", "--recursive", str(disk)], check=True))


def try_to_save(rank: int, journal: Journal, directory: str, num_saves: int) -> None:
    with rankwise.init(device_type="cpu"), make_manager(Path(directory), async_save=False) as manager:
        for step in range(1, num_saves + 1):
            attempt(manager, journal, rank, step)


def save_slowly(rank: int, journal: Journal, directory: str, async_save: bool, seconds: float) -> None:
    """Two saves, at which each sync takes `seconds` longer."""
    root = Path(directory)
    eye = Watch(root)
    with rankwise.init(device_type="cpu"), make_manager(root, async_save) as manager:
        manager.acquire()
        set_off(eye, rank, {"rank": rank, "index": -1, "kind": "slow", "seconds": seconds})
        begin = time.monotonic()
        manager.save(1, make_state(1, rank))
        first = time.monotonic() - begin
        manager.save(2, make_state(2, rank))
        second = time.monotonic() - begin - first
        manager.wait()
        whole = time.monotonic() - begin
        journal.note("slow", save=first, second=second, whole=whole, steps=manager.steps())


def die_in_vote(rank: int, journal: Journal, directory: str, victim: int, vote: str) -> None:
    """Be killed at one of the three talks of the second save, right after the other rank has joined it."""
    root = Path(directory)
    number = {"begin": 0, "gather": 1, "finish": 2}[vote]
    talks = [0]
    talk = Assembly._talk

    def die_or_talk(self: Assembly, what: str, call: Callable[[], object]) -> None:
        talks[0] += 1
        if rank == victim and talks[0] == 3 + number + 1:
            time.sleep(0.2)  # the other one waits in it by now
            os.kill(os.getpid(), signal.SIGKILL)
        talk(self, what, call)

    Assembly._talk = die_or_talk  # type: ignore[method-assign]
    with rankwise.init(device_type="cpu"), make_manager(root, async_save=False) as manager:
        manager.save(1, make_state(1, rank))
        assert talks[0] == 3
        manager.save(2, make_state(2, rank))
