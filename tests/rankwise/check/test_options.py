"""The command line of `rankwise check`, and what it says over the settings."""

from pathlib import Path

import pytest

from rankwise.check.config import ConfigError
from rankwise.check.options import parse_options
from rankwise.check.rules import DEFAULT_RULES

SETTINGS = """[tool.rankwise.check]
select = ["RW1", "RW3"]
ignore = ["RW102"]
severity = "warning"
baseline = "known.json"
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "src" / "a.py").touch()
    monkeypatch.chdir(project)
    return project


def enabled(*arguments: str) -> frozenset[str]:
    return parse_options(arguments).config.enabled


def test_without_arguments_this_folder_is_checked_by_the_default_rules() -> None:
    options = parse_options([])
    assert options.paths == (".",)
    assert options.config.enabled == DEFAULT_RULES
    assert (options.format, options.num_jobs, options.fix, options.gitignore) == ("text", 1, False, True)


def test_the_command_line_goes_over_the_settings(here: Path) -> None:
    (here / "pyproject.toml").write_text(SETTINGS)
    assert enabled("src") == {"RW101", "RW103", "RW301", "RW302", "RW303", "RW304"}
    assert enabled("--extend-select", "RW501", "--ignore", "RW3,RW103") == {"RW101", "RW501"}
    assert enabled("--select", "RW102 RW601") == {"RW102", "RW601"}
    assert enabled("--isolated") == DEFAULT_RULES
    config = parse_options(["--severity", "error"]).config
    assert (config.severity, config.baseline) == ("error", str(here / "known.json"))
    assert parse_options(["--no-baseline"]).config.baseline is None
    assert parse_options(["--write-baseline", "known.json"]).config.baseline is None
    assert parse_options(["--baseline", "b.json"]).config.baseline == str(here / "b.json")


def test_the_settings_are_those_around_what_is_checked(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "src" / "pyproject.toml").write_text(SETTINGS)
    assert parse_options(["src/a.py"]).config.root == str(here / "src")
    assert parse_options(["src/a.py", "."]).config.root == ""
    assert parse_options(["-"]).config.root == ""
    assert parse_options(["-", "--stdin-filename", "src/new.py"]).config.root == str(here / "src")
    monkeypatch.chdir("/")
    assert parse_options([str(here / "src" / "a.py")]).config.root == str(here / "src")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.py"], "no file or folder 'gone.py'"),
        (["a\0b"], "no file or folder"),
        (["-", "src"], "- means the standard input"),
        (["--frmat", "json"], "unrecognized arguments: --frmat"),
        (["--format", "xml"], "invalid choice: 'xml'"),
        (["--severity", "bad"], "invalid choice: 'bad'"),
        (["--select", "RW9"], "select: 'RW9' is no rule"),
        (["--ignore", "E501"], "ignore: 'E501' is no rule"),
        (["--jobs", "-1"], "no number of processes"),
        (["--jobs", "9999"], "no number of processes"),
        (["--jobs", "\u0663"], "no number of processes"),
        (["--fix", "--write-baseline", "x"], "cannot be given together"),
        (["--diff", "--format", "json"], "cannot be given together"),
        (["--config", "gone.toml"], "gone.toml cannot be read"),
        (["--explain"], "expected one argument"),
    ],
)
def test_what_is_not_understood_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options(arguments)


def test_options_may_be_given_several_times() -> None:
    options = parse_options(["--jobs", "3", "--exclude", "a,b/**", "--exclude", "c"])
    assert options.num_jobs == 3
    assert options.config.extend_exclude == ("a", "b/**", "c")
    assert enabled("--select", "RW101", "--select", "RW3", "--ignore", "RW303") == {"RW101", "RW301", "RW302", "RW304"}
    assert parse_options(["--jobs", "0"]).num_jobs >= 1
