"""Expressions: from syntax to what is known of the value."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace

from rankwise.check import facts
from rankwise.check.conditions import by_name, combine, compare, truth
from rankwise.check.finding import Step
from rankwise.check.program import Program
from rankwise.check.source import Class, Function, Module
from rankwise.check.trace import Trace
from rankwise.check.values import (
    RANKS,
    UNKNOWN,
    VARYING,
    Atom,
    Const,
    DeviceName,
    Guard,
    Many,
    Ref,
    Table,
    Test,
    Thing,
    Value,
    const,
    constant,
    is_const,
    join,
    of,
)


@dataclass(frozen=True)
class Instance:
    """An object of a class in the given files."""

    of: Class


@dataclass(frozen=True)
class Bound:
    """A function of the given files, with the object that it is a method of."""

    function: Function
    owner: Value | None = None


@dataclass(frozen=True)
class ClassRef:
    of: Class


@dataclass(frozen=True)
class ModuleRef:
    of: Module


class Evaluator:
    """Evaluates the expressions of one function; `Walker` adds the statements."""

    def __init__(self, program: Program, trace: Trace, variables: dict[str, Value]) -> None:
        self.program = program
        self.trace = trace
        self.module = trace.module
        self.variables = variables
        self.guard: Guard = ()
        self._methods: dict[type[ast.expr], Callable[..., Value]] = {
            ast.Name: self._name,
            ast.Constant: lambda node: const(node.value),
            ast.Attribute: self._attribute,
            ast.Call: lambda node: self.call(node),
            ast.Subscript: self._subscript,
            ast.BinOp: self._binary,
            ast.UnaryOp: self._unary,
            ast.BoolOp: self._bool,
            ast.Compare: self._compare,
            ast.IfExp: self._conditional,
            ast.JoinedStr: self._joined,
            ast.FormattedValue: lambda node: self.evaluate(node.value),
            ast.Tuple: self._many,
            ast.List: self._many,
            ast.Dict: self._dict,
            ast.NamedExpr: self._walrus,
            ast.Starred: lambda node: self.evaluate(node.value),
            ast.Await: lambda node: self.evaluate(node.value),
            ast.DictComp: self._comprehension,
            ast.ListComp: self._comprehension,
            ast.SetComp: self._comprehension,
            ast.GeneratorExp: self._comprehension,
            ast.Lambda: lambda node: UNKNOWN,
        }

    def evaluate(self, node: ast.expr) -> Value:
        method = self._methods.get(type(node))
        if method is not None:
            return method(node)
        varies = False
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                varies |= self.evaluate(child).varies
        return VARYING if varies else UNKNOWN

    def call(self, node: ast.Call) -> Value:
        raise NotImplementedError

    def call_function(self, function: Function, owner: Value | None) -> Value:
        raise NotImplementedError

    def path_of(self, node: ast.expr) -> str | None:
        """ "self.x.y" where that is what the expression is."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        return ".".join((node.id, *reversed(parts)))

    def _name(self, node: ast.Name) -> Value:
        name = node.id
        if name in self.variables:
            return self.variables[name]
        return self.outer_name(name)

    def outer_name(self, name: str) -> Value:
        """A name that this function does not assign."""
        function = self.trace.function
        while function is not None:
            if name in function.inner:
                return self._wrap(function.inner[name])
            function = function.outer
            if function is not None and function in self.program.trace_of:
                known = self.program.shared_variables.get(function, {})
                if name in known:
                    return known[name]
        if name in self.module.globals:
            return self.module.globals[name]
        if name in self.module.names:
            return self._wrap(self.module.names[name])
        if name in self.module.imports:
            return self._imported(self.module.imports[name])
        return UNKNOWN

    def _imported(self, dotted: str) -> Value:
        found = self.program.lookup(dotted, self.module)
        if found is None:
            return Value(data=Ref(self.program.outside(dotted, self.module)))
        if isinstance(found, Module):
            return Value(data=ModuleRef(found))
        return found if isinstance(found, Value) else self._wrap(found)

    def _wrap(self, found: Function | Class, owner: Value | None = None) -> Value:
        return Value(data=Bound(found, owner) if isinstance(found, Function) else ClassRef(found))

    def _attribute(self, node: ast.Attribute) -> Value:
        path = self.path_of(node)
        if path is not None and path in self.variables:
            return self.variables[path]
        base = self.evaluate(node.value)
        data = base.data
        if isinstance(data, Ref):
            return self._of_ref(f"{data.name}.{node.attr}", node)
        if isinstance(data, ModuleRef):
            return self._imported(".".join((*data.of.parts, node.attr)))
        if isinstance(data, Instance):
            found = self._of_instance(base, data.of, node)
            if found is not None:
                return found
        elif isinstance(data, ClassRef):
            method = self.program.method(data.of, node.attr)
            if method is not None:
                return self._wrap(method)
            if node.attr in data.of.attributes:
                return data.of.attributes[node.attr]
        elif isinstance(data, Thing):
            known = facts.attribute(data, node.attr)
            if known is not None:
                return known.via(self.module.text(node), self.module.path, node.lineno)
        return self._loose(node, base)

    def _of_ref(self, dotted: str, node: ast.Attribute) -> Value:
        if dotted == "os.environ":
            return Value(data=Ref(dotted))
        if dotted.split(".")[0] in ("torch", "os"):
            return Value(data=Ref(dotted))
        test = facts.named_test(node.attr)
        return Value("", bool(test), None, Ref(dotted))

    def _of_instance(self, base: Value, owner: Class, node: ast.Attribute) -> Value | None:
        for one in self.program.base_classes(owner):
            method = one.methods.get(node.attr)
            if method is not None:
                if any(_last(each).endswith("property") for each in method.node.decorator_list):
                    return self.call_function(method, base)
                return self._wrap(method, base)
            value = one.attributes.get(node.attr)
            if value is not None and not (is_const(value) and node.attr in facts.NAMED):
                return value
        return None

    def _loose(self, node: ast.Attribute, base: Value) -> Value:
        """An attribute of an object of which nothing is known, such as parsed arguments or a configuration."""
        name = node.attr
        for module in (self.module, *self.program.imported_by(self.module)):
            value = module.loose.get(name)
            if value is not None and not (is_const(value) and name in facts.NAMED):
                return value
        return self.by_name(name, node) if not isinstance(base.data, Const) else UNKNOWN

    def by_name(self, name: str, node: ast.expr) -> Value:
        """What a name alone says, where nothing else does."""
        kind = facts.NAMED.get(name)
        if kind:
            return of(kind, self.module.step(self.module.text(node), node))
        if facts.says_distributed(name):
            return Value(test=Test((), (Atom("single", "main"),)))
        return facts.named_test(name) or UNKNOWN

    def _subscript(self, node: ast.Subscript) -> Value:
        base, key = self.evaluate(node.value), self.evaluate(node.slice)
        if isinstance(node.slice, ast.Slice):
            self._slice(node.slice.lower, node.slice.step)
        if isinstance(base.data, Ref) and base.data.name == "os.environ":
            return self.environment(key, None, node)
        if isinstance(base.data, Table):
            return base.data.get(constant(key))
        index = constant(key)
        if (
            isinstance(base.data, Many)
            and isinstance(index, int)
            and -len(base.data.items) <= index < len(base.data.items)
        ):
            return base.data.items[index]
        if isinstance(index, str):
            path = self.path_of(node.value)
            if path is not None and f"{path}[{index}]" in self.variables:
                return self.variables[f"{path}[{index}]"]
            named = facts.NAMED.get(index)
            if named and not is_const(base):
                return of(named, self.module.step(self.module.text(node), node))
        return VARYING if base.varies or key.varies else UNKNOWN

    def environment(self, key: Value, default: Value | None, node: ast.expr) -> Value:
        """What a variable of the environment holds."""
        name = constant(key)
        kind = facts.ENVIRONMENT.get(name) if isinstance(name, str) else None
        if kind:
            return of(kind, self.module.step(self.module.text(node), node))
        return default if default is not None and not is_const(default) else UNKNOWN

    def _binary(self, node: ast.BinOp) -> Value:
        left, right = self.evaluate(node.left), self.evaluate(node.right)
        varies = left.varies or right.varies
        if isinstance(node.op, ast.Add) and "local_rank" in (left.kind, right.kind):
            self.trace.sums[node] = left if left.kind == "local_rank" else right
        result = arithmetic(node.op, left, right, self.module.text(node.right, 200))
        if result is not None:
            return result.via(self.module.text(node), self.module.path, node.lineno)
        if isinstance(node.op, ast.Add) and _starts_device(left):
            return Value("", varies, None, DeviceName(right))
        if isinstance(node.op, ast.Mod) and isinstance(constant(left), str) and _starts_device(left):
            inner = right.data.items[-1] if isinstance(right.data, Many) and right.data.items else right
            return Value("", varies, None, DeviceName(inner))
        if isinstance(node.op, ast.Div) and isinstance(left.data, Thing) and left.data.tag == "path":
            return Value("", varies, None, left.data)
        return VARYING if varies else UNKNOWN

    def _unary(self, node: ast.UnaryOp) -> Value:
        inner = self.evaluate(node.operand)
        if isinstance(node.op, ast.Not):
            return Value("", inner.varies, ~truth(inner, self.module.text(node.operand)), None, inner.trail)
        number = constant(inner)
        if isinstance(node.op, ast.USub) and isinstance(number, int):
            return const(-number)
        return VARYING if inner.varies else UNKNOWN

    def _bool(self, node: ast.BoolOp) -> Value:
        before = self.guard
        tests: list[Test] = []
        values: list[Value] = []
        for part in node.values:
            value = self.evaluate(part)
            test = truth(value, self.module.text(part))
            values.append(value)
            tests.append(test)
            self.guard = (*self.guard, *(test.when_true if isinstance(node.op, ast.And) else test.when_false))
        self.guard = before
        test = combine(tests, isinstance(node.op, ast.And))
        trail = next((value.trail for value in values if value.trail), ())
        chosen = next((value for value in values if value.kind or isinstance(value.data, Thing)), UNKNOWN)
        if isinstance(node.op, ast.Or) and chosen.kind:
            return replace(chosen, test=None)
        varies = any(value.varies for value in values)
        return Value("", varies, test if test.when_true or test.when_false else None, None, trail)

    def _compare(self, node: ast.Compare) -> Value:
        left = self.evaluate(node.left)
        rights = [self.evaluate(one) for one in node.comparators]
        varies = left.varies or any(right.varies for right in rights)
        trail = left.trail or next((right.trail for right in rights if right.trail), ())
        self._share(node.left, left, node.comparators[0], rights[0])
        if len(rights) == 1:
            test = compare(left, node.ops[0], rights[0], self.module.text(node))
            test = test or by_name(self.module.text(node.left), node.ops[0], rights[0])
            if test is not None:
                return Value("", varies, test, None, trail)
        return VARYING if varies else UNKNOWN

    def _share(self, first: ast.expr, left: Value, second: ast.expr, right: Value) -> None:
        """Write down `i % world_size == local_rank`."""
        for node, other, value in ((second, first, right), (first, second, left)):
            if value.kind == "local_rank" and isinstance(other, ast.BinOp) and isinstance(other.op, ast.Mod):
                if self.evaluate(other.right).kind == "world_size":
                    self.trace.shares.append((node, value, "which items are this process's"))

    def _slice(self, start: ast.expr | None, step: ast.expr | None) -> None:
        """Write down `[local_rank::world_size]` and `range(local_rank, n, world_size)`."""
        if start is None or step is None:
            return
        value = self.evaluate(start)
        if value.kind == "local_rank" and self.evaluate(step).kind == "world_size":
            self.trace.shares.append((start, value, "which items are this process's"))

    def _conditional(self, node: ast.IfExp) -> Value:
        test = truth(self.evaluate(node.test), self.module.text(node.test))
        before = self.guard
        self.guard = (*before, *test.when_true)
        first = self.evaluate(node.body)
        self.guard = (*before, *test.when_false)
        second = self.evaluate(node.orelse)
        self.guard = before
        return merge(first, second, test)

    def _joined(self, node: ast.JoinedStr) -> Value:
        values = [self.evaluate(part) for part in node.values]
        varies = any(value.varies for value in values)
        parts = [value for value in values if constant(value) != ""]
        if len(parts) >= 2 and str(constant(parts[-2], "")).endswith(":") and not is_const(parts[-1]):
            if len(parts) > 2 or _starts_device(parts[0]):
                return Value("", varies, None, DeviceName(parts[-1]))
        return VARYING if varies else UNKNOWN

    def _many(self, node: ast.Tuple | ast.List) -> Value:
        items = tuple(self.evaluate(one) for one in node.elts)
        return Value("", any(item.varies for item in items), None, Many(items))

    def _dict(self, node: ast.Dict) -> Value:
        items: list[tuple[object, Value]] = []
        for key, value in zip(node.keys, node.values, strict=True):
            known, inner = self.evaluate(key) if key is not None else UNKNOWN, self.evaluate(value)
            if is_const(known):
                items.append((constant(known), inner))
        return Value("", any(value.varies for _, value in items), None, Table(tuple(items)))

    def _walrus(self, node: ast.NamedExpr) -> Value:
        value = self.evaluate(node.value)
        self.variables[node.target.id] = value
        return value

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> Value:
        saved = dict(self.variables)
        varies = False
        for part in node.generators:
            source = self.evaluate(part.iter)
            for name in ast.walk(part.target):
                if isinstance(name, ast.Name):
                    self.variables[name.id] = VARYING if source.varies else UNKNOWN
            for test in part.ifs:
                self.evaluate(test)
        if isinstance(node, ast.DictComp):
            value = self.evaluate(node.value)
            self.evaluate(node.key)
            if isinstance(node.value, ast.Subscript):
                base = self.evaluate(node.value.value)
                if isinstance(base.data, Ref) and base.data.name == "os.environ":
                    self.variables = saved
                    return base
        else:
            value = self.evaluate(node.elt)
        varies = value.varies
        self.variables = saved
        return VARYING if varies else UNKNOWN


