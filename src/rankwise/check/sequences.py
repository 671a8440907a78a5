"""Which collectives a rank comes to, and in which order, if a test of ranks is true, or false, for it."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from rankwise.check import libraries
from rankwise.check.flags import Flags, decided, flags_of, true_names
from rankwise.check.program import Program
from rankwise.check.source import Class, Function
from rankwise.check.trace import Branch, Call, Item, Leave, Loop, Trace
from rankwise.check.values import Atom, Guard, Test, constant, is_const

_MAX_DEPTH = 8


@dataclass(frozen=True)
class Assumption:
    """That a rank is the one that passes a test, or is another, all other tests of ranks being equal."""

    scope: str
    text: str
    is_main: bool

    def decide(self, test: Test) -> bool | None:
        """Whether the test is true for this rank; None where it cannot be told."""
        if any(self._denies(atom) for atom in test.when_true):
            return False
        if any(self._denies(atom) for atom in test.when_false):
            return True
        return None

    def allows(self, guard: Guard) -> bool:
        return not any(self._denies(atom) for atom in guard)

    def _denies(self, atom: Atom) -> bool:
        if not atom.sure:
            return False
        positive = atom.which == "main"
        if atom.scope == "single":
            return positive
        if atom.scope == "some" or self.scope == "some":
            return atom.scope == self.scope and atom.text == self.text and positive != self.is_main
        if atom.scope == self.scope:
            return positive != self.is_main
        if self.scope == "rank" and atom.scope == "local_rank":
            return not positive  # rank 0 is the first of its node; what is compared with it is the first of another
        if self.scope == "rank":
            return positive != self.is_main
        # Two ranks of one node are compared, and not of the node of rank 0.
        return positive


@dataclass(frozen=True)
class Reached:
    """A call that a rank comes to, and the collectives that it ends in."""

    call: Call
    names: tuple[str, ...]


@dataclass
class _Way:
    reached: list[Reached]
    left: Leave | None = None
    leaves: list[Leave] = field(default_factory=list)
    """All exits on the way, also those of a loop's turn."""
    is_loose: bool = False
    """Both sides of a branch that is not of ranks are in it, with different collectives."""
    passed: set[int] = field(default_factory=set)
    """The ids of all calls on the way, also of those without collectives."""

    def add(self, inner: _Way) -> None:
        self.reached += inner.reached
        self.leaves += inner.leaves
        self.passed |= inner.passed
        self.is_loose |= inner.is_loose


@dataclass(frozen=True)
class Difference:
    """A call with collectives that only some ranks come to."""

    call: Call
    names: tuple[str, ...]
    atom: Atom
    leave: Leave | None
    """Where the others have left; None where they never came this way."""


