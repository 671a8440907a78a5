"""One file as the checker sees it: its tree, its functions and classes, what it imports."""

from __future__ import annotations

import ast
import io
import itertools
import re
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath

from rankwise.check.finding import CannotParse, Edit, Finding, Severity, Step
from rankwise.check.values import Value

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
# Of text in small letters. "distributed" alone stands in the header of many a licence.
_MARKS = re.compile(
    r"(?:\b|_)rank(?:s?\b|_)|torch\.distributed|[._]distributed|distributed[._(]|dist\.|world_size|accelerat(?:e\b|or)|main_process|"
    r"lightning|deepspeed|horovod|\bhvd\b|barrier|is_master|slurm_|procid|process_index|is_global_zero|\bmp\.spawn|mpi4py|"
    r"torch_xla|set_device|distributedsampler|all_reduce|all_gather|distributeddataparallel|set_epoch"
)
# fmt: off
_IN_MARKS = (
    "rank", "distributed", "dist.", "world_size", "accelerat", "main_process", "lightning", "deepspeed", "horovod",
    "hvd", "barrier", "is_master", "slurm_", "procid", "process_index", "is_global_zero", "mp.spawn", "mpi4py",
    "torch_xla", "set_device", "all_reduce", "all_gather", "set_epoch",
)
# fmt: on
"""In every mark is one of these, which are found faster."""


@dataclass(eq=False)
class Function:
    """A function or method, and what is known of it."""

    node: FunctionNode
    module: Module
    owner: Class | None = None
    outer: Function | None = None
    inner: dict[str, Function | Class] = field(default_factory=dict)
    arguments: dict[str, Value] = field(default_factory=dict)
    """What callers in the given files pass, joined."""
    result: Value | None = None

    @cached_property
    def is_small(self) -> bool:
        """Whether it is worth while to look at what it returns for each call by itself."""
        few = len(self.node.body) <= 5
        return few and sum(1 for _ in itertools.islice(ast.walk(self.node), 120)) < 120

    @cached_property
    def global_names(self) -> frozenset[str]:
        """The names that it assigns for the whole module."""
        if not self.module.has_globals:
            return frozenset()
        found = (node for node in _statements(self.node) if isinstance(node, ast.Global))
        return frozenset(name for node in found for name in node.names)

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def parameters(self) -> list[str]:
        given = self.node.args
        return [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]


@dataclass(eq=False)
class Class:
    """A class, and the joined values of its instances' attributes."""

    node: ast.ClassDef
    module: Module
    methods: dict[str, Function] = field(default_factory=dict)
    attributes: dict[str, Value] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.node.name


@dataclass(eq=False)
class Module:
    """A parsed file."""

    path: str
    tree: ast.Module
    lines: list[str]
    parts: tuple[str, ...]
    """Of the dotted name that the path gives."""
    names: dict[str, Function | Class] = field(default_factory=dict)
    functions: list[Function] = field(default_factory=list)
    """All, also methods and inner ones."""
    imports: dict[str, str] = field(default_factory=dict)
    """Local name -> dotted name."""
    stars: list[str] = field(default_factory=list)
    """Modules that it imports everything from."""
    globals: dict[str, Value] = field(default_factory=dict)
    loose: dict[str, Value] = field(default_factory=dict)
    """Attribute of an object of unknown class, such as parsed arguments -> the values that were put there, joined."""
    unwrapped: set[str] | None = None
    texts: dict[ast.AST, str] = field(default_factory=dict)

    @cached_property
    def has_globals(self) -> bool:
        """Whether a `global` statement may stand in it."""
        return any(line.lstrip().startswith("global ") for line in self.lines)

    @cached_property
    def names_local_rank(self) -> bool:
        return any("local_rank" in line or "LOCAL_RANK" in line for line in self.lines)

    @cached_property
    def is_test(self) -> bool:
        """Whether it is a file of tests, whose writes are nobody's checkpoints."""
        name = self.parts[-1] if self.parts else ""
        return name.startswith("test_") or name.endswith("_test") or name == "conftest"

    def column(self, line: int, offset: int) -> int:
        """The 0-based column in characters of ast's offset in bytes."""
        text = self.lines[line - 1] if line <= len(self.lines) else ""
        return (
            offset if text.isascii() else len(text.encode("utf-8", "surrogatepass")[:offset].decode("utf-8", "ignore"))
        )

    def step(self, text: str, node: ast.AST) -> Step:
        return Step(text, self.path, getattr(node, "lineno", 1))

    def text(self, node: ast.AST, limit: int = 60) -> str:
        """The source of a node on one line, shortened."""
        text = self.texts.get(node)
        if text is None:
            try:
                text = " ".join(ast.unparse(node).split())
            except (RecursionError, ValueError):
                text = "..."
            self.texts[node] = text
        return text if len(text) <= limit else text[: limit - 3] + "..."

    def edit(self, start: ast.expr | ast.stmt, replacement: str) -> Edit:
        """The whole of a node replaced."""
        end_line, end = start.end_lineno or start.lineno, start.end_col_offset or start.col_offset
        column = self.column(start.lineno, start.col_offset)
        return Edit(start.lineno, column, end_line, self.column(end_line, end), replacement)

    def insert_after(self, node: ast.expr | ast.stmt, text: str) -> Edit:
        end_line, end = node.end_lineno or node.lineno, node.end_col_offset or node.col_offset
        column = self.column(end_line, end)
        return Edit(end_line, column, end_line, column, text)

    def finding(
        self,
        rule: str,
        node: ast.expr | ast.stmt,
        severity: Severity,
        message: str,
        trail: tuple[Step, ...] = (),
        edits: tuple[Edit, ...] = (),
    ) -> Finding:
        """A finding at the first line of a node."""
        end_line, end = node.end_lineno or node.lineno, node.end_col_offset or node.col_offset
        if end_line != node.lineno:
            end_line, end = node.lineno, len(self.lines[node.lineno - 1].encode("utf-8", "surrogatepass"))
        column = self.column(node.lineno, node.col_offset) + 1
        last = max(self.column(end_line, end) + 1, column)
        return Finding(rule, self.path, node.lineno, column, end_line, last, severity, message, trail, edits)


