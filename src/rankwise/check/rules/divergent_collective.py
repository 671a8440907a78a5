"""
## What it finds

A collective - a barrier, a reduction, a gather, also one inside a function that is called - in a branch that only some
ranks take, where the other branch has none to match it.

## Why it hurts

The ranks in the branch wait for ranks that never come, until the timeout ends the job, half an hour later.

## Example

    if rank == 0:
        evaluate(model)  # ends in dist.all_reduce

## Instead

    result = evaluate(model)
    if rank == 0:
        print(result)

Both halves of "the main process first" together - `if rank != 0: barrier()`, the work, `if rank == 0: barrier()` - are
right: every rank comes to one barrier.

## Known limits

Collectives of a process group that is named are not compared. Branches on anything else than ranks are taken to be the
same on every rank.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rankwise.check.finding import Finding, Step
from rankwise.check.program import Program
from rankwise.check.sequences import Difference, Sequences
from rankwise.check.source import Module
from rankwise.check.trace import Branch, Call, Item, Loop
from rankwise.check.values import Atom

_FILE_TEST = re.compile(r"\b(?:exists|isfile|is_file|isdir|is_dir)\([^()]*(?:\([^()]*\))?\)$")


def check(program: Program) -> Iterator[Finding]:
    for module, difference in differences(program):
        if difference.leave is None:
            call = difference.call
            message = (
                f"{who(difference)} to {what(difference)}; the others never do, and it waits for them until the timeout"
            )
            yield module.finding("RW401", call.node, "error", message, _trail(module, difference))


def differences(program: Program) -> list[tuple[Module, Difference]]:
    """Of all functions, found once."""
    found = program.shared("differences", lambda: _find(program))
    assert isinstance(found, list)
    return found


def _find(program: Program) -> list[tuple[Module, Difference]]:
    sequences = Sequences(program)
    found = [(trace.module, one) for trace in program.traces for one in sequences.differences(trace)]
    for trace in program.traces:
        for atom in trace.guard:
            if atom.sure and atom.scope in ("rank", "local_rank"):
                for call in trace.calls:
                    names = sequences.names(call, None)
                    if names and not call.in_handler:
                        found.append((trace.module, Difference(call, names, atom, None)))
        found += [(trace.module, one) for one in _file_branches(trace.module, trace.items, sequences)]
    return found


def _file_branches(module: Module, items: list[Item], sequences: Sequences) -> Iterator[Difference]:
    """Broadcasts under `if path.exists()`: what tells the others is reached only where the file is seen."""
    for item in items:
        if isinstance(item, Loop):
            yield from _file_branches(module, item.body, sequences)
        elif isinstance(item, Branch):
            yield from _file_branches(module, item.then, sequences)
            yield from _file_branches(module, item.other, sequences)
            place = item.node.test if isinstance(item.node, ast.If) else None
            text = module.text(place) if place is not None else ""
            if _FILE_TEST.search(text) and not sequences.way(item.other, None).reached:
                for reached in sequences.way(item.then, None).reached:
                    if reached.call.callee is None and reached.names[0].startswith("broadcast_object"):
                        atom = Atom("some", "main", text=text, place=place)
                        yield Difference(reached.call, reached.names, atom, None)


def who(difference: Difference) -> str:
    atom: Atom = difference.atom
    if atom.scope == "local_rank":
        return "only local rank 0 of each node comes" if _is_main(difference) else "local rank 0 does not come"
    if atom.scope == "rank":
        return "only rank 0 comes" if _is_main(difference) else "rank 0 does not come"
    if difference.atom.place is not None and _FILE_TEST.search(atom.text):
        return "only ranks that see this file come"
    return "only some ranks come"


def _is_main(difference: Difference) -> bool:
    guard = [*difference.call.guard, *((difference.atom,) if not difference.call.guard else ())]
    return any(one.scope == difference.atom.scope and one.which == "main" for one in guard)


def what(difference: Difference) -> str:
    call: Call = difference.call
    name = difference.names[0]
    return f"this {name}" if call.last == name else f"the {name} in {call.module.text(call.node.func)}()"


def _trail(module: Module, difference: Difference) -> tuple[Step, ...]:
    place = difference.atom.place
    step = (Step(f"guard: {module.text(place)}", module.path, place.lineno),) if place is not None else ()
    return step + difference.atom.trail
