"""
## What it finds

A `return`, `sys.exit()`, `continue` or `break` that only some ranks take, before a collective that the others go on to.

## Why it hurts

The ranks that stay wait in the collective for those that left, until the timeout ends the job.

## Example

    if rank != 0:
        return
    save(model)
    dist.barrier()

## Instead

    if rank == 0:
        save(model)
    dist.barrier()

## Known limits

An exception that some ranks raise is not reported: it ends the job by itself. Ranks outside of a process group are
meant to leave before its collectives.
"""

from __future__ import annotations

from collections.abc import Iterator

from rankwise.check.finding import Finding, Step
from rankwise.check.program import Program
from rankwise.check.rules.divergent_collective import differences


def check(program: Program) -> Iterator[Finding]:
    for module, difference in differences(program):
        leave = difference.leave
        if leave is not None:
            call = difference.call
            message = (
                f"some ranks leave here; the others go on to {module.text(call.node.func)}() in line "
                f"{call.node.lineno} and wait there until the timeout"
            )
            trail = (Step(f"{difference.names[0]}: {module.text(call.node)}", module.path, call.node.lineno),)
            yield module.finding("RW402", leave.node, "error", message, trail + difference.atom.trail)
