"""Runs all functions of the given files, without running them, until what callers pass is known."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

from rankwise.check import facts, libraries
from rankwise.check.finding import CannotParse
from rankwise.check.objects import Bound, Instance
from rankwise.check.program import Program
from rankwise.check.source import Class, Function, Module
from rankwise.check.trace import Call, Trace
from rankwise.check.values import UNKNOWN, Atom, Guard, Many, Ref, Thing, Value, both, constant, is_const, join, of
from rankwise.check.walk import Walker

_MANY_NODES = re.compile(
    r"node_rank|nnodes|num_nodes|num_machines|machine_rank|n_nodes|NODE_RANK|nodes_num|node_id|args\.nodes"
)

_UNWRAPS = re.compile(
    r"^\s*\.module\b|\)\s*\.module\b|(?<![\w.])(?!self\.)\w+\s*\.module\b|unwrap_model|unwrap_ddp|de_parallel"
)
"""What a line has in which a wrapper is taken off."""

_RUNS_IT = re.compile(r"(?:^|\.)(?:app\.run|Fire|typer\.run|tyro\.cli)$")
"""What calls the function that it is given, on every rank that comes there."""


def explore(sources: Mapping[str, str | bytes]) -> Program:
    """The program, with a trace of every function of the files that matter."""
    program = Program(sources)
    program.inline = lambda function, owner, given, depth: _inline(program, function, owner, given, depth)
    # First as the file is written, so that the results of helpers are known to who comes after them; then backwards,
    # so that what the last function hands down goes all the way in one round.
    for backwards in (False, True):
        program.traces, program.inlined = [], {}
        seen = 0
        while seen < len(program.modules):  # running one may load another
            modules = program.modules
            for module in modules[seen:]:
                _run_module(program, module, backwards)
            seen = len(modules)
    _link(program)
    return program


def _run_module(program: Program, module: Module, backwards: bool) -> None:
    trace = Trace(module, None)
    walker = Walker(program, trace, {})
    first = len(program.traces)
    try:
        for owner in [one for one in module.names.values() if isinstance(one, Class)]:
            _run_class(program, owner)
        walker.run(module.tree.body)
        program.traces.append(trace)
        for function in _backwards(module.functions) if backwards else module.functions:
            _run_function(program, function)
    except RecursionError:
        program.cannot_parse[module.path] = CannotParse(module.path, 1, "cannot parse: nested too deeply")
    for trace in program.traces[first:]:
        for call in trace.calls:
            _special(program, call)


def _backwards(functions: list[Function]) -> list[Function]:
    """From the last to the first, but what makes an object before what uses it."""
    makers = {one.owner: one for one in functions if one.owner is not None and one.name == "__init__"}
    found: dict[Function, None] = {}
    for one in reversed(functions):
        if one.owner is not None and one.owner in makers:
            found.setdefault(makers[one.owner])
        found.setdefault(one)
    return list(found)


def _run_class(program: Program, owner: Class) -> None:
    walker = Walker(program, Trace(owner.module, None), {})
    for statement in owner.node.body:
        if isinstance(statement, ast.AnnAssign | ast.Assign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            value = _field(walker, statement.value)
            for target in targets:
                if isinstance(target, ast.Name) and (value.kind or value.test or is_const(value)):
                    known = owner.attributes.get(target.id)
                    owner.attributes[target.id] = value if known is None else join(known, value)


def _field(walker: Walker, node: ast.expr | None) -> Value:
    """The default of a field, also of dataclasses."""
    if node is None:
        return UNKNOWN
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg == "default":
                return walker.evaluate(keyword.value)
            if keyword.arg == "default_factory" and isinstance(keyword.value, ast.Lambda):
                return walker.evaluate(keyword.value.body)
    return walker.evaluate(node)


def _run_function(program: Program, function: Function) -> None:
    trace = Trace(function.module, function, _guard_of(program, function))
    walker = Walker(program, trace, _parameters(program, function, function.arguments, None))
    walker.guard = trace.guard
    walker.global_names = function.global_names
    try:
        walker.run(function.node.body)
    except RecursionError:
        trace.items.clear()
    program.traces.append(trace)
    program.trace_of[function] = trace
    program.shared_variables[function] = walker.variables
    function.result = walker.result


def _inline(program: Program, function: Function, owner: Value | None, given: dict[str, Value], depth: int) -> Value:
    walker = Walker(program, Trace(function.module, function), {})
    walker.depth = depth
    walker.variables = _parameters(program, function, given, owner)
    try:
        walker.run(function.node.body)
    except RecursionError:
        return UNKNOWN
    return walker.result


def _parameters(
    program: Program, function: Function, known: Mapping[str, Value], owner: Value | None
) -> dict[str, Value]:
    given = function.node.args
    values: dict[str, Value] = {}
    places = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(places) - len(given.defaults)) + list(given.defaults)
    everything = [*zip(places, defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    names = Walker(program, Trace(function.module, None), {})
    for place, (parameter, default) in enumerate(everything):
        name = parameter.arg
        if place == 0 and function.owner is not None and name in ("self", "cls"):
            values[name] = owner or Value(data=Instance(function.owner))
            continue
        value = known.get(name)
        if value is None and default is not None:
            value = names.evaluate(default)
        if value is None or value == UNKNOWN or (is_const(value) and known is function.arguments):
            value = _by_name(names, function, parameter, value or UNKNOWN)
            if value == UNKNOWN and name not in known and name in _unwrapped(function.module):
                value = Value(data=Thing("ddp"))
        values[name] = value
    return values


def _unwrapped(module: Module) -> set[str]:
    """The names that a file takes a wrapper off: `model.module`, `unwrap_model(model)`."""
    if module.unwrapped is None:
        module.unwrapped = set()
        is_named = any(
            _UNWRAPS.search(line)
            for line in module.lines
            if ".module" in line or "unwrap" in line or "de_parallel" in line
        )
        for node in ast.walk(module.tree) if is_named else ():
            if isinstance(node, ast.Attribute) and node.attr == "module" and isinstance(node.value, ast.Name):
                module.unwrapped.add(node.value.id)
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Name):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in ("unwrap_model", "unwrap_ddp", "de_parallel"):
                    module.unwrapped.add(node.args[0].id)
    return module.unwrapped


def _by_name(names: Walker, function: Function, parameter: ast.arg, value: Value) -> Value:
    annotation = names.module.text(parameter.annotation, 200) if parameter.annotation is not None else ""
    tag = annotation.strip("'\"").rpartition(".")[2]
    if tag in libraries.ACCELERATOR or (
        parameter.arg == "accelerator" and "accelerate" in names.module.imports.values()
    ):
        return Value(data=Thing("accelerator"))
    if "DistributedDataParallel" in annotation or tag == "DDP":
        return Value(data=Thing("ddp"))
    if parameter.arg == "rank" and "local_rank" in function.parameters:
        return of("rank", names.module.step("parameter rank, beside local_rank", parameter))
    found = names.by_name(parameter.arg, ast.copy_location(ast.Name(parameter.arg, ast.Load()), parameter))
    return found if found != UNKNOWN else value


def _guard_of(program: Program, function: Function) -> Guard:
    """On which ranks the body runs, for the decorators."""
    guard: Guard = ()
    for decorator in function.node.decorator_list:
        node = decorator.func if isinstance(decorator, ast.Call) else decorator
        walker = Walker(program, Trace(function.module, None), {})
        value = walker.evaluate(node)
        if isinstance(value.data, Bound):
            guard = both(guard, _guard_in(program, value.data.function))
            continue
        name = value.data.name if isinstance(value.data, Ref) else walker.path_of(node) or ""
        atom = facts.guard_of_decorator(name)
        if atom is not None:
            guard = both(guard, (atom,))
    return guard


def _guard_in(program: Program, decorator: Function) -> Guard:
    """Under which guard a given decorator calls what it decorates."""
    names = decorator.parameters
    for inner in decorator.inner.values():
        trace = program.trace_of.get(inner) if isinstance(inner, Function) else None
        for call in trace.calls if trace else ():
            if isinstance(call.node.func, ast.Name) and call.node.func.id in names:
                return call.guard
    atom = facts.guard_of_decorator(decorator.name)
    return (atom,) if atom is not None else ()


def _special(program: Program, call: Call) -> None:
    """Calls that start functions on other processes, or that define arguments of the command line."""
    if call.last == "add_argument":
        _add_argument(call)
    elif call.last == "spawn" and (
        "multiprocessing" in call.name or call.name.startswith(("mp.", "xmp.", "torch_xla"))
    ):
        _spawn(program, call, call.argument(0, "fn"), call.argument(1, "args"))
    elif call.last == "Process" and "target" in call.keywords:
        _process(program, call)
    elif call.last in ("launch", "notebook_launcher", "launch_job") and call.arguments:
        target = call.arguments[0].data
        if isinstance(target, Bound):
            program.started.add(target.function)


def _spawn(program: Program, call: Call, target: Value, given: Value) -> None:
    if not isinstance(target.data, Bound):
        return
    function = target.data.function
    program.started.add(function)
    if not _MANY_NODES.search("\n".join(call.module.lines)):
        program.one_node.add(call.module)
        program.one_node.add(function.module)
    names = [name for name in function.parameters if name not in ("self", "cls")]
    if names:
        step = call.module.step(f"{names[0]} of {function.name}() <- {call.module.text(call.node)}", call.node)
        function.arguments[names[0]] = of("spawn_rank", step)
    if isinstance(given.data, Many):
        for name, value in zip(names[1:], given.data.items, strict=False):
            known = function.arguments.get(name)
            function.arguments[name] = value if known is None else join(known, value)


def _process(program: Program, call: Call) -> None:
    target, given = call.keywords["target"].data, call.keywords.get("args", UNKNOWN).data
    if not isinstance(target, Bound) or not isinstance(given, Many):
        return
    names = target.function.parameters
    for name, value in zip(names, given.items, strict=False):
        if value.data == Ref("<index>"):
            program.started.add(target.function)
            program.one_node.add(call.module)
            target.function.arguments[name] = of(
                "spawn_rank", call.module.step(f"{name} <- one of the processes", call.node)
            )


def _add_argument(call: Call) -> None:
    options = [str(constant(one)) for one in call.arguments if isinstance(constant(one), str)]
    if not options:
        return
    names = [option.lstrip("-").replace("-", "_") for option in options]
    place = str(constant(call.keywords.get("dest", UNKNOWN), "")) or next(
        (name for option, name in zip(options, names, strict=True) if option.startswith("--")), names[0]
    )
    default = call.keywords.get("default", UNKNOWN)
    step = call.module.step(f"args.{place} <- {options[-1]}", call.node)
    value = default if default.kind else UNKNOWN
    if "local_rank" in names:
        value = of("local_rank", step)
    known = call.module.loose.get(place)
    if value.kind:
        call.module.loose[place] = value if known is None else join(value, known)


def _link(program: Program) -> None:
    """Who calls whom, and the guards that all callers of a function share."""
    for trace in program.traces:
        for call in trace.calls:
            callee = call.callee
            if isinstance(callee, Class):
                callee = program.method(callee, "__init__")
            if callee is not None:
                program.callers.setdefault(callee, []).append(call)
            for value in () if _RUNS_IT.search(call.name) else (*call.arguments, *call.keywords.values()):
                if isinstance(value.data, Bound) and value.data.function not in program.started:
                    program.handed_over.add(value.data.function)


def entry_guard(program: Program, function: Function | None) -> Guard:
    """What holds at every call of a function that is seen, all the way up; empty where none is seen."""
    known: dict[Function, Guard] = program.memory.setdefault("entry guards", {})  # type: ignore[assignment]
    if function is None:
        return ()
    if function in known:
        return known[function]
    known[function] = ()  # recursion
    guard: Guard | None = None
    if function not in program.started and function not in program.handed_over:
        callers = program.callers.get(function, ())
        # A test calls what it likes, on one rank.
        for call in [one for one in callers if not one.module.is_test] or callers:
            if call.caller is function:
                continue
            here = both(call.guard, entry_guard(program, call.caller))
            guard = here if guard is None else _common(guard, here)
    known[function] = guard or ()
    return known[function]


def _common(first: Guard, second: Guard) -> Guard:
    scopes = {(atom.scope, atom.which) for atom in second}
    sure = set(second)
    common = [atom for atom in first if atom in sure]
    weak = [atom for atom in first if atom not in sure and (atom.scope, atom.which) in scopes]
    return (*common, *(Atom(atom.scope, atom.which, False, atom.text, atom.trail) for atom in weak))


def whole_guard(program: Program, call: Call) -> Guard:
    """What holds wherever a call is made: its branches and those of all callers."""
    return both(call.guard, entry_guard(program, call.caller))
