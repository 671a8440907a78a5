"""Parameters that a call sets to True, False or None, and the branches that they decide."""

from __future__ import annotations

import ast

from rankwise.check.source import Function
from rankwise.check.trace import Call, Trace
from rankwise.check.values import constant, is_const

Flags = frozenset[tuple[str, bool | None]]


def flags_of(call: Call, callee: Function) -> Flags:
    """The flags among the parameters of a function, as this call sets them or their defaults do."""
    node = callee.node.args
    if any(isinstance(one, ast.Starred) for one in call.node.args) or any(
        one.arg is None for one in call.node.keywords
    ):
        return frozenset()
    places = [*node.posonlyargs, *node.args]
    defaults = dict(zip([one.arg for one in places[len(places) - len(node.defaults) :]], node.defaults, strict=True))
    defaults |= {one.arg: each for one, each in zip(node.kwonlyargs, node.kw_defaults, strict=True) if each is not None}
    shift = 1 if callee.owner is not None and callee.parameters[:1] in (["self"], ["cls"]) else 0
    found: set[tuple[str, bool | None]] = set()
    for place, name in enumerate(callee.parameters[shift:]):
        given = call.argument_node(place if place + shift < len(places) else -1, name)
        if given is not None:
            value = call.argument(place, name)
            known = constant(value, 0) if is_const(value) else 0
        else:
            default = defaults.get(name)
            known = default.value if isinstance(default, ast.Constant) else 0
        if known is None or isinstance(known, bool):
            found.add((name, known))
    return frozenset(found)


def true_names(trace: Trace) -> Flags:
    """The functions of the file that stand in tests as if they were flags: always true."""
    if trace.true_names is None:
        trace.true_names = _true_names(trace)
    return trace.true_names


def _true_names(trace: Trace) -> Flags:
    function = trace.function
    if function is None:
        return frozenset()
    own = {store.target.id for store in trace.stores if isinstance(store.target, ast.Name)} | set(function.parameters)
    tests = [test for node in ast.walk(function.node) if isinstance(test := getattr(node, "test", None), ast.BoolOp)]
    names = {one.id for test in tests for one in ast.walk(test) if isinstance(one, ast.Name)}
    known = trace.module.names
    return frozenset((name, True) for name in names - own if isinstance(known.get(name), Function))


def decided(test: ast.expr | None, flags: Flags) -> bool | None:
    """Whether a test is true with these flags; None where they do not tell."""
    known = dict(flags)
    match test:
        case None:
            return None
        case ast.Name(id=name) if name in known:
            return bool(known[name])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = decided(operand, flags)
            return None if inner is None else not inner
        case ast.BoolOp(op=operator, values=values):
            parts = [decided(one, flags) for one in values]
            deciding = isinstance(operator, ast.Or)
            if deciding in parts:
                return deciding
            return None if None in parts else not deciding
        case ast.Compare(left=ast.Name(id=name), ops=[operator], comparators=[ast.Constant(value=None)]):
            if name in known and isinstance(operator, ast.Is | ast.IsNot):
                return (known[name] is None) == isinstance(operator, ast.Is)
    return None
