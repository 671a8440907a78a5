"""What is checked and reported: `[tool.rankwise.check]` of pyproject.toml, and the rules that are chosen by it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from rankwise.check.files import DEFAULT_EXCLUDE
from rankwise.check.finding import SEVERITIES, Severity
from rankwise.check.globs import PathPatterns
from rankwise.check.rules import DEFAULT_RULES, RULES
from rankwise.errors import RankwiseError

CANNOT_PARSE = "RW000"
"""What stands in place of a rule's code where a file could not be checked."""
IGNORE_COMMENT = "RW001"
"""The same, where a comment that ignores something is wrong, or does nothing."""
OWN_CODES = {CANNOT_PARSE: "cannot-parse", IGNORE_COMMENT: "ignore-comment"}

_LISTS = ("exclude", "extend-exclude", "extend-select", "ignore", "select")
_KEYS = (*_LISTS, "baseline", "per-file-ignores", "severity", "unused-ignores")
_MAX_BYTES = 4 << 20


class ConfigError(RankwiseError, ValueError):
    """A setting, an option or a file that the user gave cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Config:
    """What is checked and reported, wherever it was said."""

    root: str = ""
    """The folder of the settings, absolute: patterns are relative to it. Empty means the working directory."""
    select: tuple[str, ...] | None = None
    """Codes, their beginnings, names or "ALL"; None means the default rules."""
    extend_select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    extend_exclude: tuple[str, ...] = ()
    per_file_ignores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Pattern -> what is ignored in the files that it matches."""
    severity: Severity | None = None
    """The mildest that is shown and counted; None shows all and counts errors and warnings."""
    baseline: str | None = None
    """Absolute."""
    unused_ignores: bool = False
    """Whether ignore comments that ignore nothing are findings."""

    @property
    def enabled(self) -> frozenset[str]:
        """Codes of the rules that are on."""
        chosen = DEFAULT_RULES if self.select is None else codes_of(self.select)
        return frozenset((chosen | codes_of(self.extend_select)) - codes_of(self.ignore)) & RULES.keys()

    def is_shown(self, severity: Severity) -> bool:
        """Whether findings so severe are reported."""
        return self.severity is None or SEVERITIES.index(severity) <= SEVERITIES.index(self.severity)

    def counts(self, severity: Severity) -> bool:
        """Whether findings so severe make the exit status 1."""
        return SEVERITIES.index(severity) <= SEVERITIES.index(self.severity or "warning")


class PathRules:
    """The settings of a `Config` that depend on the path."""

    def __init__(self, config: Config) -> None:
        self._root = config.root or os.getcwd()
        self._exclude = PathPatterns(config.exclude + config.extend_exclude)
        self._ignores = [(PathPatterns((glob,)), codes_of(codes)) for glob, codes in config.per_file_ignores.items()]
        ignored = codes_of(config.ignore)
        self._always = frozenset(ignored & OWN_CODES.keys())

    def is_excluded(self, path: str) -> bool:
        """Whether a file or folder is left out."""
        return self._exclude.match(self._relative(path))

    def ignored_codes(self, path: str) -> frozenset[str]:
        """Codes that are not reported in this file."""
        codes = set(self._always)
        if self._ignores:
            relative = self._relative(path)
            codes.update(*(ignored for patterns, ignored in self._ignores if patterns.match(relative)))
        return frozenset(codes)

    def _relative(self, path: str) -> str:
        absolute = os.path.abspath(path)
        inside = absolute.startswith(self._root.rstrip("/") + "/")
        return absolute[len(self._root.rstrip("/")) + 1 :] if inside else absolute


def codes_of(selectors: Iterable[str]) -> frozenset[str]:
    """The codes that are meant: "RW101", "device-from-global-rank", "RW1" for those that begin so, "ALL".

    Raises:
        ConfigError: no rule is meant.
    Ranks: local.
    """
    names = {rule.name: code for code, rule in RULES.items()} | {name: code for code, name in OWN_CODES.items()}
    found: set[str] = set()
    for selector in selectors:
        if selector in names:
            found.add(names[selector])
            continue
        wanted = "RW" if selector.upper() == "ALL" else selector.upper()
        matching = {code for code in names.values() if wanted.startswith("RW") and code.startswith(wanted)}
        if not matching:
            hint = _suggest(selector, [*names, *names.values()])
            raise ConfigError(f"{selector!r} is no rule{hint or '; rankwise check --list-rules shows them'}")
        found |= matching
    return frozenset(found)


