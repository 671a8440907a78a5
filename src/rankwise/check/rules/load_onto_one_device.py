"""
## What it finds

`torch.load` without `map_location` in code that every rank runs.

## Why it hurts

Tensors go back to the device they were saved from, usually the first: every process of the node takes memory there, and
it may run out.

## Example

    state = torch.load("model.pt")

## Instead

    state = torch.load("model.pt", map_location="cpu")

## Known limits

What was saved on the CPU loads there anyway; that is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator

from rankwise.check.explore import whole_guard
from rankwise.check.finding import Finding
from rankwise.check.program import Program
from rankwise.check.reach import main_only, runs_on_many
from rankwise.check.trace import Call, Trace
from rankwise.check.values import Thing
from rankwise.check.works import calls_with


def check(program: Program) -> Iterator[Finding]:
    for trace, call in calls_with(program):
        if call.name != "torch.load" or "map_location" in call.keywords or len(call.node.args) != 1:
            continue
        if any(keyword.arg is None for keyword in call.node.keywords) or not runs_on_many(program, trace):
            continue
        if _is_own(trace, call):
            continue
        if main_only(whole_guard(program, call)) is None:
            message = "every rank loads onto the device that this was saved from. Give map_location"
            last = call.node.keywords[-1].value if call.node.keywords else call.node.args[0]
            edit = trace.module.insert_after(last, ', map_location="cpu"')
            edits = (edit,) if _plain(trace.module.lines, edit.line, edit.column) else ()
            yield trace.module.finding("RW601", call.node, "warning", message, (), edits)


def _is_own(trace: Trace, call: Call) -> bool:
    """Whether it is a file of this rank alone, or bytes in memory."""
    source = call.arguments[0]
    if source.varies or (isinstance(source.data, Thing) and source.data.tag == "buffer"):
        return True
    text = f"{trace.module.text(call.node.args[0])}.seek(0)"
    return any(line.strip() == text for line in trace.module.lines[max(call.node.lineno - 6, 0) : call.node.lineno])


def _plain(lines: list[str], line: int, column: int) -> bool:
    """Whether the argument ends where the node says, without a parenthesis of its own."""
    rest = lines[line - 1][column:].lstrip()
    return rest.startswith(")")
