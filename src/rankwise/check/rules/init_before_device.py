"""
## What it finds

A process group that starts before the same function chooses its device.

## Why it hurts

NCCL may take the current device, which is the first of the node, for its communicators.

## Example

    init_process_group("nccl")
    torch.cuda.set_device(local_rank)

## Instead

    torch.cuda.set_device(local_rank)
    init_process_group("nccl")

## Known limits

Only within one function. Off by default: NCCL starts late, so that it is often harmless.
"""

from __future__ import annotations

from collections.abc import Iterator

from rankwise.check.finding import Finding
from rankwise.check.program import Program


def check(program: Program) -> Iterator[Finding]:
    for trace in program.traces:
        starts = [
            call for call in trace.calls if call.last == "init_process_group" and "device_id" not in call.keywords
        ]
        pins = [call for call in trace.calls if call.last in ("set_device", "set_device_index")]
        first = min((call.node.lineno for call in pins), default=0)
        for call in starts:
            if call.node.lineno < first:
                message = (
                    f"the process group starts before the device is chosen in line {first}. Choose the device first"
                )
                yield trace.module.finding("RW103", call.node, "info", message)
