"""
## What it finds

A local rank where a global one belongs: `DistributedSampler(rank=local_rank)` or `init_process_group(rank=local_rank)`
beside the world size, a shard picked by `[local_rank::world_size]`, a seed made of the local rank.

## Why it hurts

On the second node the local ranks start at 0 again: both nodes read the same samples, and half of the data is never
seen; the process group waits for ranks that never come; equal seeds give equal noise.

## Example

    sampler = DistributedSampler(dataset, num_replicas=world_size, rank=local_rank)

## Instead

    sampler = DistributedSampler(dataset)  # takes both from the process group

## Known limits

A sampler whose number of replicas is the local world size is right and not reported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rankwise.check.finding import Finding, Severity
from rankwise.check.program import Program
from rankwise.check.trace import Call, Trace
from rankwise.check.values import UNKNOWN, Value

_SEEDS = re.compile(r"(?:\w+_)?seeds?(?:_everything|_all)?|default_rng|seed_(?:torch|numpy|rng|all)\w*")


def check(program: Program) -> Iterator[Finding]:
    for trace in program.traces:
        if program.is_one_node(trace.module):
            continue
        for call in trace.calls:
            yield from _call(trace, call)
        yield from _arithmetic(trace)


def _call(trace: Trace, call: Call) -> Iterator[Finding]:
    sizes = [call.keywords.get(name) for name in ("num_replicas", "world_size", "num_shards", "size")]
    size = next((value for value in sizes if value is not None), None)
    if size is not None and size.kind in ("local_world_size", "num_nodes"):
        return
    place, value, what = None, UNKNOWN, ""
    if call.last == "DistributedSampler" or (call.last.endswith("Sampler") and size is not None):
        place = call.argument_node(2 if call.last == "DistributedSampler" else -1, "rank")
        value = call.argument(2 if call.last == "DistributedSampler" else -1, "rank")
        what = "the sampler's share of the data"
    elif call.last == "init_process_group":
        place, value = call.argument_node(-1, "rank"), call.argument(-1, "rank")
        what = "this process's place in the process group"
    elif call.last == "shard" and size is None and len(call.arguments) == 2 and call.arguments[0].kind == "world_size":
        place, value, what = call.argument_node(1), call.argument(1), "this process's share of the data"
    elif call.last in ("shard", "split_dataset_by_node") and size is not None:
        names = ("index", "rank")
        place, value, what = call.argument_node(1, *names), call.argument(1, *names), "this process's share of the data"
    else:
        return
    if place is not None and value.kind == "local_rank":
        yield _finding(trace, place, value, what)


def _finding(trace: Trace, node: ast.expr, value: Value, what: str, severity: Severity = "error") -> Finding:
    message = f"a local rank decides {what}; every node has the same ones. Use the global rank"
    return trace.module.finding("RW203", node, severity, message, value.trail)


def _arithmetic(trace: Trace) -> Iterator[Finding]:
    """Shares by arithmetic, and seeds."""
    for node, rank, what in trace.shares:
        yield _finding(trace, node, rank, what)
    for call in trace.calls:
        if _SEEDS.fullmatch(call.last):
            for node in (*call.node.args, *(keyword.value for keyword in call.node.keywords)):
                held = trace.sums.get(node) or _sum_in(trace, call, node)
                if held is not None:
                    yield _finding(trace, node, held, "the random numbers")


def _sum_in(trace: Trace, call: Call, node: ast.expr) -> Value | None:
    """The local rank in the sum that a variable was last given before a call."""
    if not isinstance(node, ast.Name):
        return None
    held = [one for one in trace.stores if isinstance(one.target, ast.Name) and one.target.id == node.id]
    before = [one for one in held if one.node.lineno < call.node.lineno]
    right = getattr(before[-1].node, "value", None) if before else None
    return trace.sums.get(right) if isinstance(right, ast.expr) else None
