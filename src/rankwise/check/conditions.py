"""Conditions: on which ranks a comparison, a conjunction or a value taken as a truth is true."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import replace

from rankwise.check.values import (
    RANKS,
    Atom,
    Guard,
    Many,
    Test,
    Value,
    both,
    constant,
    either,
    is_const,
    unsure,
)

_RANK_NAME = re.compile(
    r"(?:^|_)(?:rank|gpu|gpu_?id|(?:proc|process|worker|node|machine|task)_?(?:id|index|idx)|device|device_?id|shard_id|ordinal)$"
)
_NODE_NAME = re.compile(r"(?:^|_)(?:node|host|machine)_?(?:id|idx|index|name|ip)$")
_NOTHING = Test()
_ONE_NODE = Test((Atom("node_rank", "main", False),), (Atom("node_rank", "others", False),))
_DOUBT = Test((Atom("some", "main", False),), (Atom("some", "others", False),))
_SINGLE = Test((Atom("single", "main"),), ())
_SCOPES = {"local_rank": "local_rank", "node_rank": "node_rank"}


def truth(value: Value) -> Test:
    """The value where a condition stands."""
    if value.test is not None:
        return value.test
    if value.kind in RANKS or value.kind == "node_rank":
        return ~_main(value)
    return _DOUBT if value.varies else _NOTHING


def _main(value: Value) -> Test:
    atom = Atom(_SCOPES.get(value.kind, "rank"), "main", trail=value.trail)
    return Test((atom,), (atom.opposite,))


def compare(left: Value, operator: ast.cmpop, right: Value, text: str) -> Test | None:
    """The test that a comparison is; None where it has nothing to do with ranks."""
    if not _is_rank(left) and _is_rank(right):
        left, right, operator = right, left, _turned(operator)
    if left.kind in ("world_size", "local_world_size", "num_nodes"):
        return _size(operator, right) if left.kind == "world_size" else None
    if not _is_rank(left):
        return _of_truth(left, operator, right)
    if isinstance(operator, ast.In | ast.NotIn):
        test = _member(left, right, text)
        return ~test if isinstance(operator, ast.NotIn) else test
    number = constant(right)
    if isinstance(number, str) and number.lstrip("-").isdigit():
        number = int(number)
    if number is None and is_const(right):
        return None
    if not isinstance(number, int):
        return _one(left, operator, text)
    return _number(left, operator, number, text)


def by_name(node: ast.Compare, left: Value, right: Value) -> Test | None:
    """A number that is called a rank compared with 0, or two nodes: enough to be silent, too little to report."""
    number, operator = constant(right), node.ops[0]
    if isinstance(operator, ast.Eq) and any(_NODE_NAME.search(_last(one)) for one in (node.left, node.comparators[0])):
        return _ONE_NODE
    if left.varies or right.varies:
        return _DOUBT
    if isinstance(number, bool) or number != 0:
        return None
    last = _last(node.left)
    if not _RANK_NAME.search(last):
        return None
    test = _number(Value("rank"), operator, 0, last) or _NOTHING
    return Test(unsure(test.when_true), unsure(test.when_false))


def _last(node: ast.expr) -> str:
    last = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return last.lower()


def _is_rank(value: Value) -> bool:
    return value.kind in RANKS or value.kind == "node_rank"


def _number(left: Value, operator: ast.cmpop, number: int, text: str) -> Test | None:
    main = _main(left)
    match operator, number:
        case (ast.Eq() | ast.Is(), 0) | (ast.LtE(), 0) | (ast.Lt(), 1):
            return main
        case (ast.NotEq() | ast.IsNot(), 0) | (ast.Gt(), 0) | (ast.GtE(), 1):
            return ~main
        case (ast.Eq() | ast.Is(), -1) | (ast.Lt(), 0):
            return _SINGLE
        case (ast.NotEq() | ast.IsNot(), -1) | (ast.GtE(), 0) | (ast.Gt(), -1):
            return ~_SINGLE
    return _one(left, operator, text)


def _one(left: Value, operator: ast.cmpop, text: str) -> Test | None:
    """A rank compared with something else than 0: it divides the ranks in a way of its own."""
    shown = text.replace("!=", "==").replace("not in", "in")
    atom = Atom("some", "main", text=shown, trail=left.trail)
    test = Test((atom,), (atom.opposite,))
    return ~test if isinstance(operator, ast.NotEq | ast.IsNot) else test


def _member(left: Value, right: Value, text: str) -> Test:
    if isinstance(right.data, Many):
        numbers = {constant(item) for item in right.data.items}
        if numbers <= {0, -1} and 0 in numbers:
            return _main(left)
        if numbers == {-1}:
            return _SINGLE
    return _one(left, ast.In(), text) or _NOTHING


def _size(operator: ast.cmpop, right: Value) -> Test | None:
    number = constant(right)
    match operator, number:
        case (ast.Eq() | ast.LtE(), 1) | (ast.Lt(), 2):
            return _SINGLE
        case (ast.Gt() | ast.NotEq(), 1) | (ast.GtE(), 2):
            return ~_SINGLE
    return None


def _of_truth(left: Value, operator: ast.cmpop, right: Value) -> Test | None:
    """`is_main == False` and the like."""
    number = constant(right, "")
    if left.test is None or not (number is None or isinstance(number, bool)):
        return None
    positive = bool(number) == isinstance(operator, ast.Eq | ast.Is)
    return left.test if positive else ~left.test


def _turned(operator: ast.cmpop) -> ast.cmpop:
    turned = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE}.get(type(operator))
    return turned() if turned else operator


def combine(tests: Sequence[Test], conjunction: bool) -> Test:
    """Of `and` (else `or`) of the parts."""
    if not conjunction:
        return ~combine([~test for test in tests], True)
    true: Guard = ()
    false: Guard | None = None
    for test in tests:
        true = both(true, test.when_true)
        false = test.when_false if false is None else either(false, test.when_false)
    return Test(_without_contradiction(true), false or ())


def _without_contradiction(guard: Guard) -> Guard:
    """Without the doubt where the same is also sure."""
    certain = {replace(atom, sure=True) for atom in guard if atom.sure}
    return tuple(atom for atom in guard if atom.sure or replace(atom, sure=True) not in certain)


def flag(test: ast.expr) -> tuple[str, bool]:
    """`not args.evolve` as its text, "args.evolve", and which value of it passes; "" where it is no flag."""
    passes = True
    while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, passes = test.operand, not passes
    return (ast.unparse(test), passes) if isinstance(test, ast.Name | ast.Attribute) else ("", passes)


def refused(body: Sequence[ast.stmt]) -> dict[str, bool]:
    """The flags that a block asserts away, and the value of each that it does not take."""
    flags = (flag(one.test) for one in body if isinstance(one, ast.Assert))
    return {text: not passes for text, passes in flags if text}


def with_lone(node: ast.expr, test: Test, lone: dict[str, bool]) -> Test:
    """The test, where a flag in it was refused for many processes: who has it runs alone."""
    text, passes = flag(node)
    if text not in lone:
        return test
    single = _SINGLE.when_true
    if lone[text] == passes:
        return Test(both(test.when_true, single), test.when_false)
    return Test(test.when_true, both(test.when_false, single))


def asks_for_wrapper(test: ast.expr) -> str | None:
    """The variable of `hasattr(model, "module")` or `isinstance(model, DDP)`: where that is false it has no wrapper."""
    match test:
        case ast.Call(func=ast.Name(id="hasattr"), args=[ast.Name(id=name), ast.Constant(value="module")]):
            return name
        case ast.Call(func=ast.Name(id="isinstance"), args=[ast.Name(id=name), kind]):
            return name if re.search(r"\bDDP\b|DistributedDataParallel", ast.unparse(kind)) else None
    return None


def gained_in(before: Guard, after: Guard, rest_is_lone: bool) -> Guard:
    """What a branch that is left at its end has found out; sure where only a lone process took the other."""
    new = tuple(atom for atom in after if atom not in before)
    return new if rest_is_lone else unsure(new)


def is_lone(guard: Guard) -> bool:
    """Whether what it guards is reached by a lone process alone."""
    return any(atom.scope == "single" and atom.which == "main" for atom in guard)
