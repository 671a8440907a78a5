"""
## What it finds

A shuffling `DistributedSampler` on which nobody calls `set_epoch`, in a file that trains over several epochs.

## Why it hurts

The sampler shuffles by its epoch, which stays 0: every epoch has the same order and the same batches.

## Example

    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, sampler=sampler)
    for epoch in range(num_epochs):
        for batch in loader:
            ...

## Instead

    for epoch in range(num_epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            ...

## Known limits

Where the loader goes into a function or a library that was not given, it is taken that `set_epoch` is called there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rankwise.check.finding import Edit, Finding
from rankwise.check.program import Program
from rankwise.check.source import Module
from rankwise.check.trace import Call, Trace
from rankwise.check.values import Thing, constant

_NO_TRAINING = re.compile(r"val|test|eval|infer|dev(?!ice)|predict|sequential", re.IGNORECASE)
_HARMLESS = frozenset(
    [
        "len",
        "iter",
        "next",
        "enumerate",
        "print",
        "isinstance",
        "tqdm",
        "zip",
        "hasattr",
        "id",
        "type",
        "getattr",
        "islice",
        "cycle",
        "range",
        "min",
        "max",
        "int",
        "float",
        "DataLoader",
        "BatchSampler",
        "trange",
        "list",
        "append",
        "info",
        "debug",
        "log",
        "str",
        "repr",
        "format",
        "set_description",
        "device_prefetch",
        "MultiEpochsDataLoader",
        "DataLoaderX",
        "DistributedSampler",
        "prepare",
        "ceil",
        "floor",
        "get_linear_schedule_with_warmup",
        "get_cosine_schedule_with_warmup",
        "get_scheduler",
        "OneCycleLR",
    ]
)


def check(program: Program) -> Iterator[Finding]:
    for module in program.modules:
        traces = program.traces_in(module)
        samplers = [(trace, call) for trace in traces for call in trace.calls if _is_shuffling(call)]
        if (
            not samplers
            or _has_unknown_star(program, module)
            or _sets_epoch(program, module)
            or not _has_epochs(traces)
            or _hands_over(traces)
        ):
            continue
        for trace, call in samplers:
            if not _is_for_evaluation(trace, call):
                message = "no set_epoch() for this sampler: every epoch has the same order. Call it before each epoch"
                yield module.finding("RW501", call.node, "error", message, (), _edits(module, traces, trace, call))


def _is_shuffling(call: Call) -> bool:
    shuffle = call.argument(3, "shuffle")
    is_sampler = call.last == "DistributedSampler" and call.callee is None
    whole = constant(call.argument(1, "num_replicas")) == 1  # as a rule made anew for each epoch's own data
    return is_sampler and constant(shuffle, True) is not False and not whole


def _sets_epoch(program: Program, module: Module) -> bool:
    """Whether this file or one that has to do with it names `set_epoch`."""
    near = [module]
    for one in near:
        near += [other for other in program.imported_by(one) if other not in near]
    near += [other for other in program.modules if module in program.imported_by(other)]
    return any("set_epoch" in line for one in near for line in one.lines)


def _has_unknown_star(program: Program, module: Module) -> bool:
    return any(program.module_named(star, module) is None and not star.startswith("torch") for star in module.stars)


def _has_epochs(traces: list[Trace]) -> bool:
    """Whether the file goes over something again and again: a loop over epochs, or a loader inside another loop."""
    for trace in traces:
        for loop in trace.loops:
            if isinstance(loop, ast.For) and re.search(r"epoch", ast.unparse(loop.target) + ast.unparse(loop.iter)):
                return True
            inner = [one for one in ast.walk(loop) if one is not loop]
            if isinstance(loop, ast.For) and _counts(loop) and any(_goes_over_loader(trace, one) for one in inner):
                return True
            if isinstance(loop, ast.While) and any(isinstance(one, ast.For) or _starts_again(one) for one in inner):
                return True
    return False


def _counts(loop: ast.For) -> bool:
    return ast.unparse(loop.iter).startswith(("range(", "trange(", "tqdm(range(", "itertools.count(", "count("))


def _goes_over_loader(trace: Trace, node: ast.AST) -> bool:
    return isinstance(node, ast.For) and any(
        _is_loader(trace.module, one) for one in ast.walk(node.iter) if isinstance(one, ast.expr)
    )


def _starts_again(node: ast.AST) -> bool:
    """Whether an iterator that is at its end is made anew."""
    return isinstance(node, ast.ExceptHandler) and node.type is not None and "StopIteration" in ast.unparse(node.type)


def _hands_over(traces: list[Trace]) -> bool:
    """Whether a sampler or a loader goes into something that was not given."""
    for trace in traces:
        for call in trace.calls:
            if call.callee is not None or call.last in _HARMLESS or call.last.endswith("BatchSampler"):
                continue
            values = (*call.arguments, *call.keywords.values())
            loaders = (one.data for one in values if isinstance(one.data, Thing))
            if call.last in ("fit", "run", "train") and any(one.tag in ("loader", "sampler") for one in loaders):
                return True
            nodes = [*call.node.args, *(keyword.value for keyword in call.node.keywords)]
            if any(_is_loader(trace.module, node) for node in nodes):
                return True
    return False


def _is_loader(module: Module, node: ast.expr) -> bool:
    if not isinstance(node, ast.Name | ast.Attribute | ast.Subscript | ast.Dict):
        return False
    text = module.text(node, 200)
    return re.search(
        r"(?:loader|(?<!down)(?<!up)sampler|dataloaders?|data_iter)\w*(?:\[.*\])?$", text
    ) is not None and not _NO_TRAINING.search(text)


def _is_for_evaluation(trace: Trace, call: Call) -> bool:
    names = [trace.module.text(store.target) for store in trace.stores if _holds(store.node, call.node)]
    dataset = call.argument_node(0, "dataset")
    text = trace.module.text(dataset, 200) if dataset is not None else ""
    return any(_NO_TRAINING.search(one) for one in (*names, text, trace.function.name if trace.function else ""))


def _holds(statement: ast.stmt, call: ast.Call) -> bool:
    last = statement.end_lineno or statement.lineno
    return statement.lineno <= call.lineno <= last


def _edits(module: Module, traces: list[Trace], trace: Trace, call: Call) -> tuple[Edit, ...]:
    """`set_epoch` at the start of the loop over epochs, where sampler and loop are in one function."""
    targets = [
        store.target.id
        for store in trace.stores
        if isinstance(store.target, ast.Name) and getattr(store.node, "value", None) is call.node
    ]
    for loop in trace.loops if targets else ():
        if not isinstance(loop, ast.For) or not isinstance(loop.target, ast.Name) or "epoch" not in loop.target.id:
            continue
        first = loop.body[0]
        later = call.node.lineno < loop.lineno < first.lineno
        if later and call.node.col_offset and isinstance(loop.iter, ast.Call):
            branch = [one for one in trace.stores if getattr(one.node, "value", None) is call.node]
            if all(one.node.col_offset == loop.col_offset for one in branch):
                indent = module.lines[first.lineno - 1][: module.column(first.lineno, first.col_offset)]
                if not indent.strip():
                    text = f"{targets[0]}.set_epoch({loop.target.id})\n{indent}"
                    column = len(indent)
                    return (Edit(first.lineno, column, first.lineno, column, text),)
    return ()


__all__ = ["Thing", "check"]
