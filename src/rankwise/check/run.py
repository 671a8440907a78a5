"""One check of some sources: the engine's findings, less those that are ignored or known."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rankwise.check.analyze import Analysis, analyze
from rankwise.check.baseline import Baseline
from rankwise.check.config import CANNOT_PARSE, Config, PathRules
from rankwise.check.files import Lines
from rankwise.check.finding import CannotParse, Finding
from rankwise.check.ignore import IgnoreComments

# Up to the end of the line, or of the brackets; also in strings, which at worst keeps files together.
_IMPORT = re.compile(r"\b(?:from|import)\b((?:[^#\n\\(]|\\\r?\n|\((?:[^)#]|#[^\n]*){0,20000}+\))*+)")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Checker:
    """What is asked of every source; `baseline` has the known findings."""

    config: Config
    baseline: Baseline | None = None
    num_jobs: int = 1

    def find(self, texts: Mapping[str, str], unread: Sequence[CannotParse] = ()) -> list[Finding]:
        """The findings to report in all sources, the known ones left out, by path, line and column.

        Args:
            texts: path -> source.
            unread: files that could not be read; reported as well.
        Ranks: local.
        """
        found = self.find_all(texts, unread)
        return found if self.baseline is None else self.baseline.drop_known(found, Lines(texts))

    def find_all(self, texts: Mapping[str, str], unread: Sequence[CannotParse] = ()) -> list[Finding]:
        """The same with the known ones.

        Ranks: local.
        """
        enabled = self.config.enabled
        parts = [_analyze(texts, enabled)] if self.num_jobs == 1 else self._analyze_parts(texts)
        unparsed = [*unread, *(error for part in parts for error in part.cannot_parse)]
        found = [finding for part in parts for finding in part.findings]
        found += [
            Finding(CANNOT_PARSE, error.path, error.line, 1, error.line, 1, "error", _cannot_parse(error.message))
            for error in unparsed
        ]
        path_rules = PathRules(self.config)
        shown = []
        for finding in self._without_ignored(texts, found):
            if self.config.is_shown(finding.severity) and finding.rule not in path_rules.ignored_codes(finding.path):
                shown.append(finding)
        return sorted(shown, key=lambda finding: (finding.path, finding.line, finding.column, finding.rule))

    def _without_ignored(self, texts: Mapping[str, str], findings: list[Finding]) -> list[Finding]:
        comments = {path: IgnoreComments(path, text) for path, text in texts.items()}
        left = [
            finding
            for finding in findings
            if finding.path not in comments or not comments[finding.path].ignores(finding)
        ]
        for own in comments.values():
            unused = own.unused(self.config.enabled) if self.config.unused_ignores else []
            left += [finding for finding in [*own.mistakes, *unused] if not own.ignores(finding)]
        return left

    def _analyze_parts(self, texts: Mapping[str, str]) -> list[Analysis]:
        """What the processes found in the parts that do not import each other, so that no value is lost between."""
        import multiprocessing  # most calls do without
        from concurrent.futures import ProcessPoolExecutor

        parts = _join(separate(texts), self.num_jobs)
        if len(parts) < 2:
            return [_analyze(texts, self.config.enabled)]
        # A fork has the sources already; a fresh interpreter would have to be given them.
        with ProcessPoolExecutor(len(parts), multiprocessing.get_context("fork")) as pool:
            jobs = [pool.submit(_analyze, {path: texts[path] for path in part}, self.config.enabled) for part in parts]
            return [job.result() for job in jobs]


def separate(texts: Mapping[str, str]) -> list[list[str]]:
    """The paths in groups, no file of one group importing a file of another; in doubt files are together.

    Ranks: local.
    """
    homes: dict[str, list[str]] = {}
    for path in texts:
        folder, _, name = path.rpartition("/")
        stem = name.partition(".")[0]
        homes.setdefault(folder.rpartition("/")[2] if stem == "__init__" else stem, []).append(path)
    parent = {path: path for path in texts}

    def root(path: str) -> str:
        while parent[path] != path:
            parent[path] = path = parent[parent[path]]
        return path

    for path, text in texts.items():
        for statement in _IMPORT.findall(text):
            for word in set(_WORD.findall(statement)) & homes.keys():
                for other in homes[word]:
                    parent[root(other)] = root(path)
    groups: dict[str, list[str]] = {}
    for path in texts:
        groups.setdefault(root(path), []).append(path)
    return list(groups.values())


def _join(groups: list[list[str]], num_parts: int) -> list[list[str]]:
    """The groups dealt out to so many parts, the largest first, each to the smallest part."""
    parts: list[list[str]] = [[] for _ in range(num_parts)]
    for group in sorted(groups, key=len, reverse=True):
        min(parts, key=len).extend(group)
    return [part for part in parts if part]


def _cannot_parse(why: str) -> str:
    return why if why.startswith("cannot parse") else f"cannot parse: {why}"


def _analyze(texts: Mapping[str, str], enabled: Collection[str]) -> Analysis:
    """The analysis; a file that brings the analysis itself down is left out and told of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the checked code: a wrong escape, `is` with a literal
            return analyze(texts, enabled)
    except (Exception, RecursionError) as error:
        if len(texts) == 1:
            said = f"this rankwise fails on it ({type(error).__name__}: {error}); please report it"
            if isinstance(error, RecursionError | MemoryError):
                said = "it is nested too deeply to be checked"
            return Analysis((), (CannotParse(next(iter(texts)), 1, said),))
    alone = {path: _analyze({path: text}, enabled) for path, text in texts.items()}
    failing = [error for part in alone.values() for error in part.cannot_parse]
    return Analysis(tuple(finding for part in alone.values() for finding in part.findings), tuple(failing))