class Sequences:
    """The collectives of functions, each found once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known: dict[tuple[Function, Assumption | None, Flags], tuple[str, ...]] = {}

    def names(self, call: Call, assumption: Assumption | None, depth: int = 0) -> tuple[str, ...]:
        """The collectives that a call ends in."""
        callee = self.program.method(call.callee, "__init__") if isinstance(call.callee, Class) else call.callee
        if callee is not None:
            return () if call.uncertain else self._of_function(callee, assumption, flags_of(call, callee), depth)
        if _of_a_group(call):
            return ()
        name = libraries.collective_of(call)
        return (name,) if name else ()

    def _of_function(
        self, function: Function, assumption: Assumption | None, flags: Flags, depth: int
    ) -> tuple[str, ...]:
        key = (function, assumption, flags)
        if key not in self._known:
            self._known[key] = ()
            trace = self.program.trace_of.get(function)
            comes = trace is not None and (assumption is None or assumption.allows(trace.guard))
            if trace is not None and comes and depth < _MAX_DEPTH:
                way = self.way(trace.items, assumption, depth + 1, flags | true_names(trace))
                self._known[key] = tuple(name for reached in way.reached for name in reached.names)
        return self._known[key]

    def way(self, items: list[Item], assumption: Assumption | None, depth: int = 0, flags: Flags = frozenset()) -> _Way:
        """What a rank comes to in these items, in order."""
        way = _Way([])
        for item in items:
            if isinstance(item, Call):
                names = self.names(item, assumption, depth)
                way.passed.add(id(item))
                if names:
                    way.reached.append(Reached(item, names))
            elif isinstance(item, Leave):
                way.left = item
                way.leaves.append(item)
                break
            elif isinstance(item, Loop):
                inner = self.way(item.body, assumption, depth, flags)
                way.add(inner)
                if inner.left is not None and inner.left.how in ("return", "exit") and _always(item.body, inner.left):
                    way.left = inner.left
                    break
            else:
                taken = decided(getattr(item.node, "test", None), flags)
                if taken is None and assumption:
                    taken = assumption.decide(item.test)
                if self._take(way, item, taken, assumption, depth, flags):
                    break
        return way

    def _take(
        self, way: _Way, item: Branch, taken: bool | None, assumption: Assumption | None, depth: int, flags: Flags
    ) -> bool:
        """Add one branch; whether the way ends in it."""
        if taken is not None:
            inner = self.way(item.then if taken else item.other, assumption, depth, flags)
            way.add(inner)
            way.left = inner.left
            return inner.left is not None
        first = self.way(item.then, assumption, depth, flags)
        second = self.way(item.other, assumption, depth, flags)
        way.passed |= first.passed | second.passed
        way.reached += first.reached
        way.is_loose |= first.is_loose or second.is_loose
        if [one.names for one in first.reached] != [one.names for one in second.reached]:
            way.is_loose |= bool(first.reached and second.reached)
            way.reached += second.reached
        if first.left is not None and second.left is not None:
            way.left = first.left
        return way.left is not None

    def differences(self, trace: Trace) -> list[Difference]:
        """The calls of a function whose collectives only some ranks come to."""
        found: dict[ast.Call, Difference] = {}
        if trace.name in ("__enter__", "__exit__"):
            return []  # two halves of one thing
        for atom in _atoms(trace.items):
            if not self._is_asked(trace, atom):
                continue
            ways = [self.way(trace.items, Assumption(atom.scope, atom.text, is_main)) for is_main in (True, False)]
            for mine, others in ((ways[0], ways[1]), (ways[1], ways[0])):
                for reached in _only(mine, others):
                    if id(reached.call) in others.passed:
                        continue  # all come to this call, and part in it: it is told there
                    if atom.scope == "some" and "init_process_group" in reached.names:
                        continue  # a group of some ranks alone
                    leave = next((one for one in reversed(others.leaves) if _skips(one, reached.call)), None)
                    if leave is not None and leave.how == "raise":
                        continue
                    found.setdefault(reached.call.node, Difference(reached.call, reached.names, atom, leave))
        return list(found.values())

    def _is_asked(self, trace: Trace, atom: Atom) -> bool:
        return not any(one.scope == atom.scope and one.text == atom.text for one in trace.guard)


def _always(items: list[Item], leave: Leave) -> bool:
    return any(item is leave for item in items)


def _skips(leave: Leave, call: Call) -> bool:
    """Whether who leaves there does not come to the call."""
    if (call.node.lineno, call.node.col_offset) < (leave.node.lineno, leave.node.col_offset):
        return False
    if leave.how in ("continue", "break"):
        return bool(call.loops) and leave.node.lineno <= (call.loops[-1].end_lineno or 0)
    return True


def _only(mine: _Way, others: _Way) -> list[Reached]:
    """What only the first comes to, less what the others do in its place."""
    shared = {id(one.call) for one in mine.reached} & {id(one.call) for one in others.reached}
    first = [one for one in mine.reached if id(one.call) not in shared]
    second = [name for one in others.reached if id(one.call) not in shared for name in one.names]
    names = [name for one in first for name in one.names]
    if not first or names == second:
        return []
    if mine.is_loose or others.is_loose:  # how often is not known
        return [one for one in first if not set(one.names) <= set(second)]
    matched: set[int] = set()
    for block in SequenceMatcher(None, names, second, autojunk=False).get_matching_blocks():
        matched.update(range(block.a, block.a + block.size))
    found, place = [], 0
    for one in first:
        rest = tuple(name for offset, name in enumerate(one.names) if place + offset not in matched)
        place += len(one.names)
        if rest:
            found.append(Reached(one.call, rest))
    return found


def _atoms(items: list[Item]) -> list[Atom]:
    """The tests of ranks that a function branches on, each once."""
    found: dict[tuple[str, str], Atom] = {}
    waiting = list(items)
    while waiting:
        item = waiting.pop(0)
        if isinstance(item, Loop):
            waiting += item.body
        elif isinstance(item, Branch):
            for atom in (*item.test.when_true, *item.test.when_false):
                usable = atom.sure and (
                    atom.scope in ("rank", "local_rank") or (atom.scope == "some" and " in " not in atom.text)
                )
                if usable:
                    found.setdefault((atom.scope, atom.text), atom)
            waiting += item.then + item.other
    return list(found.values())


def _of_a_group(call: Call) -> bool:
    """Whether a collective is told which ranks take part."""
    for name in ("group", "process_group", "groups"):
        if name in call.keywords:
            return not (is_const(call.keywords[name]) and constant(call.keywords[name]) is None)
    places = {
        "barrier": 0,
        "all_reduce": 2,
        "broadcast": 2,
        "all_gather": 2,
        "all_gather_object": 2,
        "broadcast_object_list": 2,
    }
    place = places.get(call.last)
    if place is None or len(call.arguments) <= place or not call.name.startswith("torch.distributed"):
        return False
    return not is_const(call.arguments[place])
