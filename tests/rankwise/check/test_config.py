"""The settings in pyproject.toml, and the rules that they choose."""

from pathlib import Path

import pytest

from rankwise.check.config import Config, ConfigError, PathRules, codes_of, find_settings, read_settings
from rankwise.check.finding import SEVERITIES
from rankwise.check.rules import DEFAULT_RULES, RULES


def settings(folder: Path, text: str) -> Config:
    path = folder / "pyproject.toml"
    path.write_text(f"[tool.rankwise.check]\n{text}\n")
    return read_settings(str(path))


def test_every_setting_arrives(tmp_path: Path) -> None:
    config = settings(
        tmp_path,
        """select = ["RW1", "unguarded-write"]
        extend-select = ["RW602"]
        ignore = ["RW102"]
        exclude = ["vendor"]
        extend-exclude = ["third_party/**"]
        per-file-ignores = { "tests/**" = ["RW301"] }
        severity = "error"
        baseline = "known.json"
        unused-ignores = true""",
    )
    assert config.enabled == {"RW101", "RW103", "RW301", "RW602"}
    assert config.exclude + config.extend_exclude == ("vendor", "third_party/**")
    assert config.per_file_ignores == {"tests/**": ("RW301",)}
    assert config.severity == "error"
    assert config.baseline == str(tmp_path / "known.json")
    assert config.unused_ignores
    assert config.root == str(tmp_path)


def test_without_settings_the_default_rules_are_on() -> None:
    assert Config().enabled == DEFAULT_RULES
    assert Config(select=("ALL",)).enabled == RULES.keys()
    assert Config(extend_select=("RW103",), ignore=("RW1",)).enabled == DEFAULT_RULES - {"RW101", "RW102"}


@pytest.mark.parametrize(
    ("selector", "codes"),
    [
        ("RW101", {"RW101"}),
        ("rw101", {"RW101"}),
        ("device-not-pinned", {"RW102"}),
        ("RW40", {"RW401", "RW402", "RW403", "RW404"}),
        ("RW000", {"RW000"}),
    ],
)
def test_rules_are_meant_by_code_name_or_beginning(selector: str, codes: set[str]) -> None:
    assert codes_of([selector]) == codes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('selct = ["RW1"]', r"'selct' is no setting; did you mean 'select'\?; there are baseline, exclude"),
        ("select = 'RW1'", r"select is 'RW1'; write a list of strings"),
        ("ignore = [1]", r"ignore is \[1\]; write a list of strings"),
        ('select = ["RW109"]', "select: 'RW109' is no rule; did you mean 'RW10"),
        ('ignore = ["device-from-globl-rank"]', "did you mean 'device-from-global-rank'"),
        ('ignore = ["E501"]', "ignore: 'E501' is no rule"),
        ("per-file-ignores = []", "per-file-ignores is .*write a table"),
        ("per-file-ignores = { 'a' = ['X1'] }", "per-file-ignores of 'a': 'X1' is no rule"),
        ("per-file-ignores = { 'a' = 'RW101' }", "per-file-ignores of 'a' is 'RW101'; write a list"),
        ('severity = "bad"', "severity is 'bad'; write one of error, warning, info"),
        ("severity = []", "severity is .*; write one of"),
        ("unused-ignores = 1", "unused-ignores is 1; write true or false"),
        ('baseline = ""', "write a file's name"),
        ("= 1", "is no TOML"),
        ("x = " + "[" * 5000, "is no TOML"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        settings(tmp_path, text)
    assert str(tmp_path / "pyproject.toml") in str(caught.value)


@pytest.mark.parametrize("text", ["[tool]\nrankwise = 1\n", "[tool.rankwise]\ncheck = []\n", "tool = 'rankwise'\n"])
def test_a_table_that_is_something_else_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ConfigError, match="no table"):
        find_settings(str(tmp_path))


def test_a_file_that_has_nothing_for_us_may_be_broken(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_bytes(b"\xff[[[")
    (tmp_path / "inner").mkdir()
    assert find_settings(str(tmp_path / "inner")) is None
    with pytest.raises(ConfigError, match=r"has no table \[tool.rankwise.check\]"):
        read_settings(str(tmp_path / "pyproject.toml"))


def test_the_nearest_file_that_has_the_table_is_taken(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    settings(tmp_path, "")
    (inner / "pyproject.toml").write_text("[project]\ndependencies = ['rankwise']\n")
    assert find_settings(str(inner)) == str(tmp_path / "pyproject.toml")


def test_settings_that_cannot_be_read_are_told_of(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_settings(str(tmp_path / "gone.toml"))
    (tmp_path / "pyproject.toml").write_bytes(b"# rankwise \xff\n")
    with pytest.raises(ConfigError, match="is no TOML"):
        read_settings(str(tmp_path / "pyproject.toml"))


def test_patterns_are_relative_to_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    config = settings(
        tmp_path, 'exclude = ["sub/old"]\nper-file-ignores = { "sub/*.py" = ["RW1"] }\nignore = ["RW000"]'
    )
    rules = PathRules(config)
    assert rules.is_excluded("old/a.py")
    assert not rules.is_excluded("new/sub/old/a.py")
    assert rules.ignored_codes("a.py") == {"RW000", "RW101", "RW102", "RW103"}
    assert rules.ignored_codes("x/a.py") == {"RW000"}
    assert rules.ignored_codes("../a.py") == {"RW000"}


@pytest.mark.parametrize(
    ("severity", "shown", "counted"),
    [
        (None, {"error", "warning", "info"}, {"error", "warning"}),
        ("error", {"error"}, {"error"}),
        ("warning", {"error", "warning"}, {"error", "warning"}),
        ("info", {"error", "warning", "info"}, {"error", "warning", "info"}),
    ],
)
def test_the_severity_says_what_is_shown_and_counted(severity: None, shown: set[str], counted: set[str]) -> None:
    config = Config(severity=severity)
    assert {level for level in SEVERITIES if config.is_shown(level)} == shown
    assert {level for level in SEVERITIES if config.counts(level)} == counted
