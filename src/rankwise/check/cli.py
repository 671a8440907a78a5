"""`rankwise check`: rank mistakes in the source, before the job starts.

    rankwise check src          rankwise check --explain RW101

It reads the files and runs none of them, with the standard library alone.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rankwise.check import formats
from rankwise.check.baseline import read_baseline, write_baseline
from rankwise.check.config import ConfigError, PathRules, codes_of
from rankwise.check.files import Lines, SourceFile, decode, find_files, read_file
from rankwise.check.finding import CannotParse, Finding
from rankwise.check.options import Options, parse_options
from rankwise.check.rules import RULES
from rankwise.check.run import Checker
from rankwise.check.text import as_text, count, summary

_STDOUT, _STDERR = 1, 2


def main(arguments: Sequence[str]) -> int:
    """Check, and print what was found.

    Returns:
        The exit status: 0 nothing found, 1 findings as severe as was asked for, 2 it could not run; 130 on Ctrl-C.
    Ranks: local, in no job.
    """
    try:
        options = parse_options(arguments)
        if options.list_rules:
            return _print(_rule_table())
        if options.explain is not None:
            return _print(_explain(options.explain))
        with _no_collections():
            return _check(options)
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except ConfigError as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


@dataclass
class _Inputs:
    """What is checked, by the path that it is shown under."""

    sources: dict[str, SourceFile] = field(default_factory=dict)
    unread: list[CannotParse] = field(default_factory=list)
    piped: bytes = b""
    """All of the standard input, where that is what is checked."""

    @property
    def texts(self) -> dict[str, str]:
        return {path: source.text for path, source in self.sources.items()}

    @property
    def code(self) -> Lines:
        """The text of a line, by path and number."""
        return Lines(self.texts)

    def replace(self, texts: Mapping[str, str]) -> None:
        """Take other texts in place of those that were read."""
        for path, text in texts.items():
            source = self.sources[path]
            self.sources[path] = SourceFile(path, source.encode(text) or source.raw, text, source.encoding)


def _check(options: Options) -> int:
    baseline = None if options.config.baseline is None else read_baseline(options.config.baseline)
    checker = Checker(options.config, baseline, options.num_jobs)
    inputs = _read(options)
    if options.write_baseline is not None:
        findings = checker.find_all(inputs.texts, inputs.unread)
        write_baseline(options.write_baseline, findings, inputs.code)
        _say(f"Wrote {count(len(findings), 'finding')} to {options.write_baseline}.", unless=options.quiet)
        return 0
    if options.fix:
        from rankwise.check import fixes  # with pathlib and difflib, which a mere check does without

        mended = fixes.mend(inputs.texts, checker.find)
        if options.diff:
            return _show_diff(options, inputs, mended)
        num_files = _write_mended(options, inputs, mended)
        _say(f"Mended {count(num_files, 'file')}.", unless=options.quiet or not num_files)
    found = checker.find_all(inputs.texts, inputs.unread)
    findings = found if baseline is None else baseline.drop_known(found, inputs.code)
    if baseline is not None and (gone := baseline.num_gone(found, inputs.sources, inputs.code)):
        _say(f"{count(gone, 'finding')} of the baseline no longer there: write it again.", unless=options.quiet)
    status = int(any(options.config.counts(finding.severity) for finding in findings))
    # Of the standard input, the mended text is what the output is for.
    to_stderr = options.fix and options.paths == ("-",)
    return max(status, _report(options, inputs, findings, len(found) - len(findings), to_stderr=to_stderr))


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Syntax trees are millions of objects that live to the end: looking for garbage among them took a third."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read(options: Options) -> _Inputs:
    inputs = _Inputs()
    path_rules = PathRules(options.config)
    if options.paths == ("-",):
        name = options.stdin_filename
        inputs.piped = sys.stdin.buffer.read() if sys.stdin is not None else b""
        if not (options.force_exclude and path_rules.is_excluded(name)):
            _add(inputs, decode(name, inputs.piped))
        return inputs
    paths, unreadable = find_files(
        list(options.paths),
        path_rules.is_excluded,
        respects_gitignore=options.gitignore,
        excludes_given=options.force_exclude,
    )
    inputs.unread += unreadable
    for path in paths:
        _add(inputs, read_file(path))
    return inputs


def _add(inputs: _Inputs, source: SourceFile | CannotParse) -> None:
    if isinstance(source, CannotParse):
        inputs.unread.append(source)
    else:
        inputs.sources[source.path] = source


def _write_mended(options: Options, inputs: _Inputs, texts: Mapping[str, str]) -> int:
    """Write the mended files, or the standard input's text to the output; gives how many were mended."""
    if options.paths == ("-",):
        # Also what cannot be decoded comes out again: an editor puts the output in place of what it gave.
        contents = [inputs.sources[path].encode(text) for path, text in texts.items()]
        _write(_STDOUT, next(filter(None, contents), inputs.piped))
        inputs.replace(texts)
        return len(texts)
    from rankwise.check import fixes

    num_written = 0
    for path, text in texts.items():
        in_the_way = fixes.write_source(inputs.sources[path], text)
        if in_the_way is None:
            inputs.replace({path: text})
            num_written += 1
        else:
            _say(f"error: {formats.printable_path(path)} stays as it is: {in_the_way}")
    return num_written