def is_marked(text: str | bytes) -> bool:
    """Whether a file names anything of many processes; one that does not is read only where others import it."""
    text = text if isinstance(text, str) else text.decode("latin-1")
    lowered = text.lower()
    return any(word in lowered for word in _IN_MARKS) and _MARKS.search(lowered) is not None


def decode(content: str | bytes) -> str:
    """The text of a Python file.

    Raises:
        SyntaxError, UnicodeDecodeError: it has none.
    """
    if isinstance(content, str):
        return content.removeprefix("\ufeff")
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return content.decode(encoding)


def parse(path: str, content: str | bytes) -> Module | CannotParse:
    """The parsed file, or why it cannot be."""
    tree = parse_tree(path, content)
    if isinstance(tree, CannotParse):
        return tree
    lines = re.split(r"\r\n|\r|\n", decode(content))
    module = Module(path, tree, lines, _parts(path))
    try:
        _collect(module, tree.body, None, None)
        _imports(module)
    except RecursionError:
        return CannotParse(path, 1, "cannot parse: nested too deeply")
    return module


def parse_tree(path: str, content: str | bytes) -> ast.Module | CannotParse:
    """The tree of a file, or why there is none."""
    try:
        text = decode(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except SyntaxError as error:
        return CannotParse(path, max(error.lineno or 1, 1), f"cannot parse: {error.msg}")
    except (ValueError, LookupError) as error:
        return CannotParse(path, 1, f"cannot parse: {error}")
    except (RecursionError, MemoryError):
        return CannotParse(path, 1, "cannot parse: nested too deeply")


def _parts(path: str) -> tuple[str, ...]:
    parts = [
        part for part in PurePosixPath(path.replace("\\", "/")).with_suffix("").parts if part not in ("/", ".", "..")
    ]
    return tuple(parts[:-1] if parts[-1:] == ["__init__"] else parts)


def _collect(module: Module, body: list[ast.stmt], owner: Class | None, outer: Function | None) -> None:
    for statement in body:
        if isinstance(statement, FunctionNode):
            function = Function(statement, module, owner, outer)
            module.functions.append(function)
            if owner is not None:
                # The getter of a property stands before its setter, of the same name.
                owner.methods.setdefault(function.name, function)
            else:
                (outer.inner if outer else module.names)[function.name] = function
            _collect(module, statement.body, None, function)
        elif isinstance(statement, ast.ClassDef):
            made = Class(statement, module)
            (outer.inner if outer else module.names)[made.name] = made
            _collect(module, statement.body, made, outer)
        else:
            for inner in _blocks(statement):
                _collect(module, inner, owner, outer)


def _blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    blocks = [block for name in ("body", "orelse", "finalbody") if (block := getattr(statement, name, None))]
    blocks += [handler.body for handler in getattr(statement, "handlers", ())]
    return blocks + [case.body for case in getattr(statement, "cases", ())]


def _statements(tree: ast.Module | FunctionNode) -> Iterator[ast.stmt]:
    """All of a file or a function, without a look into expressions, which are the most of it."""
    waiting: list[ast.AST] = list(reversed(tree.body))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.stmt):
            yield node
        for name in ("cases", "finalbody", "orelse", "handlers", "body"):
            waiting.extend(reversed(getattr(node, name, ())))


def _imports(module: Module) -> None:
    for node in _statements(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module.imports[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.parts if module.path.endswith("__init__.py") else module.parts[:-1]
                above = package[: len(package) - node.level + 1] if node.level <= len(package) else ()
                base = ".".join((*above, base) if base else above)
            for alias in node.names:
                if alias.name == "*":
                    module.stars.append(base)
                    continue
                module.imports[alias.asname or alias.name] = f"{base}.{alias.name}" if base else alias.name
