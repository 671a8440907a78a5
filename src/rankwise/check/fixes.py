"""Mending files by the edits of findings: nothing else in them changes, not even a line end."""

from __future__ import annotations

import ast
import difflib
import gc
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Mapping

from rankwise.check.files import BOM, LINE_END, SourceFile, split_lines
from rankwise.check.finding import Edit, Finding
from rankwise.files import write_atomic

MAX_PASSES = 10
"""One mended place may bring up the next, as in nested calls; edits that undo each other must come to an end."""


def mend(texts: Mapping[str, str], find: Callable[[Mapping[str, str]], list[Finding]]) -> dict[str, str]:
    """Path -> new text of the files that the edits of the findings change; `find` looks again after each pass.

    A file whose edits would leave something that does not parse stays as it was.

    Ranks: local.
    """
    current = dict(texts)
    refused: set[tuple[str, tuple[Edit, ...]]] = set()
    for _ in range(MAX_PASSES):
        gc.collect()  # the trees of the last pass; a check collects nothing
        by_path: dict[str, list[Finding]] = {}
        for finding in find(current):
            if finding.edits and (finding.path, finding.edits) not in refused:
                by_path.setdefault(finding.path, []).append(finding)
        changed = False
        for path, findings in by_path.items():
            text = apply_findings(current[path], findings)
            if text == current[path] or not _parses(text):
                refused.update((path, finding.edits) for finding in findings)
                continue
            current[path], changed = text, True
        if not changed:
            break
    return {path: text for path, text in current.items() if text != texts[path]}


def apply_findings(text: str, findings: Iterable[Finding]) -> str:
    """The text with the edits of the findings.

    All edits of a finding are applied, or, where one meets an edit of a finding before it, none. Edits that are equal
    are applied once.

    Ranks: local.
    """
    offsets = _line_offsets(text)
    taken: dict[tuple[int, int], str] = {}
    for finding in findings:
        spans = [_resolve(edit, offsets, text) for edit in finding.edits]
        wanted = {span[:2]: span[2] for span in spans if span is not None}
        if len(wanted) < len(finding.edits) or any(_meets(span, new, taken) for span, new in wanted.items()):
            continue
        taken |= wanted
    pieces, position = [], 0
    for (start, end), replacement in sorted(taken.items()):
        pieces += [text[position:start], replacement]
        position = end
    return "".join([*pieces, text[position:]])


def write_source(source: SourceFile, text: str) -> str | None:
    """Replace the file by one with the new text; gives what is in the way, None where it is done.

    The file that a link points to is replaced, not the link; its permissions stay.

    Ranks: local.
    """
    content = source.encode(text)
    if content is None:
        return f"its encoding, {source.encoding}, has no one way to write the change"
    target = os.path.realpath(source.path)
    try:
        with open(target, "rb") as file:
            if file.read() != source.raw:
                return "it was changed meanwhile"
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        write_atomic(target, content)
        os.chmod(target, mode)
    except OSError as error:
        return f"it cannot be written: {error.strerror}"
    return None


def diff(source: SourceFile, text: str) -> bytes:
    """The change as `patch` and `git apply` read it, in the encoding of the file; empty where it cannot be said.

    Ranks: local.
    """
    if source.encode(text) is None:
        return b""
    # A patch knows one line end alone; a carriage return stays part of its line.
    mark = "\ufeff" if source.raw.startswith(BOM) else ""
    before, after = (re.findall(r"[^\n]*\n|[^\n]+", mark + version) for version in (source.text, text))
    name = source.path.lstrip("/")
    lines = difflib.unified_diff(before, after, f"a/{name}", f"b/{name}")
    said = [line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines]
    return "".join(said).encode(source.encoding, "backslashreplace")


def _line_offsets(text: str) -> list[int]:
    return [0, *(match.end() for match in LINE_END.finditer(text))]


def _resolve(edit: Edit, offsets: list[int], text: str) -> tuple[int, int, str] | None:
    """Start, end and replacement of an edit; None where it is outside of the text."""
    if not (1 <= edit.line <= edit.end_line <= len(offsets) and edit.column >= 0 and edit.end_column >= 0):
        return None
    start, end = offsets[edit.line - 1] + edit.column, offsets[edit.end_line - 1] + edit.end_column
    if not 0 <= start <= end <= len(text):
        return None
    newline = _newline_at(text, start)
    return start, end, newline.join(split_lines(edit.replacement))


def _newline_at(text: str, position: int) -> str:
    """The line end of the line at the position, or else the one before it."""
    after = LINE_END.search(text, position)
    if after is not None:
        return after[0]
    before = LINE_END.findall(text, 0, position)
    return before[-1] if before else "\n"


def _meets(span: tuple[int, int], replacement: str, taken: Mapping[tuple[int, int], str]) -> bool:
    """Whether an edit overlaps, or inserts where, another one does something else."""
    if span in taken:
        return taken[span] != replacement
    start, end = span
    return any((start < other_end and other_start < end) or start == other_start for other_start, other_end in taken)


def _parses(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