def _show_diff(options: Options, inputs: _Inputs, texts: Mapping[str, str]) -> int:
    """Print the patch; the exit status is 1 where it has something."""
    from rankwise.check import fixes

    patch = b"".join(fixes.diff(inputs.sources[path], text) for path, text in texts.items())
    _say(f"--fix would mend {count(len(texts), 'file')}.", unless=options.quiet)
    return max(int(bool(patch)), _write(_STDOUT, patch))


def _report(options: Options, inputs: _Inputs, findings: Sequence[Finding], num_known: int, *, to_stderr: bool) -> int:
    """Print the findings; gives 2 where they cannot be written, else 0."""
    out = _STDERR if to_stderr else _STDOUT
    if options.format == "json":
        return _print(formats.as_json(findings), out)
    if options.format == "github":
        return _print(formats.as_github(findings), out)
    if options.format == "sarif":
        from rankwise.check.sarif import as_sarif

        return _print(as_sarif(findings, inputs.code), out)
    status = _print(as_text(findings, inputs.code, is_colored=_is_colored(out)), out)
    num_files = len(inputs.sources) + len(inputs.unread)
    _say(summary(findings, num_files, num_known), unless=options.quiet)
    return status


def _is_colored(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        return os.isatty(descriptor) and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return False


def _explain(selector: str) -> str:
    codes = sorted(codes_of([selector]) & RULES.keys())
    if not codes:
        raise ConfigError(f"{selector!r} is no rule; rankwise check --list-rules shows them")
    return "\n".join(RULES[code].explain().rstrip() + "\n" for code in codes)


def _rule_table() -> str:
    width = max(len(rule.name) for rule in RULES.values())
    lines = [
        f"{rule.code}  {rule.name:<{width}}  {rule.severity:<7}  {'' if rule.default else 'off by default: '}"
        f"{rule.summary}{'  (--fix)' if rule.fixable else ''}"
        for rule in RULES.values()
    ]
    return "\n".join(lines) + "\n"


def _say(text: str, *, unless: bool = False) -> None:
    if not unless:
        _write(_STDERR, (text + "\n").encode("utf-8", "backslashreplace"))


def _print(text: str, descriptor: int = _STDOUT) -> int:
    return _write(descriptor, text.encode("utf-8", "backslashreplace"))


def _write(descriptor: int, content: bytes) -> int:
    """Write everything; gives 2 where it cannot be written, and 0 also where a reader such as `head` has gone."""
    view = memoryview(content)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except BrokenPipeError:
        return 0
    except OSError as error:
        if descriptor != _STDERR:
            _say(f"error: the output cannot be written: {error.strerror}. Give it a place with room.")
        return 2
    return 0
