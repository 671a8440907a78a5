"""What the ranks of the jobs do: they save states whose every bit follows from the step, and look at what is there."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from crash_faults import Watch

import rankwise
from rankwise import CheckpointManager, PerRank
from rankwise.checkpoint import folder
from rankwise.errors import CheckpointError

KEEP_LAST = 2
MANY = 100_000


class Journal:
    """What this process has done; each line is there as soon as it is written, whatever becomes of the process."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._write = os.write  # before anything is patched

    def note(self, what: str, **more: Any) -> None:
        line = json.dumps({"what": what, "at": time.monotonic(), **more})
        self._write(self._descriptor, line.encode() + b"\n")


def make_state(step: int, rank: int, num_rows: int = 256) -> dict[str, Any]:
    """The state of a step: the larger tensors are spread over the ranks, the rest is the main process's."""
    random = torch.Generator().manual_seed(step)
    own = torch.Generator().manual_seed(1_000_003 * step + rank)
    return {
        "net": {
            "weight": torch.randn(num_rows, 100, generator=random),
            "moment": torch.randint(0, 2**62, (num_rows, 50), generator=random),
            "bias": torch.randn(100, generator=random).to(torch.bfloat16),
        },
        "step": step,
        "own": PerRank({"noise": torch.randn(50, generator=own), "place": [step, rank]}),
    }


def is_equal(state: dict[str, Any], step: int, rank: int) -> bool:
    """Whether all tensors of a state are those of the step, to the bit."""
    wanted = make_state(step, rank, state["net"]["weight"].shape[0])
    pairs = [(state["net"][name], tensor) for name, tensor in wanted["net"].items()]
    pairs.append((state["own"].item["noise"], wanted["own"].item["noise"]))
    return all(torch.equal(here.view(torch.uint8), there.view(torch.uint8)) for here, there in pairs)


def require_equal(manager: CheckpointManager, step: int, state: dict[str, Any], rank: int) -> None:
    if not is_equal(state, step, rank):
        raise AssertionError(f"step {step} does not come back as it was saved")
    if manager.read("step", step) != step or manager.read("own", step, rank=rank)["place"] != [step, rank]:
        raise AssertionError(f"the plain values of step {step} are not those that were saved")


def train(
    rank: int,
    journal: Journal,
    directory: str,
    async_save: bool = False,
    num_saves: int = MANY,
    shadow: str = "",
    watch: bool = False,
    fault: dict[str, Any] | None = None,
    on_failure: str = "raise",
    num_rows: int = 256,
    keep_last: int | None = KEEP_LAST,
) -> None:
    """Go on from the newest step and save each one after it.

    Args:
        fault: where, on which rank ("rank"), at which save of this life ("save", 0 for the taking of the lease too).
    """
    root = Path(directory)
    eye = Watch(root, Path(shadow) if shadow else None) if shadow or fault or watch else None
    if eye is not None:
        eye.tell = lambda call: journal.note("fired", call=call)
    with rankwise.init(device_type="cpu"), make_manager(root, async_save, on_failure, keep_last) as manager:
        state = make_state(MANY, rank, num_rows)
        step = manager.load(state)
        if step is not None:
            require_equal(manager, step, state, rank)
        journal.note("loaded", step=step)
        step = step or 0
        if fault and fault["save"] == 0:
            set_off(eye, rank, fault)
            manager.acquire()
        for number in range(1, num_saves + 1):
            step += 1
            if fault and fault["save"] == number:
                set_off(eye, rank, fault)
            state = make_state(step, rank, num_rows)
            journal.note("saving", step=step)
            manager.save(step, state)
            if async_save:
                # Only one may be under way, so the one before is durable.
                if number > 1:
                    journal.note("saved", step=step - 1)
                if number == num_saves or fault:
                    manager.wait()
                    journal.note("saved", step=step)
            else:
                journal.note("saved", step=step)
            if fault and fault["save"] <= number and eye is not None:
                journal.note("calls", calls=eye.calls)
                eye.disarm()
    journal.note("end")


def make_manager(
    root: Path, async_save: bool, on_failure: str = "raise", keep_last: int | None = KEEP_LAST
) -> CheckpointManager:
    choice = "warn" if on_failure == "warn" else "raise"
    return CheckpointManager(root, keep_last=keep_last, async_save=async_save, on_failure=choice)


