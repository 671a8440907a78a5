"""`rankwise ckpt prune`: old steps and leftovers go, under the lease, and never the newest whole step."""

from __future__ import annotations

import argparse
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from rankwise.checkpoint import folder
from rankwise.checkpoint.holder import read_highest
from rankwise.checkpoint.lease import Lease
from rankwise.checkpoint.manifest import say as say_error
from rankwise.ckpt.listing import size_and_age
from rankwise.ckpt.output import say, show_bytes, tell
from rankwise.ckpt.places import LEFTOVERS, find_leftovers, find_place, kind_of, step_number
from rankwise.ckpt.verifying import find_problems
from rankwise.errors import CheckpointError, CheckpointLeaseError
from rankwise.files import fsync_directory


@dataclass
class Plan:
    """What goes, and why; what stays.

    Attributes:
        remove: directories with the reason.
        newest: the newest step that was read and found whole; None where there is none.
        damaged: steps found damaged that stay.
    """

    remove: list[tuple[Path, str]] = field(default_factory=list)
    newest: Path | None = None
    damaged: list[Path] = field(default_factory=list)


def run(options: argparse.Namespace) -> int:
    """Remove what need not be kept, and say so.

    Returns:
        The exit status: 0 where that was done; 1 where something could not be removed, or no step is whole.
    Raises:
        CheckpointLeaseError: a job writes there.
        CheckpointError: there is no such folder, or it is one step.
        OSError: the folder cannot be read.
    Ranks: local, in no job.
    """
    directory = find_place(options.run).folder
    if directory is None:
        raise CheckpointError(f"{options.run} is one step. Give the run, or the folder of checkpoints.")
    if options.dry_run:
        _refuse_if_held(directory)
    elif not find_place(options.run).steps and not find_leftovers(directory):
        say(f"nothing to remove in {directory}")
        return 0
    with nullcontext() if options.dry_run else _Held(directory) as lease:
        # Only now, when nobody else can change what is there.
        steps = find_place(options.run).steps
        plan = make_plan(directory, steps, options.keep_last, options.keep_every, options.broken)
        for path in plan.damaged:
            advice = "" if options.broken else ", --broken removes it"
            tell(f"{path} is damaged and stays: rankwise ckpt verify tells more{advice}")
        if is_hopeless := bool(plan.damaged) and plan.newest is None:
            tell(f"no step in {directory} is whole, so no step is removed")
        num_failed = _remove_all(plan.remove, None if lease is None else lease.check)
    if not plan.remove:
        say(f"nothing to remove in {directory}")
    return 1 if num_failed or is_hopeless else 0


def make_plan(
    directory: Path, steps: Sequence[Path], keep_last: int | None, keep_every: int | None, broken: bool
) -> Plan:
    """What to remove. Steps that count as kept are read in full; a damaged one does not count.

    Args:
        steps: the newest last.
        keep_last, keep_every: as `CheckpointManager`; keep_every alone keeps the newest one besides.
    Ranks: local, under the lease.
    """
    plan = Plan()
    if keep_last is not None or keep_every or broken:
        _plan_steps(plan, steps, keep_last, keep_every, broken)
    for leftover in find_leftovers(directory):
        if broken or kind_of(leftover) in (folder.STAGING, folder.TRASH):
            plan.remove.append((leftover, LEFTOVERS[kind_of(leftover)]))
    return plan


def _plan_steps(plan: Plan, steps: Sequence[Path], keep_last: int | None, keep_every: int | None, broken: bool) -> None:
    num_wanted = (1 if keep_every else len(steps)) if keep_last is None else keep_last
    num_whole = 0
    for path in reversed(steps):
        is_enough = num_whole >= num_wanted and plan.newest is not None
        is_multiple = bool(keep_every) and (step_number(path) or 0) % (keep_every or 1) == 0
        if is_enough and not is_multiple:
            plan.remove.append((path, "older than what is kept"))
        elif is_enough and not broken:
            continue  # it stays in any case
        elif find_problems(path):
            plan.damaged.append(path)
        else:
            num_whole += 1
            plan.newest = plan.newest or path
    if broken and plan.newest is not None:
        plan.remove += [(path, "damaged") for path in plan.damaged]
        plan.damaged = []


def _remove_all(remove: Sequence[tuple[Path, str]], check_lease: Callable[[], None] | None) -> int:
    """Remove directories, or only say so where there is no lease; gives how many could not be removed."""
    num_failed = 0
    for path, reason in remove:
        size = show_bytes(size_and_age(path)[0])
        if check_lease is None:
            say(f"would remove {path} ({size}): {reason}")
            continue
        check_lease()
        try:
            _remove(path)
        except OSError as error:
            tell(f"{path} could not be removed: {say_error(error)}")
            num_failed += 1
        else:
            say(f"removed {path} ({size}): {reason}")
    return num_failed


def _remove(path: Path) -> None:
    if step_number(path) is not None:
        # It loses its name first, so that no reader ever sees a part of it.
        path = path.rename(path.with_name(f"{folder.TRASH}{path.name}-{uuid.uuid4().hex[:8]}"))
        fsync_directory(path.parent)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _refuse_if_held(directory: Path) -> None:
    found = read_highest(directory)
    if found and found[0].alive and not found[0].released:
        raise CheckpointLeaseError(f"{directory} is written by {found[0]}. Wait for that job, or end it.")


class _Held(AbstractContextManager[Lease]):
    """The lease of a folder for the time of a `with` block: no job can begin to write there meanwhile."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> Lease:
        epoch = folder.highest_epoch(self._directory)
        self._lease = Lease.acquire(self._directory, job="rankwise ckpt prune", minimum_epoch=epoch)
        return self._lease

    def __exit__(self, *_: object) -> None:
        self._lease.release()
