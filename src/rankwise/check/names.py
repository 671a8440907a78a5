"""Names and attributes: what they stand for, in this file or another."""

from __future__ import annotations

import ast
from dataclasses import replace

from rankwise.check import facts, libraries
from rankwise.check.finding import Step
from rankwise.check.objects import Bound, ClassRef, Instance, ModuleRef
from rankwise.check.program import Program
from rankwise.check.source import Class, Function, Module
from rankwise.check.trace import Trace
from rankwise.check.values import (
    OTHER_RANK,
    UNKNOWN,
    VARYING,
    Atom,
    Const,
    Guard,
    Ref,
    Test,
    Thing,
    Value,
    is_const,
    of,
)


class Names:
    """Looks up the names of one function."""

    def __init__(self, program: Program, trace: Trace, variables: dict[str, Value]) -> None:
        self.program = program
        self.trace = trace
        self.module = trace.module
        self.variables = variables
        self.guard: Guard = ()

    def evaluate(self, node: ast.expr) -> Value:
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

    def name(self, node: ast.Name) -> Value:
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
        for star in self.module.stars:
            found = self.program.lookup(f"{star}.{name}", self.module)
            if found is not None and not isinstance(found, Module):
                return found if isinstance(found, Value) else self._wrap(found)
        return UNKNOWN

    def _imported(self, dotted: str) -> Value:
        found = self.program.lookup(dotted, self.module)
        if found is None:
            outside = self.program.outside(dotted, self.module)
            kind = facts.CONSTANTS.get(outside.rpartition(".")[2])
            return of(kind, Step(outside, self.module.path, 1), Ref(outside)) if kind else Value(data=Ref(outside))
        if isinstance(found, Module):
            return Value(data=ModuleRef(found))
        return found if isinstance(found, Value) else self._wrap(found)

    def _wrap(self, found: Function | Class, owner: Value | None = None) -> Value:
        if owner is not None and not isinstance(owner.data, Instance):
            owner = None
        return Value(data=Bound(found, owner) if isinstance(found, Function) else ClassRef(found))

    def attribute(self, node: ast.Attribute) -> Value:
        path = self.path_of(node)
        if path is not None and path in self.variables:
            return self.variables[path]
        return self._of_base(node, self.evaluate(node.value))

    def attribute_of(self, node: ast.Attribute, base: Value) -> Value:
        """The same where what it is an attribute of is evaluated already."""
        path = self.path_of(node)
        return self.variables[path] if path is not None and path in self.variables else self._of_base(node, base)

    def _of_base(self, node: ast.Attribute, base: Value) -> Value:
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
            known = libraries.attribute(data, node.attr)
            if known is not None:
                return known.via(self.module.text(node), self.module.path, node.lineno)
        found = self._loose(node, base)
        return VARYING if found == UNKNOWN and base.varies and base.data is None else found

    def _of_ref(self, dotted: str, node: ast.Attribute) -> Value:
        if dotted == "os.environ":
            return Value(data=Ref(dotted))
        if dotted.split(".")[0] in ("torch", "os"):
            return Value(data=Ref(dotted))
        # `cfg.local_rank` of an imported `cfg`; were it a function, `hvd.local_rank`, the call would go by its name.
        known = self._given(node.attr)
        if known is not None and (known.kind or known.test):
            return replace(known, data=Ref(dotted))
        kind = facts.NAMED.get(node.attr) or facts.CONSTANTS.get(node.attr)
        if kind:
            return of(kind, self.module.step(self.module.text(node), node), Ref(dotted))
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
        known = self._given(node.attr)
        if known is not None:
            return known
        return self.by_name(node.attr, node) if not isinstance(base.data, Const) else UNKNOWN

    def _given(self, name: str) -> Value | None:
        """What this file or one that it imports assigns to attributes of this name."""
        for module in (self.module, *self.program.imported_by(self.module)):
            value = module.loose.get(name)
            if value is not None and not (is_const(value) and name in facts.NAMED):
                return value
        return None

    def by_name(self, name: str, node: ast.expr) -> Value:
        """What a name alone says, where nothing else does."""
        kind = facts.NAMED.get(name)
        if kind:
            return of(kind, self.module.step(self.module.text(node), node))
        if facts.says_distributed(name):
            return Value(test=Test((), (Atom("single", "main"),)))
        return facts.named_test(name) or (OTHER_RANK if facts.is_other_rank(name) else UNKNOWN)


def _last(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return _last(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
