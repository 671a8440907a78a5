"""Calls: to functions of the given files, whose arguments are handed on, and to known libraries."""

from __future__ import annotations

import ast
import re
from dataclasses import replace

from rankwise.check import facts, libraries
from rankwise.check.evaluate import Evaluator
from rankwise.check.finding import Step
from rankwise.check.objects import Bound, ClassRef, Instance
from rankwise.check.program import Program
from rankwise.check.source import Class, Function
from rankwise.check.trace import Call, Item, Trace
from rankwise.check.values import (
    OTHER_RANK,
    RANKS,
    UNKNOWN,
    VARYING,
    Atom,
    Const,
    DeviceName,
    Many,
    Ref,
    Table,
    Test,
    Thing,
    Value,
    const,
    constant,
    holding,
    is_const,
    join,
    of,
)

_SAME = frozenset(
    ["int", "str", "float", "Path", "copy.copy", "copy.deepcopy", "typing.cast", "torch.compile", "math.ceil", "round"]
)
_SAME_OBJECT = frozenset({"to", "cuda", "cpu", "eval", "train", "half", "float", "bfloat16", "strip", "copy", "item"})
_UNWRAP = frozenset({"unwrap_model", "unwrap_ddp", "de_parallel", "unwrap", "extract_model_from_parallel"})
_MAX_INLINE = 3
_MAX_MEMORY = 4000


