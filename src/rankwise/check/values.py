"""What is known of a value: where a number comes from, on which ranks a test is true, what an object is."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from rankwise.check.finding import Step

Kind = Literal[
    "",
    "rank",
    "local_rank",
    "spawn_rank",
    "some_rank",
    "node_rank",
    "world_size",
    "local_world_size",
    "num_nodes",
]
"""Of a number. `spawn_rank`: the index that `mp.spawn` gives, local and, on one node, global too. `some_rank`: a rank,
but it is not seen which. "": anything else."""

RANKS: frozenset[str] = frozenset({"rank", "local_rank", "spawn_rank", "some_rank"})
_PER_RANK: frozenset[str] = RANKS | {"node_rank"}
_MAX_TRAIL = 6
_MAX_NESTED = 3
_MAX_ITEMS = 64


@dataclass(frozen=True)
class Atom:
    """One fact that a test says of the ranks that pass it."""

    scope: str
    """The kind of number that was tested; "some" and the test's text where that is all that is known; "single" where
    the test is true for a lone process."""
    which: Literal["main", "others"]
    """ "main": only one of the scope (rank 0, where it is a rank); "others": only not that one."""
    sure: bool = True
    """False where a rank outside may pass too."""
    text: str = ""
    """The test, where `scope` is "some"."""
    trail: tuple[Step, ...] = field(default=(), compare=False)
    place: ast.expr | None = field(default=None, compare=False, repr=False)
    """Where it was tested."""
    named: str = field(default="", compare=False)
    """The variable or helper that the test stands in, if any; ends in "()" for a helper."""

    @property
    def opposite(self) -> Atom:
        return replace(self, which="others" if self.which == "main" else "main")


Guard = tuple[Atom, ...]
"""All of these hold."""


@dataclass(frozen=True)
class Test:
    """On which ranks a value is true."""

    when_true: Guard = ()
    when_false: Guard = ()

    def __invert__(self) -> Test:
        return Test(self.when_false, self.when_true)


@dataclass(frozen=True)
class Value:
    """What is known of the value of an expression."""

    kind: Kind = ""
    varies: bool = False
    """Ranks may have different ones."""
    test: Test | None = None
    data: object = None
    """What more is known, one of the classes below; None for nothing."""
    trail: tuple[Step, ...] = ()
    depth: int = field(default=0, compare=False)
    """How many values stand inside each other in `data`."""

    def via(self, text: str, path: str, line: int) -> Value:
        """The same after one more step; of two that say the same one is left out."""
        if not self.kind and self.test is None:
            return self
        step = Step(text, path, line)
        if self.trail[:1] == (step,):
            return self
        before = self.trail
        if before and (before[0].path, before[0].line) == (path, line) and text.endswith(f" <- {before[0].text}"):
            before = before[1:]  # the new step says it too
        return replace(self, trail=(step, *before[: _MAX_TRAIL - 1]))


UNKNOWN = Value()
VARYING = Value(varies=True)


@dataclass(frozen=True)
class Const:
    value: object


@dataclass(frozen=True)
class Ref:
    """Something outside of the given files, by its dotted name."""

    name: str


@dataclass(frozen=True)
class Many:
    """A tuple or list that was written out."""

    items: tuple[Value, ...]


@dataclass(frozen=True)
class Table:
    """A dictionary that was written out; keys that are no constants are left out."""

    items: tuple[tuple[object, Value], ...]

    def get(self, key: object) -> Value:
        return next((value for name, value in self.items if name == key), UNKNOWN)


@dataclass(frozen=True)
class DeviceName:
    """A text such as "cuda:3"; `index` is what stands after the colon."""

    index: Value
    place: tuple[str, ast.expr] | None = field(default=None, compare=False, repr=False)
    """The file and the expression that make the text."""


@dataclass(frozen=True)
class Thing:
    """An object of a known library: "ddp", "fsdp", "sampler", "loader", "accelerator", ...

    "quiet ddp": a wrapper whose forward does not communicate."""

    tag: str
    inner: Value = UNKNOWN
    node: int = 0
    """The line that made it."""


OTHER_RANK = Value(varies=True, data=Thing("part rank"))
"""A rank among some of the processes, such as those that share a model."""


def of(kind: Kind, step: Step | None = None, data: object = None) -> Value:
    return Value(kind, kind in _PER_RANK, None, data, (step,) if step else ())


def holding(data: object, inner: Iterable[Value], varies: bool = False) -> Value:
    """A value with others inside; nothing of them where they are nested too deeply or are too many."""
    values = list(inner)
    depth = 1 + max((value.depth for value in values), default=0)
    if depth > _MAX_NESTED or len(values) > _MAX_ITEMS:
        return Value("", varies)
    return Value("", varies, None, data, depth=depth)


def const(value: object) -> Value:
    return Value(data=Const(value))


def constant(value: Value, default: object = None) -> object:
    return value.data.value if isinstance(value.data, Const) else default


def is_const(value: Value) -> bool:
    return isinstance(value.data, Const)


def testing(atom: Atom) -> Value:
    return Value("", True, Test((atom,), (atom.opposite,)), None, atom.trail)


def join(first: Value, second: Value) -> Value:
    """What holds of either. A constant gives way, or a plain device: it is what a lone process has."""
    if first == second or second is first:
        return first
    if _is_plain(first) and not _is_plain(second):
        first, second = second, first
    if _is_plain(second) and (first.kind or first.test or isinstance(first.data, Thing)):
        return first if not first.test or not constant(second) else _unsure(first)
    varies = first.varies or second.varies
    if first.kind == second.kind and first.kind:
        return first
    if {first.kind, second.kind} == {"rank", "spawn_rank"}:
        return first if first.kind == "spawn_rank" else second
    if first.test and second.test and first.test == second.test:
        return first
    if first.kind in RANKS and second.kind in RANKS:
        return of("some_rank")
    if isinstance(first.data, Thing) and isinstance(second.data, Thing) and first.data.tag == second.data.tag:
        return first
    for one, other in ((first, second), (second, first)):
        if isinstance(one.data, Thing) and isinstance(other.data, Thing) and one.data.tag in ("bare", "quiet ddp"):
            return one
        if isinstance(one.data, Thing) and other.data is None and not other.kind and not other.test:
            return one
    if first.test or second.test:
        return _unsure(first if first.test else second)
    return VARYING if varies else UNKNOWN


def _is_plain(value: Value) -> bool:
    return is_const(value) or (isinstance(value.data, DeviceName) and not value.varies and not value.data.index.kind)


def _unsure(value: Value) -> Value:
    test = value.test or Test()
    return replace(value, test=Test(unsure(test.when_true), unsure(test.when_false)))


def unsure(guard: Iterable[Atom]) -> Guard:
    return tuple(replace(atom, sure=False) for atom in guard)


def both(first: Guard, second: Guard) -> Guard:
    """All atoms of both, each once."""
    return first + tuple(atom for atom in second if atom not in first) if second else first


def either(first: Guard, second: Guard) -> Guard:
    """What surely or maybe holds where one of the two does: after `a or b`."""
    if any(atom.scope == "single" for atom in first):
        return second
    if any(atom.scope == "single" for atom in second):
        return first
    common = tuple(atom for atom in first if atom in second)
    rest = (atom for atom in (*first, *second) if atom not in common)
    return common + unsure(atom for atom in rest if atom.which == "main")