def find_settings(start: str) -> str | None:
    """The pyproject.toml with a table [tool.rankwise.check] that is nearest to the folder, in it or around it.

    Raises:
        ConfigError: one cannot be read.
    Ranks: local.
    """
    folder = os.path.abspath(start)
    while True:
        path = os.path.join(folder, "pyproject.toml")
        if os.path.isfile(path) and _read_table(path) is not None:
            return path
        parent = os.path.dirname(folder)
        if parent == folder:
            return None
        folder = parent


def read_settings(path: str) -> Config:
    """The settings in a pyproject.toml, or in a file of the same form.

    Raises:
        ConfigError: it cannot be read, has no table [tool.rankwise.check], or an entry of it is not understood.
    Ranks: local.
    """
    table = _read_table(path)
    if table is None:
        raise ConfigError(f"{path} has no table [tool.rankwise.check]. Add it, or leave out --config.")
    try:
        return _parse_table(table, os.path.dirname(os.path.abspath(path)))
    except ConfigError as error:
        raise ConfigError(f"{path}: [tool.rankwise.check]: {error}") from None


def _read_table(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Repair it, or give --isolated.") from error
    if b"rankwise" not in raw:  # most have nothing for us, and then neither the parser nor a mistake in it matters
        return None
    import tomllib

    try:
        if len(raw) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES >> 20} MiB")
        document: Any = tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML: {error}. Repair it, or give --isolated.") from error
    for name in ("tool", "rankwise", "check"):
        document = document.get(name)
        if document is None:
            return None
        if not isinstance(document, dict):
            raise ConfigError(f"{path}: {name!r} is {_shown(document)}, no table. Write [tool.rankwise.check].")
    return cast("dict[str, Any]", document)


def _parse_table(table: Mapping[str, Any], root: str) -> Config:
    entries: dict[str, Any] = {}
    for key, value in table.items():
        if key not in _KEYS:
            raise ConfigError(f"{key!r} is no setting{_suggest(key, _KEYS)}; there are {', '.join(sorted(_KEYS))}")
        entries[key.replace("-", "_")] = _parse_entry(key, value, root)
    config = Config(root=root, **entries)
    check_selectors(config)
    return config


def _parse_entry(key: str, value: object, root: str) -> object:
    match key:
        case "per-file-ignores":
            if not isinstance(value, dict):
                raise ConfigError(f"{key} is {_shown(value)}; write a table such as {{ 'tests/**' = ['RW301'] }}")
            return {pattern: _strings(f"{key} of {pattern!r}", codes) for pattern, codes in value.items()}
        case "severity":
            if value not in SEVERITIES:
                raise ConfigError(f"{key} is {_shown(value)}; write one of {', '.join(SEVERITIES)}")
            return value
        case "unused-ignores":
            if not isinstance(value, bool):
                raise ConfigError(f"{key} is {_shown(value)}; write true or false")
            return value
        case "baseline":
            if not isinstance(value, str) or not value or "\0" in value:
                raise ConfigError(f"{key} is {_shown(value)}; write a file's name in quotes")
            return os.path.join(root, value)
    return _strings(key, value)


def check_selectors(config: Config) -> None:
    """Complain about what names no rule.

    Raises:
        ConfigError: a selector names none.
    Ranks: local.
    """
    named = {"select": config.select or (), "extend-select": config.extend_select, "ignore": config.ignore}
    named |= {f"per-file-ignores of {pattern!r}": codes for pattern, codes in config.per_file_ignores.items()}
    for key, selectors in named.items():
        try:
            codes_of(selectors)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None


def _strings(key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ConfigError(f"{key} is {_shown(value)}; write a list of strings such as ['RW101']")
    return tuple(cast("list[str]", value))


def _suggest(word: str, known: Collection[str]) -> str:
    import difflib  # only where something went wrong

    close = difflib.get_close_matches(word, list(known), 1) or difflib.get_close_matches(word.upper(), list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:60] + ".."
