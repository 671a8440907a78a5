"""
## What it finds

Work that one process of all should do - a checkpoint, a result file, a run of a tracker - under a guard that lets local
rank 0 of every node through.

## Why it hurts

Every node writes the same file at the same time; the last one wins, or the file is torn. A tracker gets a run per
node.

## Example

    if local_rank == 0:
        torch.save(model.state_dict(), "model.pt")

## Instead

    if dist.get_rank() == 0:
        torch.save(model.state_dict(), "model.pt")

Work that every node needs, such as a download to a local disk, is right under local rank 0.

## Known limits

Functions in files that were not given count where their name says that they save. Paths that name a temporary or cache
folder are taken for local ones. Scripts that start their processes themselves on one node are not reported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rankwise.check.explore import whole_guard
from rankwise.check.finding import Finding, Step
from rankwise.check.program import Program
from rankwise.check.trace import Call
from rankwise.check.values import Atom, Guard
from rankwise.check.works import calls_with, global_work


def check(program: Program) -> Iterator[Finding]:
    seen: set[object] = set()
    for _trace, call in calls_with(program):
        if call.in_handler or not any(atom.scope == "local_rank" for atom in call.guard):
            continue
        atom = local_main(whole_guard(program, call))
        work = global_work(program, call) if atom is not None else None
        if atom is None or work is None:
            continue
        finding = _finding(call, atom, work)
        key = (finding.path, finding.line)
        if key not in seen:
            seen.add(key)
            yield finding


def local_main(guard: Guard) -> Atom | None:
    """The atom that lets through one rank of each node, where nothing narrows it further."""
    if any(_narrows(atom) for atom in guard):
        return None
    if any(atom.scope == "single" and atom.which == "main" for atom in guard):
        return None
    return next((atom for atom in guard if atom.scope == "local_rank" and atom.which == "main" and atom.sure), None)


def _narrows(atom: Atom) -> bool:
    """Whether an atom may leave one rank of those that are first on their node."""
    return atom.which == "main" and (atom.scope in ("rank", "node_rank") or (atom.scope == "some" and atom.sure))


def _finding(call: Call, atom: Atom, work: str) -> Finding:
    place: ast.expr = atom.place if atom.place is not None else call.node
    step = _origin(atom)
    if step is None:
        message = f"local rank 0 of every node does this: {work}. Guard it by the global rank"
        return call.module.finding("RW201", place, "error", message, atom.trail)
    message = (
        f"{atom.named} is true on local rank 0 of every node, and in line {call.node.lineno} guards {work}. "
        "Take the global rank"
    )
    return Finding("RW201", step.path, step.line, 1, step.line, 1, "error", message, atom.trail)


def _origin(atom: Atom) -> Step | None:
    """Where a named test went wrong: the first name on its way that does not say "local"; None without a name."""
    if not atom.named:
        return None
    named = [
        step for step in atom.trail if " <- " in step.text and "local" not in step.text.partition(" <- ")[0].lower()
    ]
    named = [step for step in named if " of " not in step.text.partition(" <- ")[0]]
    return named[-1] if named else None
