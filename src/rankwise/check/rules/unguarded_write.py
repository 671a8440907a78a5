"""
## What it finds

A file that every rank writes under the same name: `torch.save`, `open(..., "w")`, `save_pretrained` and the like, in
code that is seen to run on every rank, with no guard on the way to it and no rank in the path.

## Why it hurts

Ranks overwrite each other while they write: the file may hold parts of several, and loads fail later.

## Example

    torch.save(model.state_dict(), "model.pt")  # after init_process_group

## Instead

    if dist.get_rank() == 0:
        torch.save(model.state_dict(), "model.pt")

## Known limits

A function that no given file calls counts only where it deals with ranks itself. Paths made of values whose origin is
not seen are taken for equal on all ranks, unless a rank, a process id, a time or a random name may be in them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rankwise.check.explore import whole_guard
from rankwise.check.finding import Finding
from rankwise.check.program import Program
from rankwise.check.reach import has_guarded_caller, runs_on_many
from rankwise.check.trace import Call
from rankwise.check.values import Thing, Value, constant
from rankwise.check.works import calls_with, written_path

_FETCHES = re.compile(r"download|fetch|cache|maybe_get|urlretrieve", re.IGNORECASE)


def check(program: Program) -> Iterator[Finding]:
    for trace, call in calls_with(program):
        path = written_path(call)
        if (
            path is None
            or call.in_handler
            or _FETCHES.search(trace.name)
            or call.guard
            or not runs_on_many(program, trace)
        ):
            continue
        if _is_callers(program, call, path):
            continue
        if _varies(call, path) or whole_guard(program, call) or has_guarded_caller(program, call):
            continue
        shown = trace.module.text(path, 50)
        message = f"every rank writes {shown}. Let the main process write it, or put the rank in the name"
        yield trace.module.finding("RW301", call.node, "error", message)


def _is_callers(program: Program, call: Call, path: ast.expr) -> bool:
    """Whether the path comes in from callers that were not given."""
    function = call.caller
    if function is None or not isinstance(path, ast.Name) or function in program.callers:
        return False
    return path.id in function.parameters and function not in program.started


def _varies(call: Call, path: ast.expr) -> bool:
    values: list[Value] = [*call.arguments, *call.keywords.values()]
    nodes = [*call.node.args, *(keyword.value for keyword in call.node.keywords if keyword.arg)]
    if re.search(r"\btmp_?|\btemp|lock\b|\bbuf(?:fer)?\b", call.module.text(path)):
        return True
    for node, value in zip(nodes, values, strict=False):
        if node is path:
            if isinstance(value.data, Thing) and value.data.tag == "buffer":
                return True
            return value.varies or "devnull" in call.module.text(path) or str(constant(value)).startswith("/dev/")
    return call.receiver is not None and call.receiver.varies
