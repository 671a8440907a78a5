"""Jobs that go on from each other in one folder, each ended by a kill, and what must be true after each."""

from __future__ import annotations

import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from crash_faults import Shadow
from crash_jobs import Hatchery, Job, Line
from crash_ranks import KEEP_LAST

HEARD_SECONDS = 20.0
"""How long the other rank may take to end once one was killed: it takes tenths of a second where the cores are free."""

IMAGES = {
    "synced names alone": ("synced", "synced"),
    "synced names, but for what was removed since": ("both", "synced"),
    "all names of steps, synced names in them": ("current", "synced"),
    "all names": ("current", "current"),
}
"""What may be left of synced contents where the machine loses its power: names of steps, and in them."""


class Tally:
    """Counts what was seen, by heading."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._seconds: dict[str, list[float]] = {}

    def count(self, heading: str, what: str) -> None:
        self._counts.setdefault(heading, Counter())[what] += 1

    def time(self, heading: str, seconds: float) -> None:
        self._seconds.setdefault(heading, []).append(seconds)

    def total(self, heading: str) -> int:
        return sum(self._counts.get(heading, Counter()).values())

    def number(self, heading: str, what: str) -> int:
        return self._counts.get(heading, Counter())[what]

    def lines(self) -> list[str]:
        lines = []
        for heading, counts in self._counts.items():
            lines.append(f"{heading} ({sum(counts.values())}):")
            lines += [f"  {number:5d}  {what}" for what, number in sorted(counts.items(), key=lambda each: -each[1])]
        for heading, all_seconds in self._seconds.items():
            median, most = statistics.median(all_seconds), max(all_seconds)
            lines.append(f"{heading}: median {median:.2f} s, at most {most:.2f} s, of {len(all_seconds)}")
        return lines


class Chain:
    """Jobs of two ranks that write in one folder, one after the other.

    Attributes:
        told: steps that a rank was told to be saved.
        committed: those, and what kills have left that was loaded since.
    """

    def __init__(self, hatchery: Hatchery, folder: Path, tally: Tally, *, shadow: bool = False) -> None:
        self.directory = folder / "checkpoints"
        self.told: set[int] = set()
        self.committed: set[int] = set()
        self._hatchery = hatchery
        self._folder = folder
        self._tally = tally
        self._shadow = Shadow(folder / "shadow") if shadow else None
        self._newest: int | None = None

    def start(self, **arguments: Any) -> Job:
        shadow = str(self._folder / "shadow") if self._shadow is not None else ""
        return self._hatchery.start("train", directory=str(self.directory), shadow=shadow, **arguments)

    def judge(self, job: Job, killed: set[int], at: float) -> None:
        """Ask what must be true after a job that lost the ranks `killed` at a moment, and count it."""
        statuses = job.join(HEARD_SECONDS + 40)
        for rank, status in enumerate(statuses):
            if rank in killed:
                assert status == -9, f"rank {rank} was not killed but ended with {status}\n{job.output()}"
            else:
                seconds = job.ends[rank]["at"] - at
                assert status == 1, f"rank {rank} ended with {status} though the other was killed\n{job.output()}"
                assert seconds < HEARD_SECONDS, f"rank {rank} ended {seconds:.1f} s after the other was killed"
                self._tally.time("from the kill to the end of the other rank", seconds)
        self._judge_life(job)
        self._look(job)
        job.clear()

    def go_on(self, num_saves: int, **arguments: Any) -> Job:
        """One more job, which nobody kills."""
        job = self.start(num_saves=num_saves, **arguments)
        assert job.join() == [0, 0], job.output()
        self._judge_life(job)
        names = self._look(job)
        assert not [name for name in names if name.startswith(".")], names
        assert self._newest == max(self.committed)
        return job

    def _judge_life(self, job: Job) -> None:
        """What a job found when it started, and that it saved at once."""
        for rank in (0, 1):
            for line in job.journal(rank, "loaded"):
                assert line["step"] == self._newest, f"{line} but the newest was {self._newest}\n{job.output()}"
        loaded, saved = job.journal(0, "loaded"), job.journal(0, "saved")
        if loaded and saved:
            self._tally.time("from the load to the first save of the next job", saved[0]["at"] - loaded[0]["at"])
            self._tally.count("lives", "took the lease over and saved at once")
        elif loaded:
            self._tally.count("lives", "was killed at its first save")

    def _look(self, job: Job) -> list[str]:
        """What a fresh process sees, and would see after a loss of power: nothing that a rank was told of is lost."""
        told = {line["step"] for rank in (0, 1) for line in job.journal(rank, "saved")}
        self.told |= told
        self.committed |= told
        if not self.directory.exists():
            assert not self.committed
            return []
        images = self._images()
        folders = {"a fresh process": self.directory, **images}
        looking = self._hatchery.start("look", 1, directories=[str(path) for path in folders.values()], num_places=2)
        assert looking.join() == [0], looking.output()
        rows = looking.journal(0, "seen")
        looking.clear()
        # A step whose save was killed right after the rename is there, and a loss of power may still undo that.
        for who, row in zip(folders, rows, strict=True):
            self._require_whole(who, row, self.told if who in images else self.committed)
        for words, image in images.items():
            self._tally.count("loss of power at the same moment: every step whole, none lost", words)
            shutil.rmtree(image)
        steps = [step for step, _ in rows[0]["steps"]]
        self._newest = steps[-1] if steps else None
        if -9 in job.join():
            is_new = bool(steps) and steps[-1] > max(self.committed, default=0)
            self._tally.count("what the killed job left", self._describe(rows[0]["names"], is_new))
        # What a mere kill has left is committed: the next job goes on from it.
        self.committed |= set(steps)
        return list(rows[0]["names"])

    def _require_whole(self, who: str, row: Line, must: set[int]) -> None:
        damaged = [problem for _, problem in row["steps"] if problem]
        assert not damaged, f"{who}: {damaged}"
        steps = [step for step, _ in row["steps"]]
        assert max(steps, default=0) >= max(must, default=0), f"{who}: {max(must)} was committed, there is {steps}"
        lost = [step for step in must if step not in steps and sum(other > step for other in steps) < KEEP_LAST]
        assert not lost, f"{who}: steps {lost} were committed and not replaced, there is {steps}"

    def _images(self) -> dict[str, Path]:
        """What would be left if the machine had lost its power, too; in several ways."""
        images: dict[str, Path] = {}
        if self._shadow is None:
            return images
        for words, names in IMAGES.items():
            images[words] = self._folder / f"image-{len(images)}"
            self._shadow.image(self.directory, images[words], names=names)
        return images

    def _describe(self, names: list[str], is_new: bool) -> str:
        staged = [name for name in names if name.startswith(".staging-")]
        if staged:
            inside = {path.name for path in (self.directory / staged[0]).iterdir()}
            return f"a staged step: {_how_far(inside)}"
        if any(name.startswith(".trash-") for name in names):
            return "the new step, and an old one half removed"
        if any(name.startswith(".lease-") for name in names):
            return "a lease half taken"
        if is_new:
            return "a new step that no rank had been told of"
        return "whole steps alone"


def _how_far(names: set[str]) -> str:
    if "manifest.json" in names:
        return "all of it, to be renamed"
    if any(name.startswith(".manifest") for name in names):
        return "its manifest being written"
    if ".metadata" in names or "tensors.json" in names:
        return "tensors.json or .metadata being written"
    if len([name for name in names if name.startswith("rank-")]) == 2:
        return "the parts of both ranks written, or nearly"
    return "the parts of the ranks being written" if names else "nothing in it yet"
