"""What `rankwise check` can be asked for, and how it is written on a command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from rankwise.check.config import Config, ConfigError, check_selectors, find_settings, read_settings
from rankwise.check.finding import SEVERITIES

FORMATS = ("text", "json", "sarif", "github")
_MAX_JOBS = 256

_EPILOG = """examples:
  rankwise check                             everything below this folder
  rankwise check train.py --severity error   the sure mistakes alone
  rankwise check --explain RW101             what a rule finds, why it hurts, what to write instead
  rankwise check --diff src                  what --fix would change
  rankwise check --write-baseline known.json; rankwise check --baseline known.json    report what is new alone
Settings are in pyproject.toml, [tool.rankwise.check]. A finding is silenced by # rankwise: ignore[RW101] reason
Exit status: 0 nothing found, 1 findings (errors and warnings, or as --severity says), 2 it could not run."""


@dataclass(frozen=True)
class Options:
    """One call of `rankwise check`."""

    paths: tuple[str, ...]
    config: Config
    format: str
    explain: str | None
    list_rules: bool
    fix: bool
    diff: bool
    write_baseline: str | None
    stdin_filename: str
    force_exclude: bool
    gitignore: bool
    num_jobs: int
    quiet: bool


def parse_options(arguments: Sequence[str]) -> Options:
    """The options in `arguments`, with the settings of the checked folder.

    Raises:
        ConfigError: an option or a setting cannot be understood; the message is for the user.
        SystemExit: --help was asked for, and printed.
    Ranks: local.
    """
    given = _parser().parse_args(list(arguments))
    paths = tuple(given.paths) or (".",)
    if "-" in paths and len(paths) > 1:
        raise ConfigError("- means the standard input, and cannot be checked together with files")
    if missing := [path for path in paths if path != "-" and ("\0" in path or not os.path.lexists(path))]:
        raise ConfigError(f"there is no file or folder {missing[0]!r}")
    if given.write_baseline and (given.fix or given.diff):
        raise ConfigError("--write-baseline cannot be given together with --fix or --diff")
    if given.diff and given.format != "text":
        raise ConfigError(f"--diff prints a patch; it cannot be given together with --format {given.format}")
    return Options(
        paths=paths,
        config=_config(given, paths),
        format=given.format,
        explain=given.explain,
        list_rules=given.list_rules,
        fix=given.fix or given.diff,
        diff=given.diff,
        write_baseline=given.write_baseline,
        stdin_filename=given.stdin_filename,
        force_exclude=given.force_exclude,
        gitignore=given.gitignore,
        num_jobs=given.jobs or len(os.sched_getaffinity(0)),
        quiet=given.quiet,
    )


def _config(given: argparse.Namespace, paths: tuple[str, ...]) -> Config:
    """The settings, and over them what the command line says."""
    config = Config()
    if given.config is not None:
        config = read_settings(given.config)
    elif not given.isolated and (settings := find_settings(_start(given, paths))) is not None:
        config = read_settings(settings)
    if given.select is not None:
        config = replace(config, select=_joined(given.select), extend_select=(), ignore=())
    config = replace(
        config,
        extend_select=config.extend_select + _joined(given.extend_select),
        ignore=config.ignore + _joined(given.ignore),
        extend_exclude=config.extend_exclude + _joined(given.exclude),
        severity=given.severity or config.severity,
        unused_ignores=config.unused_ignores or given.unused_ignores,
        baseline=config.baseline if given.baseline is None else os.path.abspath(given.baseline),
    )
    check_selectors(config)
    if given.write_baseline or given.no_baseline:
        config = replace(config, baseline=None)
    return config


def _start(given: argparse.Namespace, paths: tuple[str, ...]) -> str:
    """The folder around everything that is checked."""
    named: Sequence[str] = [given.stdin_filename] if paths == ("-",) else paths
    folders = [path if os.path.isdir(path) else os.path.dirname(path) for path in map(os.path.abspath, named)]
    return os.path.commonpath(folders)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removesuffix('.')}. See {self.prog} --help.")


def _selectors(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.replace(",", " ").split() if part)


def _joined(given: Sequence[tuple[str, ...]] | None) -> tuple[str, ...]:
    """What an option said, all times that it was given."""
    return tuple(part for parts in given or () for part in parts)


def _num_jobs(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 6 or int(text) > _MAX_JOBS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes from 0 to {_MAX_JOBS}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rankwise check",
        description="Find rank mistakes in training code. The code is read, and never imported or run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="files, folders, or - for the standard input (default: this folder)")
    add("--format", choices=FORMATS, default="text", help="how findings are printed (default: text)")
    add(
        "--severity",
        choices=SEVERITIES,
        help="the mildest that is shown and counted (default: all are shown, info not counted)",
    )
    add("--fix", action="store_true", help="mend what can be mended safely, report the rest")
    add("--diff", action="store_true", help="print as a patch what --fix would change, and change nothing")
    add("--jobs", type=_num_jobs, default=1, metavar="N", help="processes to work with; 0: one per core (default: 1)")
    add("--quiet", action="store_true", help="no summary")
    rules = parser.add_argument_group("rules", "RULES are codes, their beginnings, names, or ALL, with commas between")
    add = rules.add_argument
    add("--explain", metavar="RULE", help="tell about a rule, and check nothing")
    add("--list-rules", action="store_true", help="list the rules, and check nothing")
    add(
        "--select",
        type=_selectors,
        action="append",
        metavar="RULES",
        help="these rules, in place of the default and the settings",
    )
    add("--extend-select", type=_selectors, action="append", metavar="RULES", help="these rules as well")
    add("--ignore", type=_selectors, action="append", metavar="RULES", help="not these rules")
    add("--unused-ignores", action="store_true", help="report comments that ignore nothing (info)")
    files = parser.add_argument_group("files")
    add = files.add_argument
    add("--config", metavar="FILE", help="settings in place of the nearest pyproject.toml that has some")
    add("--isolated", action="store_true", help="no settings but those given here")
    add(
        "--exclude",
        type=_patterns,
        action="append",
        metavar="GLOBS",
        help="leave these out as well, with commas between",
    )
    add("--force-exclude", action="store_true", help="leave them out also where their path was given")
    add("--no-gitignore", dest="gitignore", action="store_false", help="look also at what git ignores")
    add("--stdin-filename", default="-", metavar="NAME", help="what - is called in the findings and for the settings")
    add("--baseline", metavar="FILE", help="do not report what is in this file")
    add("--no-baseline", action="store_true", help="report also what is in the baseline of the settings")
    add("--write-baseline", metavar="FILE", help="write what is found to this file, and report nothing")
    return parser


def _patterns(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)