class Caller(Evaluator):
    """Evaluates calls and writes them down."""

    def __init__(self, program: Program, trace: Trace, variables: dict[str, Value]) -> None:
        super().__init__(program, trace, variables)
        self.items: list[Item] = trace.items
        self.loops: tuple[ast.stmt, ...] = ()
        self.in_handler = False
        self.global_names: frozenset[str] = frozenset()
        self.depth = 0
        """How many calls deep this is evaluated only for its result."""

    def call(self, node: ast.Call) -> Value:
        receiver: Value | None = None
        if isinstance(node.func, ast.Attribute):
            receiver = self.evaluate(node.func.value)
            function = self.attribute_of(node.func, receiver)
        else:
            function = self.evaluate(node.func)
        name = (
            function.data.name if isinstance(function.data, Ref) else self.path_of(node.func) or _last_name(node.func)
        )
        arguments = [self.evaluate(one) for one in node.args]
        keywords = {one.arg: self.evaluate(one.value) for one in node.keywords if one.arg}
        for one in node.keywords:
            if one.arg is None:
                self.evaluate(one.value)
        if name == "range" and len(node.args) == 3:
            self._slice(node.args[0], node.args[2])
        callee, uncertain = self._callee(node, function, receiver)
        made = Call(
            node, name, callee, receiver, function, arguments, keywords, self.guard, self.trace.function, self.module
        )
        made.loops, made.in_handler, made.uncertain = self.loops, self.in_handler, uncertain
        self.items.append(made)
        self.trace.calls.append(made)
        if callee is not None:
            self._hand_on(callee, made, function)
        return self._result(made, function, uncertain)

    def leaves(self, node: ast.Call) -> bool:
        """Whether a call ends the process."""
        made = self.trace.calls[-1] if self.trace.calls else None
        return made is not None and made.node is node and facts.is_exit(made.name)

    def _callee(self, node: ast.Call, function: Value, receiver: Value | None) -> tuple[Function | Class | None, bool]:
        if isinstance(function.data, Bound):
            return function.data.function, False
        if isinstance(function.data, ClassRef):
            return function.data.of, False
        if isinstance(function.data, Instance):
            method = self.program.method(function.data.of, "__call__") or self.program.method(
                function.data.of, "forward"
            )
            return method, False
        if isinstance(node.func, ast.Attribute) and function.data is None and receiver is not None:
            if isinstance(receiver.data, Ref | Thing | Const | Many | Table | Instance):
                if isinstance(node.func.value, ast.Call) and _last_name(node.func.value.func) == "super":
                    return None, False
                return None, False
            return self.program.method_by_name(node.func.attr, self.module), True
        return None, False

    def _hand_on(self, callee: Function | Class, made: Call, function: Value) -> None:
        """Join what is passed to what is known of the callee's parameters."""
        if self.depth:
            return
        owner: Class | None = None
        if isinstance(callee, Class):
            owner = callee
            method = self.program.method(callee, "__init__")
            if method is None:
                for name, value in made.keywords.items():
                    _put(owner.attributes, name, value)
                return
            callee = method
        lone = any(atom.scope == "single" and atom.which == "main" and atom.sure for atom in made.guard)
        for name, value in self._bind(callee, made).items():
            if lone and isinstance(value.data, Thing) and value.data.tag in ("ddp", "fsdp", "prepared"):
                value = UNKNOWN  # a lone process has no wrapper
            if value.trail and value.kind:
                value = value.via(
                    f"{name} of {callee.name}() <- {self._shown(made, name, callee)}",
                    made.module.path,
                    made.node.lineno,
                )
            _put(callee.arguments, name, value)

    def _shown(self, made: Call, name: str, callee: Function) -> str:
        names = _positional(callee)
        node = made.argument_node(names.index(name) if name in names else -1, name)
        return self.module.text(node) if node is not None else name

    def _bind(self, callee: Function, made: Call) -> dict[str, Value]:
        names = _positional(callee)
        if any(isinstance(one, ast.Starred) for one in made.node.args):
            first = next(place for place, one in enumerate(made.node.args) if isinstance(one, ast.Starred))
            bound = dict(zip(names[:first], made.arguments[:first], strict=False))
        else:
            bound = dict(zip(names, made.arguments, strict=False))
        known = set(callee.parameters)
        return bound | {name: value for name, value in made.keywords.items() if name in known}

    def _result(self, made: Call, function: Value, uncertain: bool) -> Value:
        varies = any(value.varies for value in made.arguments) or any(value.varies for value in made.keywords.values())
        if isinstance(made.callee, Class):
            return Value("", varies, None, Instance(made.callee))
        if isinstance(function.data, Bound):
            owner = function.data.owner
            return self.call_bound(function.data.function, owner, self._bind(function.data.function, made), varies)
        if isinstance(made.callee, Function) and uncertain and made.callee.result is not None:
            return made.callee.result
        return self._outside(made, varies)

    def call_function(self, function: Function, owner: Value | None) -> Value:
        return self.call_bound(function, owner, {}, False)

    def call_bound(self, function: Function, owner: Value | None, given: dict[str, Value], varies: bool) -> Value:
        """What a function of the given files returns for these arguments."""
        if self.depth < _MAX_INLINE and function.is_small:
            key = (
                function,
                tuple(sorted((name, _shape(value)) for name, value in given.items())),
            )
            memory = self.program.inlined
            if key not in memory:
                if len(memory) > _MAX_MEMORY:
                    memory.clear()
                memory[key] = UNKNOWN  # while it is under way: recursion
                memory[key] = self.program.inline(function, owner, given, self.depth + 1)
            result = memory[key]
        else:
            result = function.result if function.result is not None else UNKNOWN
        if result.test is not None:
            result = replace(result, test=_by_helper(result.test, function))
        if is_const(result) and function.name.startswith("get_") and function.name in facts.CALLED:
            result = facts.called(function.name) or result
        return VARYING if result == UNKNOWN and varies else result

    def _outside(self, made: Call, varies: bool) -> Value:
        """What a function outside of the given files returns."""
        name, last, receiver = made.name, made.last, made.receiver
        if name in _SAME or (name in ("max", "min", "abs", "getattr") and made.arguments):
            return self._same(made, name)
        known = self._of_environment(made)
        if known is not None:
            return known
        if len(made.arguments) > 1 and facts.makes_shared_folder(last):
            varies = any(value.varies and not value.kind for value in made.arguments)
        inner = made.argument(-1, "sampler") if last == "DataLoader" else made.argument(0, "module", "model")
        plain = Value(data=Thing(inner.data.tag)) if isinstance(inner.data, Thing) else UNKNOWN
        thing = libraries.made(name, plain, made.node.lineno)
        if thing is not None:
            if thing.tag == "ddp" and constant(made.argument(-1, "broadcast_buffers")) is False:
                thing = replace(thing, tag="quiet ddp")
            return Value("", varies and thing.tag == "path", None, thing)
        if last in _UNWRAP:
            return Value(data=Thing("bare"))
        if last == "prepare" and receiver is not None and _tag(receiver) == "accelerator":
            return _prepared(made)
        if facts.is_varying(name):
            return VARYING
        if name == "torch.device":
            return _device(UNKNOWN, varies)  # a wrong number is told here, and not at each use again
        if last == "device_name":
            return _device(made.argument(0), varies)
        if receiver is not None:
            if last == "format" and isinstance(constant(receiver), str):
                text = str(constant(receiver))
                if not text.startswith("cuda:{"):
                    return _varying(varies)
                return _device(made.argument(0), varies, (self.module.path, made.node))
            if last in _SAME_OBJECT and not isinstance(receiver.data, Ref) and not receiver.test:
                return receiver
        value = facts.called(name) if not isinstance(receiver.data if receiver else None, Thing) else _of_thing(made)
        if value is not None:
            return self._ranked(value, made)
        if facts.says_distributed(last) or name in (
            "torch.distributed.is_initialized",
            "torch.distributed.is_available",
        ):
            return Value(test=Test((), (Atom("single", "main"),)))
        varies |= receiver is not None and receiver.varies and not isinstance(receiver.data, Ref)
        return OTHER_RANK if facts.is_other_rank(last) else _varying(varies)

    def _same(self, made: Call, name: str) -> Value:
        if name == "getattr":
            attribute = constant(made.argument(1))
            if isinstance(attribute, str) and made.node.args:
                inner = ast.copy_location(ast.Attribute(made.node.args[0], attribute, ast.Load()), made.node)
                return self.evaluate(inner)
            return UNKNOWN
        if name in ("max", "min"):
            return next(
                (one for one in made.arguments if one.kind), _varying(any(one.varies for one in made.arguments))
            )
        value = made.argument(1 if name == "typing.cast" else 0)
        if name == "int" and isinstance(constant(value), str):
            text = str(constant(value))
            return const(int(text)) if text.lstrip("-").isdecimal() and len(text) < 10 else UNKNOWN
        return value

    def _of_environment(self, made: Call) -> Value | None:
        reader = (
            made.receiver is not None
            and isinstance(made.receiver.data, Ref)
            and made.receiver.data.name == "os.environ"
        )
        if made.name == "os.getenv" or (reader and made.last in ("get", "pop", "setdefault")):
            return self.environment(made.argument(0, "key"), made.argument(1, "default"), made.node)
        if reader and made.last == "copy":
            return made.receiver
        if made.name == "dict" and made.arguments and made.arguments[0].data == Ref("os.environ"):
            return made.arguments[0]
        if made.last == "get" and made.receiver is not None and isinstance(made.receiver.data, Table):
            return made.receiver.data.get(constant(made.argument(0)))
        return None

    def _ranked(self, value: Value, made: Call) -> Value:
        if any(name in made.keywords for name in ("group", "process_group")) or (
            made.last == "get_rank" and made.arguments and not is_const(made.arguments[0])
        ):
            self.trace.reads_rank = True
            return VARYING  # its rank in that group
        if made.last in ("get_local_rank", "get_rank") and made.receiver is not None:
            base = self.module.text(made.node.func)
            of_module = isinstance(made.receiver.data, Ref) and "[" not in base
            if not of_module and (made.last == "get_local_rank" or re.search("mesh|group|parallel", base)):
                self.trace.reads_rank = True
                return VARYING  # of a mesh or a group too
        if isinstance(value.data, Many):
            items = tuple(self._ranked(item, made) for item in value.data.items)
            return replace(value, data=Many(items))
        if value.kind == "rank" and constant(made.argument(0)) == "local":
            value = of("local_rank")
        if value.kind == "rank" and self.program.is_one_node(self.module):
            value = of("spawn_rank")
        self.trace.reads_rank |= value.kind in RANKS or value.test is not None
        return value.via(self.module.text(made.node), self.module.path, made.node.lineno)


