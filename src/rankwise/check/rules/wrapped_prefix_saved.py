"""
## What it finds

The state of a `DistributedDataParallel` wrapper that is saved: its names begin with "module.".

## Why it hurts

The file does not load into the bare model.

## Example

    torch.save(ddp_model.state_dict(), path)

## Instead

    torch.save(ddp_model.module.state_dict(), path)

## Known limits

A loader that takes the prefix off, or loads into a wrapper again, is not seen: therefore off by default.
"""

from __future__ import annotations

from collections.abc import Iterator

from rankwise.check.finding import Finding
from rankwise.check.program import Program
from rankwise.check.values import Thing
from rankwise.check.works import calls_with


def check(program: Program) -> Iterator[Finding]:
    for trace, call in calls_with(program):
        thing = call.receiver.data if call.receiver is not None else None
        if call.last == "state_dict" and isinstance(thing, Thing) and thing.tag in ("ddp", "quiet ddp"):
            message = 'these names begin with "module."; take the state of .module'
            yield trace.module.finding("RW602", call.node, "info", message)
