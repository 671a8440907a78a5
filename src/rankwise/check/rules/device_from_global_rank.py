"""
## What it finds

A device whose number is the global rank: `torch.cuda.set_device(rank)`, `torch.device(f"cuda:{rank}")`, `.to(rank)`,
`device_ids=[rank]` and the like, where `rank` comes from `RANK`, `dist.get_rank()` or another launcher's variable.

## Why it hurts

On one node global and local rank are equal, and all is well. On the second node rank 8 asks for an accelerator that is
not there: "invalid device ordinal".

## Example

    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)

## Instead

    local_rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local_rank)

`rank % torch.cuda.device_count()` is right too where every node has as many processes as accelerators.

## Known limits

A rank that comes from a file that was not given is followed by the name of its helper alone. In a worker of `mp.spawn`
the index is local; it is taken for the global rank as well only where a node's offset is added to it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rankwise.check.finding import Edit, Finding
from rankwise.check.program import Program
from rankwise.check.source import Function
from rankwise.check.trace import Call, Trace
from rankwise.check.values import DeviceName, Many, Ref, Table, Value

_SETTERS = frozenset({"set_device", "set_device_index"})
_DEVICE_NAMES = ("local_rank", "gpu", "gpu_id", "device", "device_id", "local_process_index")


def check(program: Program) -> Iterator[Finding]:
    seen: set[tuple[str, int, int]] = set()
    for trace in program.traces:
        for call in trace.calls:
            for node, value in _sinks(call):
                if _is_global(value):
                    yield from _report(trace, call, node, value, seen)
        for store in trace.stores:
            is_list = isinstance(store.target, ast.Subscript) and "VISIBLE_DEVICES" in trace.module.text(store.target)
            if is_list and _is_global(store.value):
                yield _finding(trace, store.node, store.value, ())
    yield from _passed_as_local(program)


def _report(
    trace: Trace, call: Call, node: ast.expr, value: Value, seen: set[tuple[str, int, int]]
) -> Iterator[Finding]:
    made = value.data.place if isinstance(value.data, DeviceName) else None
    is_near = made is not None and made[0] == trace.module.path
    if made is not None and is_near:
        node = made[1]  # told once, where its text is made
    place = (trace.module.path, node.lineno, node.col_offset)
    if place in seen or (not is_near and _parameter(trace, value) in _DEVICE_NAMES):
        return
    seen.add(place)
    yield _finding(trace, node, _index(value), _edits(trace, call, node))


def _finding(trace: Trace, node: ast.expr | ast.stmt, value: Value, edits: tuple[Edit, ...]) -> Finding:
    message = (
        "this device is chosen by the global rank; from the second node on there is no such device. "
        "Use the local rank (LOCAL_RANK)"
    )
    return trace.module.finding("RW101", node, "error", message, _index(value).trail, edits)


def _edits(trace: Trace, call: Call, node: ast.expr) -> tuple[Edit, ...]:
    """The local rank in its place, where a variable of this function holds it."""
    if not isinstance(node, ast.Name):
        return ()
    for store in trace.stores:
        before = store.node.lineno < call.node.lineno and not store.guard
        if isinstance(store.target, ast.Name) and store.value.kind == "local_rank" and before:
            return (trace.module.edit(node, store.target.id),)
    return ()


def _index(value: Value) -> Value:
    return value.data.index if isinstance(value.data, DeviceName) else value


def _is_global(value: Value) -> bool:
    return _index(value).kind == "rank"


def _parameter(trace: Trace, value: Value) -> str | None:
    """The parameter of this function that the value came in by, if it did."""
    if trace.function is None:
        return None
    for step in _index(value).trail:
        name, found, rest = step.text.partition(f" of {trace.function.name}() <- ")
        if found and rest:
            return name
    return None


def _sinks(call: Call) -> Iterator[tuple[ast.expr, Value]]:
    """What a call takes for the number or the name of a device."""
    first = call.argument_node(0, "device", "device_index")
    outside = call.callee is None or call.uncertain
    if call.last in _SETTERS and first is not None and outside:
        yield first, call.argument(0, "device", "device_index")
    if call.name in ("torch.device", "torch.cuda.device") and first is not None:
        index = call.argument_node(1, "index")
        yield (index or first), call.argument(1, "index") if index is not None else call.argument(0, "device")
    if call.last == "device_name" and first is not None and outside:
        yield first, call.argument(0)
    on_object = isinstance(call.node.func, ast.Attribute) and outside
    if on_object and call.last in ("to", "cuda") and not isinstance(call.function.data, Ref) and first is not None:
        yield first, call.argument(0, "device")
    for keyword in call.node.keywords:
        if keyword.arg is not None:
            yield from _keyword(call, keyword.arg, keyword.value)


def _keyword(call: Call, name: str, node: ast.expr) -> Iterator[tuple[ast.expr, Value]]:
    value = call.keywords[name]
    outside = call.callee is None or call.uncertain
    if name == "device_ids" and isinstance(value.data, Many):
        elements = node.elts if isinstance(node, ast.List | ast.Tuple) else [node]
        for element, one in zip(elements, value.data.items, strict=False):
            yield element, one
    elif name in ("output_device", "device_id", "map_location") and outside:
        if isinstance(value.data, Table):
            for _, one in value.data.items:
                yield node, one
        else:
            yield node, value
    elif name == "device_map" and isinstance(value.data, Table):
        for _, one in value.data.items:
            yield node, one
    elif name == "device" and outside and (isinstance(value.data, DeviceName) or call.name.startswith("torch.")):
        yield node, value


def _passed_as_local(program: Program) -> Iterator[Finding]:
    """A global rank for a parameter that is called a local one and used as a device."""
    for trace in program.traces:
        for call in trace.calls:
            if not isinstance(call.callee, Function) or call.uncertain:
                continue
            used = _device_parameters(program, call.callee)
            names = call.callee.parameters
            if call.callee.owner is not None and names[:1] in (["self"], ["cls"]):
                names = names[1:]
            for place, name in enumerate(names):
                node, value = call.argument_node(place, name), call.argument(place, name)
                if node is not None and name in used and name in _DEVICE_NAMES and value.kind == "rank":
                    yield _finding(trace, node, value, ())


def _device_parameters(program: Program, function: Function) -> set[str]:
    """The parameters that a function uses as a device."""
    known = program.shared("device parameters", dict)
    assert isinstance(known, dict)
    if function not in known:
        trace = program.trace_of.get(function)
        nodes = [node for call in trace.calls for node, _ in _sinks(call)] if trace else []
        names = {inner.id for node in nodes for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        known[function] = names & set(function.parameters)
    found: set[str] = known[function]
    return found