def arithmetic(operator: ast.operator, left: Value, right: Value, right_text: str) -> Value | None:
    """The kind of a sum, product, quotient or remainder of ranks and sizes; None where it has none."""
    if isinstance(operator, ast.Mod) and left.kind in RANKS:
        if right.kind == "local_world_size" or any(
            word in right_text for word in ("gpu", "device", "local", "per_node")
        ):
            return of("local_rank") if left.kind != "spawn_rank" else left
        return VARYING
    if isinstance(operator, ast.Add) and {"local_rank", "spawn_rank"} & {left.kind, right.kind}:
        other = right if left.kind in ("local_rank", "spawn_rank") else left
        if isinstance(other.data, Const):
            return VARYING
        return replace(of("rank"), data=None) if other.data is _PRODUCT else VARYING
    if isinstance(operator, ast.Mult):
        kinds = {left.kind, right.kind}
        if kinds & {"node_rank", "some_rank", "rank"} or (left.varies or right.varies):
            return Value("", True, None, _PRODUCT)
        if kinds & {"num_nodes", "local_world_size"} and not kinds & RANKS and kinds != {"local_world_size"}:
            return of("world_size") if kinds == {"num_nodes", "local_world_size"} else UNKNOWN
        return Value("", False, None, _PRODUCT)
    return None


_PRODUCT = Ref("<product>")


def merge(first: Value, second: Value, test: Test) -> Value:
    """The value where ranks that pass a test have the first, the others the second."""
    joined = join(first, second)
    if first == second or not _divides(test):
        return joined
    nothing = (constant(first, True) in (None, False), constant(second, True) in (None, False))
    if nothing == (False, True):
        return replace(joined, varies=True, test=test, trail=joined.trail or _trail(test))
    if nothing == (True, False):
        return replace(joined, varies=True, test=~test, trail=joined.trail or _trail(test))
    return replace(joined, varies=True)


def _trail(test: Test) -> tuple[Step, ...]:
    return next((atom.trail for atom in (*test.when_true, *test.when_false) if atom.trail), ())


def _divides(test: Test) -> bool:
    return any(atom.scope != "single" for atom in test.when_true + test.when_false)


def _starts_device(value: Value) -> bool:
    text = constant(value)
    return isinstance(text, str) and text.startswith(("cuda:", "npu:", "xpu:", "mlu:", "musa:", "hpu:", "gpu:"))


def _last(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return _last(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
