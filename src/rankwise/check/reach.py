"""Which functions run on every rank, as far as the given files show it."""

from __future__ import annotations

from rankwise.check import libraries
from rankwise.check.explore import whole_guard
from rankwise.check.program import Program
from rankwise.check.source import Class, Function
from rankwise.check.trace import Branch, Call, Item, Loop, Trace
from rankwise.check.values import Atom, Guard, Thing, constant

_RANK_SCOPES = ("rank", "local_rank", "node_rank", "some")
_JOINS = frozenset({"ddp", "quiet ddp", "fsdp", "sampler", "accelerator", "fabric", "deepspeed"})


def many_ranks(program: Program) -> set[Function | None]:
    """Functions that are seen to run on every rank; for a module's own level, see `module_on_many`."""
    found = program.shared("many ranks", lambda: _many_ranks(program))
    assert isinstance(found, set)
    return found


def runs_on_many(program: Program, trace: Trace) -> bool:
    """Whether every rank runs this, where no guard keeps it out."""
    return _key(trace) in many_ranks(program)


def _key(trace: Trace) -> object:
    return trace.function or trace.module


def _many_ranks(program: Program) -> set[object]:
    by_key = {_key(trace): trace for trace in program.traces}
    callers: dict[object, list[Call]] = {}
    for trace in program.traces:
        for call in trace.calls:
            callee = _function_of(program, call)
            if callee is not None and not call.uncertain:
                callers.setdefault(callee, []).append(call)
    found = {
        key
        for key, trace in by_key.items()
        if key in program.started
        or (trace.function is not None and _is_hook(program, trace.function))
        or (_has_evidence(trace) and not trace.module.is_test)
    }
    parents = {key for key, trace in by_key.items() if any(_starts_processes(call) for call in trace.calls)}
    found -= parents
    waiting = [key for key, trace in by_key.items() if any(_starts(call) for call in trace.calls)]
    while waiting:  # up: who calls what joins the ranks is on every rank too
        key = waiting.pop()
        if key in program.started:
            continue
        for call in callers.get(key, ()):
            above: object = call.caller or call.module
            if above not in found and above not in parents and not _in_test(call):
                found.add(above)
                waiting.append(above)
    waiting = list(found)
    while waiting:  # down
        key = waiting.pop()
        trace_of = by_key.get(key)
        for call in trace_of.calls if trace_of else ():
            callee = _function_of(program, call)
            # What is called by some ranks alone may be called by who knows no ranks too.
            if callee is not None and callee not in found and not call.uncertain and main_only(call.guard) is None:
                found.add(callee)
                waiting.append(callee)
    return found


def _is_hook(program: Program, function: Function) -> bool:
    """Whether a trainer of a library calls it, on every rank."""
    if function.owner is None or function.name not in libraries.HOOKS:
        return False
    bases = (base for one in program.base_classes(function.owner) for base in one.node.bases)
    return any(libraries.HOOKED.search(function.module.text(base)) for base in bases)


def _starts(call: Call) -> bool:
    if constant(call.argument(-1, "world_size", "devices")) == 1:
        return False
    thing = libraries.made(call.name, call.function, 0) if call.callee is None else None
    joined = thing is not None and thing.tag in ("accelerator", "fabric", "ddp", "quiet ddp")
    if _is_launched(call):
        return True
    if call.callee is None and call.last in ("main_process_first", "local_main_process_first"):
        return True
    return joined or (call.callee is None and libraries.STARTS.fullmatch(call.last) is not None)


def _is_launched(call: Call) -> bool:
    """Whether it makes a trainer of transformers, in a file that reckons with a launcher."""
    return call.name.startswith("transformers.") and call.last in libraries.TRAINERS and call.module.names_local_rank


def _in_test(call: Call) -> bool:
    return call.module.is_test


def _function_of(program: Program, call: Call) -> Function | None:
    return program.method(call.callee, "__init__") if isinstance(call.callee, Class) else call.callee


def _has_evidence(trace: Trace) -> bool:
    if trace.reads_rank or _divides(trace.items) or any(_is_rank_atom(atom) for atom in trace.guard):
        return True
    return any(_joins(call) for call in trace.calls)


def _joins(call: Call) -> bool:
    if constant(call.argument(-1, "world_size", "devices")) == 1:
        return False
    if call.callee is None and libraries.collective_of(call):
        return True
    if libraries.STARTS.fullmatch(call.last) or _is_launched(call):
        return True
    thing = libraries.made(call.name, call.function, 0) if call.callee is None else None
    return isinstance(thing, Thing) and thing.tag in _JOINS


def _starts_processes(call: Call) -> bool:
    return (call.last == "spawn" and "args" in call.keywords) or (call.last == "Process" and "target" in call.keywords)


def _divides(items: list[Item]) -> bool:
    for item in items:
        if isinstance(item, Branch):
            if any(_is_rank_atom(atom) and atom.sure for atom in (*item.test.when_true, *item.test.when_false)):
                return True
            if _divides(item.then) or _divides(item.other):
                return True
        elif isinstance(item, Loop) and _divides(item.body):
            return True
    return False


def _is_rank_atom(atom: Atom) -> bool:
    return atom.scope in _RANK_SCOPES


def is_guarded(guard: Guard) -> bool:
    """Whether a guard may keep some ranks out, or all but a lone process."""
    return bool(guard)


def main_only(guard: Guard) -> Atom | None:
    """The atom by which one rank of all, or one of each node, is alone; None where that is not sure."""
    atoms = [atom for atom in guard if atom.sure and atom.which == "main" and atom.scope in ("rank", "local_rank")]
    return next((atom for atom in atoms if atom.scope == "rank"), atoms[0] if atoms else None)


def is_single(guard: Guard) -> bool:
    """Whether a place is reached only by a lone process."""
    return any(atom.scope == "single" and atom.which == "main" and atom.sure for atom in guard)


def has_guarded_caller(program: Program, call: Call) -> bool:
    """Whether any caller, at any height, has a guard: then the others are taken for cases of their own."""
    seen: set[Function] = set()
    waiting = [call.caller]
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if function in program.handed_over:
            return True
        for above in program.callers.get(function, ()):
            if above.guard_on_ranks or above.in_handler:
                return True
            waiting.append(above.caller)
    return False


__all__ = ["has_guarded_caller", "is_guarded", "is_single", "main_only", "many_ranks", "runs_on_many", "whole_guard"]
