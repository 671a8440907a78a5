"""Values that stand for something of the given files: a function, a class, an object of one, a module."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.check.source import Class, Function, Module
from rankwise.check.values import Value


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