def _tag(value: Value) -> str:
    return value.data.tag if isinstance(value.data, Thing) else ""


def _prepared(made: Call) -> Value:
    """What `accelerator.prepare` gives: which of it is the model is not known until something calls it."""
    if made.keywords or any(isinstance(one, ast.Starred) for one in made.node.args):
        return UNKNOWN
    items = [Value(data=Thing("prepared")) if _tag(one) in ("", "prepared") else UNKNOWN for one in made.arguments]
    return items[0] if len(items) == 1 else holding(Many(tuple(items)), items)


def _of_thing(made: Call) -> Value | None:
    thing = made.receiver.data if made.receiver is not None else None
    return libraries.attribute(thing, made.last) if isinstance(thing, Thing) else None


def _shape(value: Value) -> str:
    """What of an argument may change what a function returns."""
    data = value.data
    if isinstance(data, Many):
        return f"{value.kind}[{' '.join(_shape(item) for item in data.items)}]"
    known = data.value if isinstance(data, Const) else data.tag if isinstance(data, Thing) else type(data).__name__
    return f"{value.kind} {value.varies} {value.test is not None and str(value.test)} {known!r:.60}"


def _device(index: Value, varies: bool, place: tuple[str, ast.expr] | None = None) -> Value:
    return holding(DeviceName(index, place), (index,), varies)


def _varying(varies: bool) -> Value:
    return VARYING if varies else UNKNOWN


def _put(table: dict[str, Value], name: str, value: Value) -> None:
    known = table.get(name)
    table[name] = value if known is None else join(known, value)


def _positional(callee: Function) -> list[str]:
    given = callee.node.args
    names = [one.arg for one in (*given.posonlyargs, *given.args)]
    static = any(isinstance(one, ast.Name) and one.id == "staticmethod" for one in callee.node.decorator_list)
    return names[1:] if callee.owner is not None and not static else names


def _by_helper(test: Test, function: Function) -> Test:
    """The test, with the helper that it stands in as its last step."""
    name = f"{function.name}()"
    returns = [one for one in function.node.body if isinstance(one, ast.Return)]
    node = returns[-1] if returns else function.node
    text = function.module.text(node.value) if isinstance(node, ast.Return) and node.value else "..."
    step = Step(f"{name} <- {text}", function.module.path, node.lineno)

    def put(guard: tuple[Atom, ...]) -> tuple[Atom, ...]:
        return tuple(replace(atom, named=name, trail=(step, *atom.trail)) for atom in guard)

    return Test(put(test.when_true), put(test.when_false))


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else ""
