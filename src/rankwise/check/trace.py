"""What a function does, in order, as far as the rules care: its calls, branches, loops and exits."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Literal

from rankwise.check.source import Class, Function, Module
from rankwise.check.values import UNKNOWN, Guard, Test, Value


@dataclass(eq=False)
class Call:
    """One call, with what is known of its arguments."""

    node: ast.Call
    name: str
    """Dotted: imported names in full, of other objects as written."""
    callee: Function | Class | None
    """Where it is in the given files."""
    receiver: Value | None
    """Of a method."""
    function: Value
    arguments: list[Value]
    keywords: dict[str, Value]
    guard: Guard
    """Of all branches of this function that it stands in."""
    caller: Function | None
    module: Module
    loops: tuple[ast.stmt, ...] = ()
    in_handler: bool = False
    """In an `except` block."""
    uncertain: bool = False
    """The callee was found by the method's name alone."""
    last: str = field(init=False)
    """The last part of the name."""

    def __post_init__(self) -> None:
        self.last = self.name.rpartition(".")[2]

    @property
    def guard_on_ranks(self) -> bool:
        """Whether some ranks may be kept out within the function."""
        return any(atom.scope != "single" for atom in self.guard)

    def argument(self, place: int, *names: str) -> Value:
        """By its name or its place; unknown where it is not given."""
        for name in names:
            if name in self.keywords:
                return self.keywords[name]
        return self.arguments[place] if 0 <= place < len(self.arguments) else UNKNOWN

    def argument_node(self, place: int, *names: str) -> ast.expr | None:
        for keyword in self.node.keywords:
            if keyword.arg in names:
                return keyword.value
        if not 0 <= place < len(self.node.args) or any(isinstance(one, ast.Starred) for one in self.node.args[:place]):
            return None
        return self.node.args[place]


@dataclass(eq=False)
class Branch:
    """An `if`, `while`-less: what each side does."""

    node: ast.stmt | ast.expr
    test: Test
    then: list[Item]
    other: list[Item]


@dataclass(eq=False)
class Loop:
    node: ast.stmt
    body: list[Item]


@dataclass(eq=False)
class Leave:
    """The rest of the function, or of the loop's turn, is not run."""

    node: ast.stmt | ast.expr
    how: Literal["return", "exit", "raise", "continue", "break"]
    guard: Guard


Item = Call | Branch | Loop | Leave


@dataclass(eq=False)
class Trace:
    """All of one function, or of a module's own level."""

    module: Module
    function: Function | None
    guard: Guard = ()
    """Of its decorators."""
    items: list[Item] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    """Also those inside branches and loops."""
    stores: list[Store] = field(default_factory=list)
    loops: list[ast.stmt] = field(default_factory=list)
    shares: list[tuple[ast.expr, Value, str]] = field(default_factory=list)
    """Where a local rank picks a share of something that is divided by the world size."""
    sums: dict[ast.expr, Value] = field(default_factory=dict)
    """Sums with a local rank -> that rank."""
    true_names: frozenset[tuple[str, bool | None]] | None = None
    """What `flags.true_names` finds, once it was asked."""
    reads_rank: bool = False
    """It asks for a rank, or takes one."""

    @property
    def name(self) -> str:
        return self.function.name if self.function else "<module>"


@dataclass(eq=False)
class Store:
    """One assignment to a name, attribute or item."""

    node: ast.stmt
    target: ast.expr
    value: Value
    guard: Guard