def set_off(eye: Watch | None, rank: int, fault: dict[str, Any]) -> None:
    assert eye is not None
    counted = None if fault.get("counted") is None else set(fault["counted"])
    index = fault["index"] if rank == fault["rank"] else -1
    eye.arm(counted, index, fault["kind"], fault.get("seconds", 0.0))


def look(rank: int, journal: Journal, directories: list[str], num_places: int) -> None:
    """In a fresh process: which steps are in each folder, and whether each is what was saved, for every rank."""
    for directory in directories:
        manager = CheckpointManager(directory)
        found = [(step, judge_step(manager, step, num_places)) for step in manager.steps()]
        journal.note("seen", steps=found, names=sorted(os.listdir(directory)))


def judge_step(manager: CheckpointManager, step: int, num_places: int) -> str:
    """What is wrong with a step; empty where it is what was saved."""
    try:
        manager.verify(step)
        for place in range(num_places):
            # This process is no rank of that job: it reads the parts of all of them.
            item = {"net": manager.read("net", step), "own": PerRank(manager.read("own", step, rank=place))}
            if not is_equal(item, step, place):
                return f"the tensors of step {step} are not those that were saved"
            if manager.read("step", step) != step or item["own"].item["place"] != [step, place]:
                return f"the plain values of step {step} are not those that were saved"
    except CheckpointError as error:
        return str(error)
    return ""


def fail_and_go_on(
    rank: int,
    journal: Journal,
    directory: str,
    async_save: bool,
    faulty_rank: int,
    kinds: list[str],
    from_start: bool,
    every_call: bool,
) -> None:
    """Let file-system calls of a save fail, one at a time: all ranks must hear it, and the next save must work.

    Args:
        kinds: names of errnos, which take turns.
        every_call: each call fails once; else, each place in the code.
        from_start: the lease is taken anew for each save.
    """
    root = Path(directory)
    eye = Watch(root)
    with rankwise.init(device_type="cpu"):
        manager = make_manager(root, async_save)
        saved: list[int] = []

        def save(step: int, index: int, kind: str) -> tuple[str, str]:
            nonlocal manager
            if from_start:
                manager.close()
                manager = make_manager(root, async_save)
            set_off(eye, rank, {"rank": faulty_rank, "index": index, "kind": kind})
            try:
                manager.save(step, make_state(step, rank))
                manager.wait()
            except Exception as error:
                return type(error).__name__, str(error)
            finally:
                eye.disarm()
            saved.append(step)
            return "", ""

        for step in range(1, 5):  # the last of these removes an old step, as each one after it
            assert save(step, -1, "none") == ("", "")
        indices = range(len(eye.calls)) if every_call else one_per_place(eye.calls)
        indices = rankwise.broadcast_object(list(indices), source=faulty_rank)
        for number, index in enumerate(indices):
            kind = kinds[number % len(kinds)]
            step = saved[-1] + 1
            begin = time.monotonic()
            error_type, told = save(step, index, kind)
            seconds = time.monotonic() - begin
            problem = find_problem(root, step, told, saved, rank)
            fired = None if eye.fired is None else list(eye.fired)
            row = {"index": index, "kind": kind, "fired": fired, "error": error_type, "told": told, "seconds": seconds}
            journal.note("tried", **row, problem=problem)
            rankwise.barrier()
            again = save(step, -1, "none")
            assert again == ("", ""), f"the save after {row} fails too: {again}"
        manager.close()
    journal.note("end")


def one_per_place(calls: list[tuple[str, str, str]]) -> list[int]:
    """The first call of each kind at each place in the code."""
    seen: dict[tuple[str, str], int] = {}
    for index, (kind, place, _) in enumerate(calls):
        seen.setdefault((kind, place), index)
    return list(seen.values())


def find_problem(root: Path, step: int, told: str, saved: list[int], rank: int) -> str:
    """What is wrong after a save at which a call failed; empty where all is well."""
    manager = CheckpointManager(root)
    steps = manager.steps()
    if not told and step not in steps:
        return f"the save raised nothing, but there is no step {step}"
    if told and step in steps and "is there and whole" not in told:
        return f"the save failed, but there is a step {step}"
    for other in steps:
        folder.verify(root / folder.step_name(other))
    lost = [other for other in saved if other not in steps and sum(newer > other for newer in steps) < KEEP_LAST]
    if lost:
        return f"steps {lost} are lost"
    state = make_state(MANY, rank)
    loaded = manager.load(state)
    if loaded != steps[-1]:
        return f"step {loaded} was loaded, not {steps[-1]}"
    require_equal(manager, steps[-1], state, rank)
    return ""
