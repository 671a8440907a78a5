"""`assert_exact_resume`: a training loop that is stopped comes to the very state that it would have come to anyway."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rankwise import collectives
from rankwise.checkpoint import CheckpointManager
from rankwise.checkpoint.folder import find_steps, step_name
from rankwise.ckpt.differing import compare
from rankwise.ckpt.values import read_step
from rankwise.group import place_in_group
from rankwise.identity import Identity
from rankwise.seed import RngState, seed_all

Train = Callable[[Path, int], object]

_MAX_LINES = 24
_MAX_VALUES = 3
_MAX_CHARACTERS = 60
_ADVICE = (
    "What a loop carries from step to step must be saved and loaded: weights, averages, optimizers, schedules, "
    "gradient scalers, the place in the data, and, of every rank, its random generators."
)


def assert_exact_resume(
    train: Train,
    folder: str | os.PathLike[str],
    *,
    num_steps: int,
    stops: Sequence[int] = (),
    crashes: Sequence[int] = (),
    ignore: Collection[str] = (),
    checkpoints: str = "checkpoints",
) -> None:
    """Fail unless `train` comes to the same checkpoint, bit for bit, however often it is stopped and started again.

    `train(run_dir, num_steps)` trains from the newest checkpoint of `run_dir`, or from the start where there is none,
    to `num_steps`, and saves there with a `CheckpointManager`. It is run without a stop; once with all of `stops`; and
    once for each of `crashes`. Then everything that the checkpoints at `num_steps` hold is compared, of every rank.
    A failure costs a few more runs, to tell which stop is to blame, or that not even two runs without one are equal.

    All runs are in this process, and its random generators are reseeded before each: equally before the runs that
    start afresh, differently where one goes on. What else a loop keeps outside of `train` is not seen to be lost; to be
    sure of that, let `train` start processes of its own.

    Args:
        folder: gets a run folder for each run; empty, or not there yet, and shared by all ranks.
        stops: steps at which a run ends as if that were all, and is started again.
        crashes: steps that `train` saves on its way; a run goes on from that checkpoint alone, as after a crash. Where
            saves are asynchronous, training went on while these were written.
        ignore: what may differ: items, or parts of them by their way, such as "config.run_dir".
        checkpoints: where in `run_dir` the checkpoints lie; "." where it is the folder itself.
    Raises:
        AssertionError: names each item that differs, the tensor that does most, how many of its values and by how much,
            and the stop; or says that a checkpoint is missing, or that nothing was loaded. On every rank.
        ValueError: the steps are out of order, or there is none to stop at.
    Ranks: every rank must call; one process too where `train` starts the ranks itself.
    """
    __tracebackhide__ = True
    _check_steps(num_steps, stops, crashes)
    trials = _Trials(train, Path(folder), num_steps, checkpoints, tuple(ignore))
    _fail_together(trials.find_earlier_runs)
    with _own_generators():
        trials.run("straight")
        if stops and (differences := trials.differences(trials.run("stopped", stops=stops))):
            trials.require_reproducible()
            raise AssertionError(trials.describe(*trials.blame(stops, differences)))
        for crash in crashes:
            if differences := trials.differences(trials.run(f"crashed-{crash}", crash=crash)):
                trials.require_reproducible()
                how = f"Started again from its checkpoint of step {crash}, as after a crash"
                raise AssertionError(trials.describe(how, differences))


@dataclass
class _Trials:
    """Runs of one training loop in folders beside each other."""

    train: Train
    folder: Path
    num_steps: int
    checkpoints: str
    ignore: tuple[str, ...]
    seeds: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def name(self) -> str:
        function = self.train.func if isinstance(self.train, functools.partial) else self.train
        return getattr(function, "__name__", type(function).__name__)

    def step_directory(self, run: str, step: int) -> Path:
        return self.folder / run / self.checkpoints / step_name(step)

    def find_earlier_runs(self) -> str | None:
        if not self.folder.is_dir() or not (names := sorted(os.listdir(self.folder))):
            return None
        return f"{self.folder} is not empty, there is {names[0]}: runs would go on from it. Give an empty folder."

    def run(self, run: str, *, stops: Sequence[int] = (), crash: int | None = None) -> str:
        """Train to the end, with stops, or from a checkpoint of the run without one."""
        __tracebackhide__ = True
        begin = 0
        if crash is not None:
            _fail_together(lambda: self._copy_checkpoint(run, crash))
            begin = crash
        for stop in (*stops, self.num_steps):
            self._train(run, begin, stop)
            begin = stop
        return run

    def differences(self, run: str) -> list[str]:
        """What differs at the end from the run without a stop: a line for every item."""
        return collectives.on_main_process(self._compare, run)

    def require_reproducible(self) -> None:
        """Two runs without a stop must be equal, or nothing can be told of stops."""
        __tracebackhide__ = True
        if lines := self.differences(self.run("straight-again")):
            raise AssertionError(
                f"{self.name} is not reproducible: two runs without any stop differ at step {self.num_steps}, so "
                "nothing can be told of its stops. Seed all random generators, compute in a fixed order "
                "(torch.use_deterministic_algorithms), and give as `ignore` what depends on the clock or on where the "
                f"run folder lies:\n{_shorten(lines)}"
            )

    def blame(self, stops: Sequence[int], differences: list[str]) -> tuple[str, list[str]]:
        """Which stop does it, and what then differs."""
        if len(stops) == 1:
            return f"Stopped at step {stops[0]} and started again", differences
        for stop in stops:
            if alone := self.differences(self.run(f"stopped-{stop}", stops=[stop])):
                return f"Stopped at step {stop} and started again", alone
        named = ", ".join(map(str, stops))
        return f"Stopped at each of the steps {named}, though not at one of them alone,", differences

    def describe(self, how: str, differences: list[str]) -> str:
        return (
            f"{self.name} does not resume exactly. {how}, it is not at step {self.num_steps} what it is there without "
            f"a stop:\n{_shorten(differences)}\n{_ADVICE}"
        )

    def _train(self, run: str, begin: int, stop: int) -> None:
        __tracebackhide__ = True
        identity = place_in_group(Identity.resolve(os.environ))
        # A loop that loads no random state must not find the one that its own last step has left.
        seed_all(next(self.seeds) if begin else 0, identity)
        with _watching() as seen:
            self.train(self.folder / run, stop)
        # Reading is where a save may still be on its way: the checkpoint has to be there when `train` is done.
        _fail_together(lambda: self._find_fault(run, begin, stop, seen))

    def _find_fault(self, run: str, begin: int, stop: int, seen: _Seen) -> str | None:
        directory = self.step_directory(run, stop)
        if not directory.is_dir():
            there = ", ".join(map(str, find_steps(directory.parent))) or "none"
            return (
                f"{self.name}(run_dir, {stop}) left no checkpoint of step {stop} in {directory.parent} (there is: "
                f"{there}). It must save its last step, and wait for the save to be done."
            )
        # Where all of it is in processes of its own, nothing is seen, and nothing can be said.
        if begin and seen.has_saved and begin not in seen.loaded:
            return (
                f"{self.name}(run_dir, {stop}) did not load step {begin}, the newest that was there: it starts afresh, "
                "or goes on from elsewhere. It must load the newest checkpoint of run_dir."
            )
        return None

    def _copy_checkpoint(self, run: str, step: int) -> str | None:
        source = self.step_directory("straight", step)
        if not source.is_dir():
            there = ", ".join(map(str, find_steps(source.parent))) or "none"
            return (
                f"the run without a stop left no checkpoint of step {step} (there is: {there}). Name as crashes steps "
                f"that {self.name} saves on its way to step {self.num_steps}, and keeps."
            )
        shutil.copytree(source, self.step_directory(run, step))
        return None

    def _compare(self, run: str) -> list[str]:
        sides = [read_step(self.step_directory(each, self.num_steps)) for each in ("straight", run)]
        if not sides[0].items:
            return ["the checkpoints hold nothing that could be compared"]
        return _as_lines(compare(*sides), self.ignore, sides[0].manifest.per_rank_items)


def _as_lines(found: Any, ignore: Sequence[str], per_rank_items: Collection[str]) -> list[str]:
    tensors: dict[str, list[str]] = {}
    values: dict[str, list[str]] = {}

    def note(lines: dict[str, list[str]], place: str, text: str) -> None:
        if not any(place == each or place.startswith(f"{each}.") for each in ignore):
            owner, way = _split(place, per_rank_items)
            lines.setdefault(owner, []).append(f"{way} {text}".strip())

    for each in found.changed:
        note(
            tensors,
            each.name,
            f"in {each.num_changed} of {each.num_values} values, by {each.max_abs:.6g} at most",
        )
    for place, forms in found.forms.items():
        note(tensors, place, f"is {forms[0]} without a stop, and {forms[1]} with it")
    for place in found.only_a:
        note(tensors, place, "is there without a stop only")
    for place in found.only_b:
        note(tensors, place, "is there with the stop only")
    for place, (one, other) in found.values.items():
        note(values, place, f"is {_cut(one)} without a stop, and {_cut(other)} with it")

    lines = []
    for owner in dict.fromkeys((*tensors, *values)):
        if owner in tensors:
            count = len(tensors[owner])
            lines.append(f"{owner}: {count} tensor{'s differ, most' if count > 1 else ' differs'}: {tensors[owner][0]}")
        lines += [f"{owner}: value {text}" for text in values.get(owner, [])[:_MAX_VALUES]]
        if (more := len(values.get(owner, [])) - _MAX_VALUES) > 0:
            lines.append(f"{owner}: and {more} more values")
    return lines


def _split(place: str, per_rank_items: Collection[str]) -> tuple[str, str]:
    """Whose a place is, and the way to it from there."""
    item, _, way = place.partition(".")
    if item in per_rank_items and (match := re.match(r"rank-(\d+)\.?", way)):
        return f"{item!r} of rank {int(match[1])}", way[match.end() :]
    return repr(item), way


@dataclass
class _Seen:
    """What was done with checkpoints in this process."""

    loaded: list[int | None] = field(default_factory=list)
    has_saved: bool = False


@contextlib.contextmanager
def _watching() -> Iterator[_Seen]:
    """Note what is loaded: a loop that starts afresh each time would pass every comparison."""
    seen = _Seen()
    load, save = CheckpointManager.load, CheckpointManager.save

    def watched_load(self: CheckpointManager, *args: Any, **kwargs: Any) -> int | None:
        step = load(self, *args, **kwargs)
        seen.loaded.append(step)
        return step

    def watched_save(self: CheckpointManager, *args: Any, **kwargs: Any) -> None:
        seen.has_saved = True
        save(self, *args, **kwargs)

    with (
        mock.patch.object(CheckpointManager, "load", watched_load),
        mock.patch.object(CheckpointManager, "save", watched_save),
    ):
        yield seen


@contextlib.contextmanager
def _own_generators() -> Iterator[None]:
    """The caller's random generators go on afterwards where they were."""
    generators = RngState(torch.device("cpu"))
    before = generators.state_dict()
    try:
        yield
    finally:
        generators.load_state_dict(before)


def _check_steps(num_steps: int, stops: Sequence[int], crashes: Sequence[int]) -> None:
    if not stops and not crashes:
        raise ValueError("there are no stops and no crashes, so nothing would be resumed. Give a step of either.")
    for name, steps in (("stops", stops), ("crashes", crashes)):
        if not all(0 < step < num_steps for step in steps) or list(steps) != sorted(set(steps)):
            raise ValueError(
                f"{name} are {list(steps)}, but they must be steps between 0 and num_steps ({num_steps}), in order."
            )


def _fail_together(find_fault: Callable[[], str | None]) -> None:
    """Raise on every rank what the main process finds."""
    __tracebackhide__ = True
    if fault := collectives.on_main_process(find_fault):
        raise AssertionError(fault)


def _shorten(lines: Sequence[str]) -> str:
    shown = [f"  {line}" for line in lines[:_MAX_LINES]]
    if len(lines) > _MAX_LINES:
        shown.append(f"  ... and {len(lines) - _MAX_LINES} more lines")
    return "\n".join(shown)


def _cut(text: str | None) -> str:
    if text is None:
        return "absent"
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."
