"""
## What it finds

A process group for accelerators in a file whose processes never say which accelerator is theirs: no `set_device`, no
device by a local rank for the group, no `CUDA_VISIBLE_DEVICES`.

## Why it hurts

Whatever says plain "cuda" - a barrier of NCCL, a cache that is emptied, a tensor of the library - goes to the first
device of the node, from every process: memory of other processes there, or a hang.

## Example

    init_process_group("nccl")
    model.to(local_rank)

## Instead

    torch.cuda.set_device(local_rank)
    init_process_group("nccl")

## Known limits

Files without a word of an accelerator are taken to run on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rankwise.check.finding import Finding
from rankwise.check.program import Program
from rankwise.check.source import Module
from rankwise.check.trace import Call
from rankwise.check.values import constant

_PINS = re.compile(
    r"set_device|VISIBLE_DEVICES|torch\.(?:cuda\.)?device\(|get_device|device_id\s*=|get_accelerator|accelerat|xla|jax"
)
_USES = re.compile(r"cuda|\.to\((?:self\.)?(?:gpu|rank|local_rank)|nccl")


def check(program: Program) -> Iterator[Finding]:
    for trace in program.traces:
        for call in trace.calls:
            if call.last != "init_process_group" or call.callee is not None or "device_id" in call.keywords:
                continue
            backend = constant(call.argument(0, "backend"))
            if backend in ("gloo", "mpi") or not _unpinned(program, trace.module, call):
                continue
            message = "no process chooses its accelerator, so all use the first. Call torch.cuda.set_device(local_rank)"
            yield trace.module.finding("RW102", call.node, "warning", message)


def _unpinned(program: Program, module: Module, call: Call) -> bool:
    near = [
        module,
        *program.imported_by(module),
        *(one for one in program.modules if module in program.imported_by(one)),
    ]
    if any(_PINS.search(line) for one in near for line in one.lines):
        return False
    return any(_USES.search(line) for line in module.lines)
