"""Statements: runs one function without running it, and writes down what it does."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from typing import Literal

from rankwise.check import facts
from rankwise.check.arithmetic import merge
from rankwise.check.calls import Caller
from rankwise.check.conditions import asks_for_wrapper, gained_in, is_lone, refused, truth, with_lone
from rankwise.check.finding import Step
from rankwise.check.objects import Instance
from rankwise.check.program import Program
from rankwise.check.trace import Branch, Item, Leave, Loop, Store, Trace
from rankwise.check.values import (
    UNKNOWN,
    VARYING,
    Atom,
    Guard,
    Many,
    Ref,
    Test,
    Thing,
    Value,
    both,
    constant,
    is_const,
    join,
    of,
)

_How = Literal["return", "exit", "raise", "continue", "break"]
_MAX_DEPTH = 60
_SHARES = re.compile(r"loader|dataset|batch|sampler|samples|shard|share|chunk|subset|my_|mine|rank|worker")
_GOES_OVER = frozenset(
    {"", "enumerate", "zip", "sorted", "list", "tuple", "set", "reversed", "map", "filter", "range", "trange"}
)


class Walker(Caller):
    """Runs the statements of one function, or of a module."""

    def __init__(self, program: Program, trace: Trace, variables: dict[str, Value]) -> None:
        super().__init__(program, trace, variables)
        self.results: list[tuple[Value, Test]] = []
        self.lone: dict[str, bool] = {}
        """Flags of which one value is refused with many processes -> that value."""
        self._depth = 0

    def run(self, body: list[ast.stmt]) -> bool:
        """Whether the end of the block is never reached."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise RecursionError
        ended = False
        for statement in body:
            if self._statement(statement):
                ended = True
                break
        self._depth -= 1
        return ended

    def _statement(self, node: ast.stmt) -> bool:
        match node:
            case ast.Expr():
                self.evaluate(node.value)
                if isinstance(node.value, ast.Call) and self.leaves(node.value):
                    return self._leave(node.value, "exit")
            case ast.Assign():
                value = self.evaluate(node.value)
                for target in node.targets:
                    self.assign(target, value, node)
            case ast.AnnAssign():
                if node.value is not None:
                    self.assign(node.target, self.evaluate(node.value), node)
            case ast.AugAssign():
                inner = ast.copy_location(ast.BinOp(_loaded(node.target), node.op, node.value), node)
                self.assign(node.target, self.evaluate(inner), node)
            case ast.Return():
                value = self.evaluate(node.value) if node.value is not None else UNKNOWN
                self.results.append((value, Test(self.guard)))
                return self._leave(node, "return")
            case ast.Raise():
                if node.exc is not None:
                    self.evaluate(node.exc)
                return self._leave(node, "raise")
            case ast.Continue():
                return self._leave(node, "continue")
            case ast.Break():
                return self._leave(node, "break")
            case ast.Assert():
                held = truth(self.evaluate(node.test)).when_true
                # Ranks compared with anything else are checked here, and not divided.
                self.guard = both(self.guard, tuple(atom for atom in held if atom.scope != "some"))
            case ast.Delete():
                pass
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.variables.pop(node.name, None)
            case _:
                return self._compound(node)
        return False

    def _compound(self, node: ast.stmt) -> bool:
        match node:
            case ast.If():
                return self._if(node)
            case ast.For() | ast.AsyncFor():
                self._for(node)
            case ast.While():
                return self._while(node)
            case ast.With() | ast.AsyncWith():
                for item in node.items:
                    value = self.evaluate(item.context_expr)
                    if item.optional_vars is not None:
                        self.assign(item.optional_vars, value, node)
                return self.run(node.body)
            case ast.Try() | ast.TryStar():
                return self._try(node)
            case ast.Match():
                self._match(node)
        return False

    def _leave(self, node: ast.stmt | ast.expr, how: _How) -> bool:
        self.items.append(Leave(node, how, self.guard))
        return True

    def _if(self, node: ast.If) -> bool:
        test = truth(self.evaluate(node.test))
        test = with_lone(node.test, test, self.lone)
        test = Test(_placed(test.when_true, node.test), _placed(test.when_false, node.test))
        self.lone |= refused(node.body if is_lone(test.when_false) else node.orelse if is_lone(test.when_true) else ())
        before, variables, items = self.guard, self.variables, self.items
        then_items: list[Item] = []
        other_items: list[Item] = []
        wrapped = asks_for_wrapper(node.test)
        self.guard, self.variables, self.items = both(before, test.when_true), dict(variables), then_items
        entered = self.guard
        then_ended = self.run(node.body)
        then_variables = self.variables
        gained = gained_in(entered, self.guard, is_lone(test.when_false))
        self.guard, self.variables, self.items = both(before, test.when_false), dict(variables), other_items
        if wrapped is not None:
            self.variables[wrapped] = Value(data=Thing("bare"))
        entered = self.guard
        other_ended = self.run(node.orelse)
        other_variables = self.variables
        gained = both(gained, gained_in(entered, self.guard, is_lone(test.when_true)))
        self.guard, self.items = before, items
        if then_items or other_items:
            self.items.append(Branch(node, test, then_items, other_items))
        if then_ended:
            self.guard = both(before, test.when_false)
            self.variables = other_variables
        elif other_ended:
            self.guard = both(before, test.when_true)
            self.variables = then_variables
        else:
            self.guard = both(before, gained)
            self.variables = self._merged(then_variables, other_variables, test)
        return then_ended and other_ended

    def _merged(self, first: dict[str, Value], second: dict[str, Value], test: Test) -> dict[str, Value]:
        merged = dict(first)
        for name in first.keys() | second.keys():
            one, other = first.get(name), second.get(name)
            if one is None or other is None:
                merged[name] = one or other or UNKNOWN
            elif one is not other:
                merged[name] = value = merge(one, other, test)
                if value.test is not None and name.startswith("self.") and name.count(".") == 1:
                    owner = self.variables.get("self", UNKNOWN).data
                    if isinstance(owner, Instance):
                        owner.of.attributes[name[5:]] = value
        return merged

    def _for(self, node: ast.For | ast.AsyncFor) -> None:
        source = self.evaluate(node.iter)
        text = self.module.text(node.iter, 200)
        per_rank = source.varies or _SHARES.search(text) is not None or self._is_opaque(node.iter)
        is_range = isinstance(node.iter, ast.Call) and text.startswith(("range(", "trange("))
        element = VARYING if per_rank and not is_range else UNKNOWN
        if is_range and not source.varies:
            element = Value(data=Ref("<index>"))
        if isinstance(source.data, Many) and source.data.items:
            element = join(source.data.items[0], source.data.items[-1])
        self.assign(node.target, element, node)
        if isinstance(node.iter, ast.Call) and text.startswith("enumerate(") and isinstance(node.target, ast.Tuple):
            self.assign(node.target.elts[0], UNKNOWN, node)  # all ranks count alike
        self._loop(node, node.body)
        self.run(node.orelse)

    def _is_opaque(self, node: ast.expr) -> bool:
        """Whether a call of a function that was not given, and is not known, makes what is gone over."""
        made = self.trace.calls[-1] if isinstance(node, ast.Call) and self.trace.calls else None
        if made is None or made.node is not node or made.callee is not None:
            return False
        return isinstance(node.func, ast.Name) and made.last not in _GOES_OVER and made.name not in _GOES_OVER

    def _while(self, node: ast.While) -> bool:
        test = truth(self.evaluate(node.test))
        before = self.guard
        self.guard = both(before, test.when_true)
        self._loop(node, node.body)
        self.guard = before
        forever = isinstance(node.test, ast.Constant) and bool(node.test.value)
        return forever and not any(isinstance(one, ast.Break) for one in ast.walk(node))

    def _loop(self, node: ast.For | ast.AsyncFor | ast.While, body: list[ast.stmt]) -> None:
        before, variables, items = self.guard, dict(self.variables), self.items
        inner: list[Item] = []
        self.items = inner
        self.loops = (*self.loops, node)
        self.trace.loops.append(node)
        self.run(body)
        self.loops = self.loops[:-1]
        self.guard, self.items = before, items
        if inner:
            self.items.append(Loop(node, inner))
        self.variables = self._merged(self.variables, variables, Test())

    def _try(self, node: ast.Try | ast.TryStar) -> bool:
        before = dict(self.variables)
        ended = self.run(node.body)
        guard = self.guard
        after = self.variables
        for handler in node.handlers:
            self.variables = dict(before)
            handled, self.in_handler = self.in_handler, True
            # What a handler does is no part of the sequence that all ranks are meant to take.
            items, self.items = self.items, []
            handler_ended = self.run(handler.body)
            self.items, self.in_handler, self.guard = items, handled, guard
            if not handler_ended:
                after = self._merged(after, self.variables, Test()) if not ended else self.variables
                ended = False
        self.variables = after
        if not ended:
            ended = self.run(node.orelse)
        return self.run(node.finalbody) or ended

    def _match(self, node: ast.Match) -> None:
        subject = self.evaluate(node.subject)
        before, guard = dict(self.variables), self.guard
        # Which ranks a case is for is not looked at.
        doubt: Guard = (Atom("some", "main", False),) if subject.varies else ()
        after: dict[str, Value] | None = None
        for case in node.cases:
            self.variables, self.guard = dict(before), both(guard, doubt)
            ended = self.run(case.body)
            if not ended:
                after = self.variables if after is None else self._merged(after, self.variables, Test())
        self.variables, self.guard = after if after is not None else before, guard

    def assign(self, target: ast.expr, value: Value, node: ast.stmt) -> None:
        """Put a value where an assignment says."""
        if isinstance(target, ast.Starred):
            target = target.value
        if isinstance(target, ast.Tuple | ast.List):
            known = value.data.items if isinstance(value.data, Many) else ()
            for place, one in enumerate(target.elts):
                rest = VARYING if value.varies else UNKNOWN
                self.assign(one, known[place] if len(known) == len(target.elts) else rest, node)
            return
        if value.kind or value.test is not None:
            right = self.module.text(getattr(node, "value", None) or target)
            value = value.via(f"{self.module.text(target)} <- {right}", self.module.path, node.lineno)
        self.trace.stores.append(Store(node, target, value, self.guard))
        if isinstance(target, ast.Name):
            self._assign_name(target.id, value)
        elif isinstance(target, ast.Attribute):
            self._assign_attribute(target, value)
        elif isinstance(target, ast.Subscript):
            self._assign_item(target, value)

    def _assign_name(self, name: str, value: Value) -> None:
        if value.test is not None:
            value = replace(value, test=_named(value.test, name, value.trail[:1]))
        kind = facts.NAMED.get(name)
        if kind and value in (UNKNOWN, VARYING):
            value = of(kind)  # its origin is not seen: the name is the only witness
        self.variables[name] = value
        if self.trace.function is None or name in self.global_names:
            known = self.module.globals.get(name)
            self.module.globals[name] = value if known is None or known == value else join(known, value)

    def _assign_attribute(self, target: ast.Attribute, value: Value) -> None:
        path = self.path_of(target)
        kind = facts.NAMED.get(target.attr)
        if kind and value in (UNKNOWN, VARYING):
            value = of(kind)
        if value.test is not None:
            value = replace(value, test=_named(value.test, self.module.text(target), value.trail[:1]))
        if path is not None:
            self.variables[path] = value
        base = self.evaluate(target.value)
        if isinstance(base.data, Ref) and (
            not (value.kind or value.test) or base.data.name.startswith(("torch", "os"))
        ):
            return
        table = base.data.of.attributes if isinstance(base.data, Instance) else self.module.loose
        known = table.get(target.attr)
        table[target.attr] = value if known is None else join(known, value)

    def _assign_item(self, target: ast.Subscript, value: Value) -> None:
        base, key = self.evaluate(target.value), self.evaluate(target.slice)
        name, path = constant(key), self.path_of(target.value)
        if path is not None and isinstance(name, str) and not (isinstance(base.data, Ref)):
            self.variables[f"{path}[{name}]"] = value

    @property
    def result(self) -> Value:
        """The joined value of all returns."""
        joined: Value | None = None
        before: Test | None = None
        for value, test in self.results:
            if joined is None:
                joined, before = value, test
            elif before is not None and before.when_true and is_const(joined) and is_const(value):
                joined = merge(joined, value, Test(before.when_true, before.when_true and _opposite(before)))
            else:
                joined = join(joined, value)
        return joined or UNKNOWN


def _opposite(test: Test) -> tuple[Atom, ...]:
    return tuple(atom.opposite for atom in test.when_true) if len(test.when_true) == 1 else ()


def _named(test: Test, name: str, step: tuple[Step, ...]) -> Test:
    def put(guard: Guard) -> Guard:
        return tuple(replace(atom, named=name, trail=(*step, *atom.trail)) for atom in guard)

    return Test(put(test.when_true), put(test.when_false))


def _placed(guard: Guard, node: ast.expr) -> Guard:
    return tuple(replace(atom, place=node) for atom in guard)


def _loaded(target: ast.expr) -> ast.expr:
    """The target of `x += 1`, to be read."""
    if isinstance(target, ast.Name):
        return ast.copy_location(ast.Name(target.id, ast.Load()), target)
    return target
