"""Sums of ranks and sizes, and values that depend on a test."""

from __future__ import annotations

import ast
from dataclasses import replace

from rankwise.check.finding import Step
from rankwise.check.values import RANKS, UNKNOWN, VARYING, Const, Ref, Test, Value, constant, join, of


def arithmetic(operator: ast.operator, left: Value, right: Value, right_node: ast.expr) -> Value | None:
    """The kind of a sum, product, quotient or remainder of ranks and sizes; None where it has none."""
    if isinstance(operator, ast.Mod) and left.kind in RANKS:
        if right.kind == "local_world_size" or any(
            word in ast.unparse(right_node) for word in ("gpu", "device", "local", "per_node")
        ):
            return of("local_rank") if left.kind != "spawn_rank" else left
        return VARYING
    if isinstance(operator, ast.Add) and {"local_rank", "spawn_rank"} & {left.kind, right.kind}:
        other = right if left.kind in ("local_rank", "spawn_rank") else left
        if isinstance(other.data, Const):
            return VARYING
        return replace(of("rank"), data=None) if other.data is _PRODUCT else VARYING
    if isinstance(operator, ast.FloorDiv | ast.Div) and right.kind == "world_size" and not left.kind:
        return Value("", left.varies, None, SHARE)
    if isinstance(operator, ast.Mult):
        kinds = {left.kind, right.kind}
        if kinds & {"node_rank", "some_rank", "rank"} or (left.varies or right.varies):
            return Value("", True, None, _PRODUCT)
        if kinds & {"num_nodes", "local_world_size"} and not kinds & RANKS and kinds != {"local_world_size"}:
            return of("world_size") if kinds == {"num_nodes", "local_world_size"} else UNKNOWN
        return Value("", False, None, _PRODUCT) if "world_size" not in kinds else UNKNOWN
    return None


_PRODUCT = Ref("<product>")
SHARE = Ref("<share>")
"""A number of things divided by the world size."""


def is_product(value: Value) -> bool:
    """Whether a local rank and this may be a global rank: the ranks of the nodes before."""
    return value.data is _PRODUCT


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
