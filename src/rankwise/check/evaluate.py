"""Expressions: from syntax to what is known of the value."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace

from rankwise.check import facts
from rankwise.check.arithmetic import SHARE, arithmetic, is_product, merge
from rankwise.check.conditions import by_name, combine, compare, truth
from rankwise.check.names import Names
from rankwise.check.values import (
    UNKNOWN,
    VARYING,
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
    of,
)


class Evaluator(Names):
    """Evaluates the expressions of one function; `Walker` adds the statements."""

    def evaluate(self, node: ast.expr) -> Value:
        method = _METHODS.get(type(node))
        if method is not None:
            return method(self, node)
        varies = False
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                varies |= self.evaluate(child).varies
        return VARYING if varies else UNKNOWN

    def call(self, node: ast.Call) -> Value:
        raise NotImplementedError

    def _subscript(self, node: ast.Subscript) -> Value:
        base, key = self.evaluate(node.value), self.evaluate(node.slice)
        if isinstance(node.slice, ast.Slice):
            self._slice(node.slice.lower, node.slice.step)
        if isinstance(base.data, Ref) and base.data.name == "os.environ":
            return self.environment(key, None, node)
        if key.kind == "local_rank" and isinstance(node.value, ast.Call) and self._splits(node.value):
            self.trace.shares.append((node.slice, key, "which items are this process's"))
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

    def _splits(self, node: ast.Call) -> bool:
        """Whether a call divides something by the world size: `chunk(x, world_size)`."""
        made = next((one for one in reversed(self.trace.calls) if one.node is node), None)
        splits = made is not None and made.last in ("array_split", "chunk", "split", "tensor_split")
        return made is not None and splits and any(one.kind == "world_size" for one in made.arguments)

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
        for part, rest in ((node.left, right), (node.right, left)) if isinstance(node.op, ast.Add) else ():
            if part in self.trace.sums and not is_product(rest):
                self.trace.sums[node] = self.trace.sums[part]
        for one, other in ((left, right), (right, left)):
            if isinstance(node.op, ast.Mult) and one.kind == "local_rank" and other.data is SHARE:
                self.trace.shares.append((node, one, "which items are this process's"))
        result = arithmetic(node.op, left, right, node.right)
        if result is not None:
            return result.via(self.module.text(node), self.module.path, node.lineno)
        if isinstance(node.op, ast.Add) and _starts_device(left):
            return holding(DeviceName(right, (self.module.path, node)), (right,), varies)
        if isinstance(node.op, ast.Mod) and isinstance(constant(left), str) and _starts_device(left):
            inner = right.data.items[-1] if isinstance(right.data, Many) and right.data.items else right
            return holding(DeviceName(inner, (self.module.path, node)), (inner,), varies)
        if isinstance(node.op, ast.Div) and isinstance(left.data, Thing) and left.data.tag == "path":
            return Value("", varies, None, left.data)
        return VARYING if varies else UNKNOWN

    def _unary(self, node: ast.UnaryOp) -> Value:
        inner = self.evaluate(node.operand)
        if isinstance(node.op, ast.Not):
            return Value("", inner.varies, ~truth(inner), None, inner.trail)
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
            test = truth(value)
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
            known = left.kind or rights[0].kind or left.test
            test = compare(left, node.ops[0], rights[0], self.module.text(node) if known else "")
            test = test or by_name(node, left, rights[0])
            if test is not None:
                return Value("", varies, test, None, trail)
        return VARYING if varies else UNKNOWN

    def _share(self, first: ast.expr, left: Value, second: ast.expr, right: Value) -> None:
        """Write down `i % world_size == local_rank`."""
        for node, other, value in ((second, first, right), (first, second, left)):
            if value.kind != "local_rank" or not isinstance(other, ast.BinOp) or not isinstance(other.op, ast.Mod):
                continue
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
        test = truth(self.evaluate(node.test))
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
        named = len(parts) >= 2 and str(constant(parts[-2], "")).endswith(":") and not is_const(parts[-1])
        if named and (len(parts) > 2 or _starts_device(parts[0])):
            return holding(DeviceName(parts[-1], (self.module.path, node)), parts[-1:], varies)
        return VARYING if varies else UNKNOWN

    def _many(self, node: ast.Tuple | ast.List | ast.Set) -> Value:
        items: list[Value] = []
        for one in node.elts:
            value = self.evaluate(one)
            items += value.data.items if isinstance(one, ast.Starred) and isinstance(value.data, Many) else [value]
        return holding(Many(tuple(items)), items, any(item.varies for item in items))

    def _dict(self, node: ast.Dict) -> Value:
        items: list[tuple[object, Value]] = []
        for key, value in zip(node.keys, node.values, strict=True):
            known, inner = self.evaluate(key) if key is not None else UNKNOWN, self.evaluate(value)
            if is_const(known):
                items.append((constant(known), inner))
        return holding(Table(tuple(items)), (value for _, value in items), any(value.varies for _, value in items))

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


_METHODS: dict[type[ast.expr], Callable[..., Value]] = {
    ast.Name: Names.name,
    ast.Constant: lambda self, node: const(node.value),
    ast.Attribute: Names.attribute,
    ast.Call: lambda self, node: self.call(node),
    ast.Subscript: Evaluator._subscript,
    ast.BinOp: Evaluator._binary,
    ast.UnaryOp: Evaluator._unary,
    ast.BoolOp: Evaluator._bool,
    ast.Compare: Evaluator._compare,
    ast.IfExp: Evaluator._conditional,
    ast.JoinedStr: Evaluator._joined,
    ast.FormattedValue: lambda self, node: self.evaluate(node.value),
    ast.Tuple: Evaluator._many,
    ast.List: Evaluator._many,
    ast.Set: Evaluator._many,
    ast.Dict: Evaluator._dict,
    ast.NamedExpr: Evaluator._walrus,
    ast.Starred: lambda self, node: self.evaluate(node.value),
    ast.Await: lambda self, node: self.evaluate(node.value),
    ast.DictComp: Evaluator._comprehension,
    ast.ListComp: Evaluator._comprehension,
    ast.SetComp: Evaluator._comprehension,
    ast.GeneratorExp: Evaluator._comprehension,
    ast.Lambda: lambda self, node: UNKNOWN,
}


def _starts_device(value: Value) -> bool:
    text = constant(value)
    return isinstance(text, str) and text.startswith(("cuda:", "npu:", "xpu:", "mlu:", "musa:", "hpu:", "gpu:"))
