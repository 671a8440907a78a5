"""
## What it finds

A shuffling `DataLoader` without a sampler that a model under `DistributedDataParallel` is trained on.

## Why it hurts

Every rank goes over the whole data: an epoch costs as much as on one device, and gains as little.

## Example

    model = DistributedDataParallel(model)
    loader = DataLoader(dataset, shuffle=True)

## Instead

    loader = DataLoader(dataset, sampler=DistributedSampler(dataset))

## Known limits

Only where the wrapper and the loader are in one file, and nothing in it names a sampler or a shard.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rankwise.check.finding import Finding
from rankwise.check.program import Program
from rankwise.check.values import Thing, constant

_SHARES = re.compile(
    r"[Ss]ampler|shard|split_dataset|rank::|\bworld_size\b.*\[|IterableDataset|prepare\(|webdataset|dali", re.IGNORECASE
)
_EVALUATES = re.compile(r"val|test|eval|infer", re.IGNORECASE)


def check(program: Program) -> Iterator[Finding]:
    for module in program.modules:
        traces = program.traces_in(module)
        calls = [call for trace in traces for call in trace.calls]
        wraps = any(
            isinstance(store.value.data, Thing) and store.value.data.tag in ("ddp", "quiet ddp")
            for one in traces
            for store in one.stores
        )
        if not wraps or any(_SHARES.search(line) for line in module.lines):
            continue
        for call in calls:
            text = module.lines[call.node.lineno - 1]
            is_loader = call.last == "DataLoader" and call.callee is None and not _EVALUATES.search(text)
            if is_loader and constant(call.argument(2, "shuffle")) is True:
                message = "every rank trains on all of this data. Give each its share by a DistributedSampler"
                yield module.finding("RW502", call.node, "warning", message)
