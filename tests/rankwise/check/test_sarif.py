"""Findings as SARIF 2.1.0: what its specification requires of the parts that are written."""

import json
from typing import Any
from urllib.parse import unquote

import pytest

from rankwise.check.finding import Edit, Finding, Step
from rankwise.check.rules import RULES
from rankwise.check.sarif import as_sarif

TRAIL = (Step("device <- rank", "a.py", 3), Step("rank <- dist.get_rank()", "b c.py", 40))
FULL = Finding("RW101", "dir/a b.py", 3, 5, 3, 9, "error", "what it says", TRAIL, (Edit(3, 4, 3, 8, "local_rank"),))
OTHERS = (
    Finding("RW303", "a.py", 5, 1, 5, 2, "warning", "it races"),
    Finding("RW303", "a.py", 6, 1, 6, 2, "info", "it races"),
    Finding("RW000", "/abs/\udcff.py", 1, 1, 1, 1, "error", "cannot parse: no Python"),
)


@pytest.fixture(autouse=True)
def explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.check.rules.Rule.explain", lambda rule: f"# {rule.code}")


def run_of(*findings: Finding) -> dict[str, Any]:
    log = json.loads(as_sarif(findings, lambda path, line: "x = 1"))
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    (run,) = log["runs"]
    assert isinstance(run, dict)
    return run


def check_location(location: dict[str, Any]) -> None:
    uri = location["physicalLocation"]["artifactLocation"]["uri"]
    assert uri.isascii()
    assert not set(uri) & set(' <>"{}|\\^`')
    region = location["physicalLocation"]["region"]
    assert all(type(number) is int and number >= 1 for number in region.values())
    if "endLine" in region:
        assert (region["endLine"], region["endColumn"]) >= (region["startLine"], region["startColumn"])


def test_every_part_has_what_the_specification_requires() -> None:
    run = run_of(FULL, *OTHERS)
    driver = run["tool"]["driver"]
    assert driver["name"] == "rankwise"
    assert run["columnKind"] in ("utf16CodeUnits", "unicodeCodePoints")
    assert len({rule["id"] for rule in driver["rules"]}) == len(driver["rules"]) == len(RULES) + 2
    assert len(run["results"]) == 4
    for result in run["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        for location in result["locations"]:
            check_location(location)


def test_levels_follow_the_severity() -> None:
    assert [result["level"] for result in run_of(FULL, *OTHERS)["results"]] == ["error", "warning", "note", "error"]


def test_paths_become_uris() -> None:
    uris = [
        result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        for result in run_of(FULL, *OTHERS)["results"]
    ]
    assert uris == ["dir/a%20b.py", "a.py", "a.py", "file:///abs/%FF.py"]
    assert unquote(uris[0]) == FULL.path


def test_the_way_of_the_value_is_a_code_flow_from_its_source_on() -> None:
    (result,) = run_of(FULL)["results"]
    steps = result["codeFlows"][0]["threadFlows"][0]["locations"]
    assert [step["location"]["message"]["text"] for step in steps] == ["rank <- dist.get_rank()", "device <- rank"]
    for step in steps:
        check_location(step["location"])


def test_a_fix_names_what_goes_and_what_comes() -> None:
    (result,) = run_of(FULL)["results"]
    (change,) = result["fixes"][0]["artifactChanges"]
    assert change["artifactLocation"]["uri"] == "dir/a%20b.py"
    assert change["replacements"] == [
        {
            "deletedRegion": {"startLine": 3, "startColumn": 5, "endLine": 3, "endColumn": 9},
            "insertedContent": {"text": "local_rank"},
        }
    ]


def test_the_fingerprint_stays_where_lines_move_and_tells_equal_findings_apart() -> None:
    def prints(*findings: Finding) -> list[str]:
        return [result["partialFingerprints"]["rankwiseCode/v1"] for result in run_of(*findings)["results"]]

    moved = Finding("RW303", "a.py", 50, 1, 50, 2, "warning", "it races")
    first, second = prints(*OTHERS[:2])
    assert first != second
    assert prints(moved) == [first]


def test_nothing_found_is_an_empty_list_of_results() -> None:
    assert run_of()["results"] == []
