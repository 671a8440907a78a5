"""All files given together: which file an import means, what stands under a dotted name."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping

from rankwise.check.finding import CannotParse
from rankwise.check.source import Class, Function, Module, is_marked, parse, parse_tree
from rankwise.check.trace import Call, Trace
from rankwise.check.values import Value

_MAX_PARTS = 12


class Program:
    """The files, parsed when they are first needed, and what was found out about them."""

    def __init__(self, sources: Mapping[str, str | bytes]) -> None:
        self.sources = sources
        self.cannot_parse: dict[str, CannotParse] = {}
        self.traces: list[Trace] = []
        self.trace_of: dict[Function | None, Trace] = {}
        self.callers: dict[Function, list[Call]] = {}
        self.started: set[Function] = set()
        """Those that run in processes of their own: workers of `mp.spawn` and the like."""
        self.handed_over: set[Function] = set()
        """Those that are passed as values, so that not all calls are seen."""
        self.one_node: set[Module] = set()
        """Those that start their processes themselves, on this node alone."""
        self.inlined: dict[object, Value] = {}
        self.inline: Callable[[Function, Value | None, dict[str, Value], int], Value]
        self.memory: dict[str, object] = {}
        """What rules share, by name."""
        self.shared_variables: dict[Function, dict[str, Value]] = {}
        """What the names of a function hold when it ends, for the functions inside it."""
        self._modules: dict[str, Module | None] = {}
        self._by_last: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        self._by_module: dict[Module, list[Trace]] | None = None
        self._imported: dict[Module, list[Module]] = {}
        self._resolved: dict[tuple[str, str], Module | None] = {}
        self._bases: dict[Class, list[Class]] = {}
        self._methods: dict[Module, dict[str, Function | None]] = {}
        self._parted: dict[tuple[str, str], tuple[Module | None, list[str]]] = {}
        for path in sources:
            parts = _parts_of(path)
            if parts:
                self._by_last.setdefault(parts[-1], []).append((parts, path))
        for path, content in sources.items():
            if is_marked(content):
                self.module_at(path)

    @property
    def modules(self) -> list[Module]:
        """Those read so far, in the order given."""
        return [module for path in self.sources if (module := self._modules.get(path)) is not None]

    def module_at(self, path: str) -> Module | None:
        if path not in self._modules:
            parsed = parse(path, self.sources[path])
            if isinstance(parsed, CannotParse):
                self.cannot_parse[path] = parsed
            self._modules[path] = parsed if isinstance(parsed, Module) else None
        return self._modules[path]

    def parse_rest(self) -> None:
        """Also the files that name nothing of many processes, so that each that cannot be parsed is known."""
        for path in self.sources:
            if path not in self._modules and isinstance(parsed := parse_tree(path, self.sources[path]), CannotParse):
                self.cannot_parse[path] = parsed

    def module_named(self, dotted: str, importer: Module) -> Module | None:
        """The given file that an import of this name means, the nearest to the importer."""
        folder = importer.path.rpartition("/")[0]
        key = (dotted, folder)
        if key not in self._resolved:
            self._resolved[key] = self._find(tuple(dotted.split(".")), importer)
        return self._resolved[key]

    def _find(self, parts: tuple[str, ...], importer: Module) -> Module | None:
        here = importer.parts[:-1]
        best: tuple[int, str] | None = None
        for candidate, path in self._by_last.get(parts[-1], ()):
            if candidate[-len(parts) :] != parts or path == importer.path:
                continue
            root = candidate[: -len(parts)]
            if root != here[: len(root)] and root[-1:] not in (("src",), ("lib",)):
                continue
            if best is None or len(root) > best[0]:
                best = (len(root), path)
        return self.module_at(best[1]) if best else None

    def lookup(self, dotted: str, importer: Module) -> Module | Function | Class | Value | None:
        """What stands under a dotted name in the given files; None where it is outside of them."""
        module, rest = self._split(dotted, importer)
        return self._member(module, rest, 0) if module is not None else None

    def _split(self, dotted: str, importer: Module) -> tuple[Module | None, list[str]]:
        """The longest part of a dotted name that is a given file, and the rest."""
        key = (dotted, importer.path)
        if key not in self._parted:
            parts = dotted.split(".")[:_MAX_PARTS]
            self._parted[key] = (None, [])
            for cut in range(len(parts), 0, -1):
                module = self.module_named(".".join(parts[:cut]), importer)
                if module is not None:
                    self._parted[key] = (module, parts[cut:])
                    break
        return self._parted[key]

    def _member(self, module: Module, rest: list[str], depth: int) -> Module | Function | Class | Value | None:
        if not rest:
            return module
        found = module.names.get(rest[0])
        if isinstance(found, Class) and len(rest) == 2:
            return found.methods.get(rest[1])
        if found is not None:
            return found if len(rest) == 1 else None
        if rest[0] in module.globals and len(rest) == 1:
            return module.globals[rest[0]]
        if rest[0] in module.imports and depth < 4:
            dotted = ".".join((module.imports[rest[0]], *rest[1:]))
            parts = dotted.split(".")
            for cut in range(len(parts), 0, -1):
                other = self.module_named(".".join(parts[:cut]), module)
                if other is not None and other is not module:
                    return self._member(other, parts[cut:], depth + 1)
        return None

    def outside(self, dotted: str, importer: Module) -> str:
        """The name outside of the given files that an imported name stands for, through files that pass it on."""
        parts = dotted.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            module = self.module_named(".".join(parts[:cut]), importer)
            if module is not None and parts[cut] in module.imports:
                return ".".join((module.imports[parts[cut]], *parts[cut + 1 :]))
        return dotted

    def imported_by(self, module: Module) -> list[Module]:
        """The given files that a file imports something from."""
        if module not in self._imported:
            found: list[Module] = []
            for dotted in dict.fromkeys((*module.imports.values(), *module.stars)):
                one = self.module_named(dotted, module) or self.module_named(dotted.rpartition(".")[0], module)
                if one is not None and one not in found:
                    found.append(one)
            self._imported[module] = found
        return self._imported[module]

    def base_classes(self, owner: Class) -> list[Class]:
        """The class and those given classes that it inherits from."""
        if owner not in self._bases:
            self._bases[owner] = self._base_classes(owner)
        return self._bases[owner]

    def _base_classes(self, owner: Class) -> list[Class]:
        found: list[Class] = []
        waiting = [owner]
        while waiting and len(found) < 8:
            one = waiting.pop(0)
            if one in found:
                continue
            found.append(one)
            for base in one.node.bases:
                name = ast.unparse(base) if isinstance(base, ast.Name | ast.Attribute) else ""
                first, _, rest = name.partition(".")
                other = one.module.names.get(name)
                if other is None and first in one.module.imports:
                    dotted = one.module.imports[first] + (f".{rest}" if rest else "")
                    other_found = self.lookup(dotted, one.module)
                    other = other_found if isinstance(other_found, Class) else None
                if isinstance(other, Class):
                    waiting.append(other)
        return found

    def method(self, owner: Class, name: str) -> Function | None:
        return next((one.methods[name] for one in self.base_classes(owner) if name in one.methods), None)

    def method_by_name(self, name: str, near: Module) -> Function | None:
        """The one method of this name in the module, or None where there are none or several."""
        if near not in self._methods:
            known = self._methods[near] = {}
            for one in near.functions:
                if one.owner is not None:
                    known[one.name] = None if one.name in known else one
        return self._methods[near].get(name)

    def traces_in(self, module: Module) -> list[Trace]:
        """Of the functions of one file, and of its own level."""
        if self._by_module is None:
            self._by_module = {}
            for trace in self.traces:
                self._by_module.setdefault(trace.module, []).append(trace)
        return self._by_module.get(module, [])

    def is_one_node(self, module: Module) -> bool:
        """Whether the processes that run this file are all on one node: it, or who imports it, spawns them."""
        return module in self.one_node

    def shared(self, name: str, make: Callable[[], object]) -> object:
        """What `make` gives, made once."""
        if name not in self.memory:
            self.memory[name] = make()
        return self.memory[name]


def _parts_of(path: str) -> tuple[str, ...]:
    clean = path.replace("\\", "/").removesuffix(".py")
    parts = tuple(part for part in clean.split("/") if part not in ("", ".", ".."))
    return parts[:-1] if parts[-1:] == ("__init__",) else parts
