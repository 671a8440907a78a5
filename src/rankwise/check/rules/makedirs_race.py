"""
## What it finds

`os.makedirs` or `Path.mkdir` without `exist_ok=True` in code that every rank runs, also after a look whether it is
there.

## Why it hurts

Between the look and the making another rank makes the folder: FileExistsError on some ranks, now and then.

## Example

    if not os.path.exists(folder):
        os.makedirs(folder)

## Instead

    os.makedirs(folder, exist_ok=True)

## Known limits

A path with a rank, a process id or a random name in it is not reported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rankwise.check.explore import whole_guard
from rankwise.check.finding import Edit, Finding
from rankwise.check.program import Program
from rankwise.check.reach import runs_on_many
from rankwise.check.source import Module
from rankwise.check.trace import Call
from rankwise.check.works import calls_with, makes_folder


def check(program: Program) -> Iterator[Finding]:
    for trace, call in calls_with(program):
        if call.guard or not makes_folder(call) or not runs_on_many(program, trace) or _is_caught(trace.module, call):
            continue
        per_rank = any(value.varies for value in call.arguments) or (call.receiver is not None and call.receiver.varies)
        if per_rank or whole_guard(program, call):
            continue
        message = "ranks race to make this folder, and the later ones fail. Pass exist_ok=True"
        yield trace.module.finding("RW303", call.node, "warning", message, (), _edits(trace.module, call))


def _is_caught(module: Module, call: Call) -> bool:
    """Whether it stands in a `try` whose handler knows of folders that are there."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Try) and node.lineno < call.node.lineno <= (node.body[-1].end_lineno or 0):
            caught = " ".join(ast.unparse(one.type) if one.type else "Exception" for one in node.handlers)
            if any(name in caught for name in ("FileExistsError", "OSError", "Exception", "IOError")):
                return True
    return False


def _edits(module: Module, call: Call) -> tuple[Edit, ...]:
    keywords = {keyword.arg: keyword for keyword in call.node.keywords}
    if None in keywords or call.name == "os.mkdir":
        return ()
    if "exist_ok" in keywords:
        return (module.edit(keywords["exist_ok"].value, "True"),)
    if call.node.keywords or call.node.args:
        last = call.node.keywords[-1].value if call.node.keywords else call.node.args[-1]
        edit = module.insert_after(last, ", exist_ok=True")
        plain = module.lines[edit.line - 1][edit.column :].lstrip().startswith(")")
        return (edit,) if plain and len(call.node.args) < 2 else ()
    end = call.node
    line = end.end_lineno or end.lineno
    column = module.column(line, (end.end_col_offset or 1) - 1)
    return (Edit(line, column, line, column, "exist_ok=True"),)
