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

import ast
from collections.abc import Iterator

from rankwise.check.finding import Finding, Step
from rankwise.check.program import Program
from rankwise.check.rules.divergent_collective import differences
from rankwise.check.sequences import Difference
from rankwise.check.source import Module


def check(program: Program) -> Iterator[Finding]:
    by_exit: dict[tuple[Module, ast.AST], list[Difference]] = {}
    for module, difference in differences(program):
        if difference.leave is not None:
            by_exit.setdefault((module, difference.leave.node), []).append(difference)
    for (module, node), found in by_exit.items():
        first = min(found, key=lambda one: (one.call.node.lineno, one.call.node.col_offset))
        call = first.call
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        message = (
            f"some ranks leave here; the others go on to {module.text(call.node.func)}() in line "
            f"{call.node.lineno}{more} and wait there until the timeout"
        )
        trail = (Step(f"{first.names[0]}: {module.text(call.node)}", module.path, call.node.lineno),)
        assert isinstance(node, ast.stmt | ast.expr)
        yield module.finding("RW402", node, "error", message, trail + first.atom.trail)
