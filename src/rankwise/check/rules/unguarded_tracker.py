"""
## What it finds

A tracker's run or an event file that every rank starts: `wandb.init`, `SummaryWriter`, `mlflow.start_run` and the like,
in code that is seen to run on every rank.

## Why it hurts

One training shows up as as many runs as there are processes, or their event files mix in one folder.

## Example

    wandb.init(project="vae")  # after init_process_group

## Instead

    if dist.get_rank() == 0:
        wandb.init(project="vae")

## Known limits

A run per rank that is meant so - `group=`, a `mode` that depends on the rank - is not reported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rankwise.check.explore import whole_guard
from rankwise.check.finding import Finding
from rankwise.check.program import Program
from rankwise.check.reach import has_guarded_caller, runs_on_many
from rankwise.check.trace import Call, Trace
from rankwise.check.works import calls_with, starts_tracker


def check(program: Program) -> Iterator[Finding]:
    for trace, call in calls_with(program):
        spawned = trace.function is None and _is_imported_by_workers(program, trace, call)
        if not starts_tracker(call) or call.guard or not (spawned or runs_on_many(program, trace)):
            continue
        per_rank = any(value.varies for value in (*call.arguments, *call.keywords.values()))
        if per_rank or "group" in call.keywords or whole_guard(program, call) or has_guarded_caller(program, call):
            continue
        if call.name == "wandb.init" and any("WANDB_MODE" in line for line in trace.module.lines):
            continue  # it is switched off on some ranks, or may be
        message = f"every rank starts {trace.module.text(call.node.func)}(). Let the main process do it alone"
        yield trace.module.finding("RW302", call.node, "warning", message)


def _is_imported_by_workers(program: Program, trace: Trace, call: Call) -> bool:
    """Whether processes that are spawned from this file run the call again when they import the file."""
    if not any(function.module is trace.module for function in program.started):
        return False
    return not any(
        isinstance(node, ast.If) and "__name__" in trace.module.text(node.test) and node.lineno < call.node.lineno
        for node in trace.module.tree.body
    )
