"""
## What it finds

A forward through the wrapper of `DistributedDataParallel` or `FullyShardedDataParallel` on one rank alone.

## Why it hurts

The wrapper's forward communicates: it broadcasts buffers or gathers parameters. One rank alone waits for the others, or
takes the answer to a later call of theirs.

## Example

    model = DistributedDataParallel(model)
    if rank == 0:
        validate(model(batch))

## Instead

    if rank == 0:
        validate(model.module(batch))  # DDP; FSDP has to run on every rank

## Known limits

A wrapped model that is passed to a function that was not given counts where the function's name says that it evaluates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rankwise.check.explore import whole_guard
from rankwise.check.finding import Finding
from rankwise.check.program import Program
from rankwise.check.reach import main_only
from rankwise.check.trace import Call
from rankwise.check.values import Thing, Value
from rankwise.check.works import calls_with

_WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp": "FSDP"}
_RUNS = re.compile(
    r"(?:.*_)?(?:eval|evaluate|validate|validation|test|infer|inference|predict|samples?|generate)(?:_.*)?"
)


def check(program: Program) -> Iterator[Finding]:
    for trace, call in calls_with(program):
        wrapper = _forward(call)
        if wrapper is None:
            continue
        atom = main_only(whole_guard(program, call))
        if atom is not None:
            message = (
                f"one rank alone runs the {wrapper} forward, which communicates. Use the module inside, or all ranks"
            )
            yield trace.module.finding("RW403", call.node, "error", message, atom.trail)


def _forward(call: Call) -> str | None:
    wrapper = _wrapper(call.function)
    if wrapper:
        return wrapper
    if isinstance(call.function.data, Thing) and call.function.data.tag == "prepared":
        return "prepared model's"  # only where it is called: a function that it goes into may unwrap it
    if call.last in ("forward", "generate") and call.receiver is not None and _wrapper(call.receiver):
        return _wrapper(call.receiver) if call.last == "forward" else None
    if call.callee is None and _RUNS.fullmatch(call.last):
        return next((found for value in call.arguments if (found := _wrapper(value))), None)
    return None


def _wrapper(value: Value) -> str | None:
    return _WRAPPERS.get(value.data.tag) if isinstance(value.data, Thing) else None
