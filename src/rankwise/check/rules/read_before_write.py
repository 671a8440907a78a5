"""
## What it finds

A file that the main process writes under a guard and that all ranks read later in the same function, with no collective
in between.

## Why it hurts

The others read before it is there, or while it is half written.

## Example

    if rank == 0:
        torch.save(state, path)
    state = torch.load(path)

## Instead

    if rank == 0:
        torch.save(state, path)
    dist.barrier()
    state = torch.load(path)

## Known limits

Only within one function, and where both name the path by the same expression.
"""

from __future__ import annotations

from collections.abc import Iterator

from rankwise.check.finding import Finding
from rankwise.check.program import Program
from rankwise.check.reach import main_only
from rankwise.check.sequences import Sequences
from rankwise.check.trace import Call, Trace
from rankwise.check.works import written_path

_READS = frozenset({"torch.load", "numpy.load", "open", "json.load", "safetensors.torch.load_file"})


def check(program: Program) -> Iterator[Finding]:
    sequences = Sequences(program)
    for trace in program.traces:
        written: dict[str, Call] = {}
        for call in trace.calls:
            if sequences.names(call, None):
                written.clear()
            path = written_path(call)
            if path is not None:
                if main_only(call.guard) is not None:
                    written[trace.module.text(path)] = call
            else:
                yield from _read(trace, call, written)


def _read(trace: Trace, call: Call, written: dict[str, Call]) -> Iterator[Finding]:
    path = call.argument_node(0, "f", "file") if call.name in _READS else None
    writer = written.get(trace.module.text(path)) if path is not None else None
    if writer is not None and main_only(call.guard) is None:
        line = writer.node.lineno
        message = f"one rank writes this in line {line}, and the others may read it before. Put a barrier between"
        yield trace.module.finding("RW304", call.node, "warning", message)
