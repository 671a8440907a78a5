"""Comments that say a finding is known: `# rankwise: ignore[RW101] reason`, `# rankwise: ignore-file[RW301] reason`.

A comment holds for the findings on its line, and for those of a statement that begins or ends there (of `if`, `def`
and so on: its head). Alone on its line it holds for the statement that comes next.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from rankwise.check.config import IGNORE_COMMENT, OWN_CODES, ConfigError, codes_of
from rankwise.check.files import split_lines
from rankwise.check.finding import Finding, Severity
from rankwise.check.rules import RULES

_MARK = re.compile(r"#\s*rankwise\s*:")
_COMMENT = re.compile(r"#\s*rankwise\s*:\s*(?P<word>[\w-]*)(?P<list>\s*\[(?P<codes>[^\]]*)\])?(?P<rest>.*)", re.DOTALL)


@dataclass
class _Ignore:
    """One comment that ignores something."""

    line: int
    column: int
    """1-based."""
    text: str
    codes: frozenset[str] | None
    """None means every rule."""
    target: int | None
    """The line that it stands on, or, where it is alone there, the next line with code; None means the whole file."""
    used: set[str] = field(default_factory=set)

    def covers(self, code: str, lines: Collection[int]) -> bool:
        """Whether it ignores findings of the rule on one of the lines."""
        return (self.codes is None or code in self.codes) and (self.target is None or self.target in lines)


class IgnoreComments:
    """The ignore comments of one file."""

    def __init__(self, path: str, text: str) -> None:
        self._path = path
        self._ignores: list[_Ignore] = []
        self._mistakes: list[Finding] = []
        self._statements: list[tuple[int, int, int, int]] | None = None
        self._text = text
        if _MARK.search(text):  # most files have none, and reading tokens takes longer than parsing
            self._read()

    def __bool__(self) -> bool:
        return bool(self._ignores or self._mistakes)

    def ignores(self, finding: Finding) -> bool:
        """Whether a comment covers the finding; the comment then counts as used."""
        if not self._ignores:
            return False
        lines = {finding.line, finding.end_line, *self._statement_lines(finding)}
        covering = [ignore for ignore in self._ignores if ignore.covers(finding.rule, lines)]
        for ignore in covering:
            ignore.used.add(finding.rule)
        return bool(covering)

    @property
    def mistakes(self) -> list[Finding]:
        """Comments that are meant for us and cannot be understood."""
        return self._mistakes

    def unused(self, enabled: Collection[str]) -> list[Finding]:
        """Comments that ignored nothing, once every finding was asked about; rules that are off do not count."""
        found = []
        for ignore in self._ignores:
            if ignore.codes is None:
                idle = [] if ignore.used else ["any rule"]
            else:
                idle = sorted((ignore.codes & frozenset(enabled)) - ignore.used)
            if idle:
                message = f"this comment ignores nothing of {', '.join(idle)}; take it away"
                found.append(self._finding(ignore.line, ignore.column, ignore.text, "info", message))
        return found

    def _read(self) -> None:
        lines = split_lines(self._text)
        for line, column, comment in _comments(self._text):
            match = _COMMENT.search(comment)
            if match is None:
                continue
            column += match.start()
            is_alone = not lines[line - 1][:column].strip()
            try:
                codes = _parse(match)
            except ConfigError as error:
                self._mistakes.append(self._finding(line, column + 1, comment[match.start() :], "warning", str(error)))
                continue
            target = None if match["word"] == "ignore-file" else _next_code(lines, line) if is_alone else line
            self._ignores.append(_Ignore(line, column + 1, comment[match.start() :], codes, target))

    def _finding(self, line: int, column: int, text: str, severity: Severity, message: str) -> Finding:
        end_column = column + len(text.rstrip())
        return Finding(IGNORE_COMMENT, self._path, line, column, line, end_column, severity, message)

    def _statement_lines(self, finding: Finding) -> tuple[int, ...]:
        """First and last line of the innermost statement, or head of one, that the finding is in."""
        if self._statements is None:
            self._statements = _statement_spans(self._text)
        place = (finding.line, finding.column - 1)
        around = [span for span in self._statements if span[:2] <= place <= span[2:]]
        if not around:
            return ()
        first, _, last, _ = max(around)
        return first, last


def _parse(match: re.Match[str]) -> frozenset[str] | None:
    """The codes in a comment; None for all."""
    if match["word"] not in ("ignore", "ignore-file"):
        raise ConfigError(f"{match['word']!r} is nothing to say to rankwise; write # rankwise: ignore[RW101] reason")
    if match["list"] is None:
        if match["rest"].lstrip().startswith(("[", "(", ":", "=")):
            raise ConfigError("the codes cannot be read; write # rankwise: ignore[RW101, RW301] reason")
        return None
    selectors = [part for part in re.split(r"[\s,]+", match["codes"]) if part]
    if not selectors:
        raise ConfigError("there is no code in the brackets; write # rankwise: ignore[RW101] reason")
    return codes_of(selectors) & (RULES.keys() | OWN_CODES.keys())


def _comments(text: str) -> Iterable[tuple[int, int, str]]:
    """Line, column and text of the comments; those before a place that cannot be read as tokens."""
    # Line ends as Python's own reader makes them; anything else may hold a piece of a comment back.
    normal = "\n".join(split_lines(text))
    try:
        for token in tokenize.generate_tokens(io.StringIO(normal).readline):
            if token.type == tokenize.COMMENT and "rankwise" in token.string:
                yield token.start[0], token.start[1], token.string
    except (tokenize.TokenError, SyntaxError, RecursionError, MemoryError):
        return


def _next_code(lines: list[str], line: int) -> int:
    """The next line behind that has more than a comment on it; the last one where there is none."""
    for number in range(line + 1, len(lines) + 1):
        content = lines[number - 1].strip()
        if content and not content.startswith("#"):
            return number
    return len(lines)


def _statement_spans(text: str) -> list[tuple[int, int, int, int]]:
    """Start and end (line, column) of every simple statement and of the head of every compound one."""
    try:
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt | ast.ExceptHandler)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    lines = split_lines(text)
    spans = []
    for node in nodes:
        end = (node.end_lineno or node.lineno, node.end_col_offset or 0)
        body: list[ast.AST] = getattr(node, "body", None) or getattr(node, "cases", None) or []
        if body:
            end = (_head_end(lines, node.lineno, _first_line(body[0])), 1 << 30)
        spans.append((node.lineno, node.col_offset, *end))
    return spans


def _first_line(node: ast.AST) -> int:
    place = node.pattern if isinstance(node, ast.match_case) else node
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    line: int = getattr(decorators[0] if decorators else place, "lineno", 1)
    return line


def _head_end(lines: list[str], start: int, body_line: int) -> int:
    """The last line with code before the body; the first line of all where the body is on it too."""
    number = body_line - 1
    while number > start and not lines[number - 1].partition("#")[0].strip():
        number -= 1
    return max(start, number)
