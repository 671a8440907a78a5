"""What a rank tells of itself comes back from its file as it was written, and half a line is none."""

import json
import math
from pathlib import Path

import pytest

from rankwise.telemetry import (
    End,
    Event,
    Line,
    Start,
    Steps,
    Tick,
    event_from_json,
    events_path,
    from_json,
    monitor_path,
    to_json,
)

START = Start(1.5, 3, 1, 1, 8, "node-b", 77, "cuda:1", device_name="H100", device_uuid="GPU-1", clock="device")
STEPS = Steps(101, [0.25, 0.5], {"data": [0.125, 0.25], "other": [0.125, 0.25]})
TICK = Tick(2.5, 102, "forward", 0.25, STEPS, {"power_watts": 300.5, "throttle_reasons": ["thermal"]}, {"rss_gib": 2})


@pytest.mark.parametrize("line", [START, TICK, Tick(2.5, 0, None, 0.0), End(9.0, 102)])
def test_line_comes_back_as_it_was(line: Line) -> None:
    text = to_json(line)
    assert "\n" not in text
    assert text.isascii()
    assert from_json(text) == line


def test_event_comes_back_as_it_was() -> None:
    event = Event("straggler", 3.0, 40, "rank 3 is slow: é", [3], "data", {"excess_seconds": 0.1})
    assert event_from_json(to_json(event)) == event


def test_times_are_kept_to_the_microsecond() -> None:
    line = from_json(to_json(Tick(1.0, 1, None, 0.0, Steps(1, [1 / 3], {"other": [2 / 3]}))))
    assert isinstance(line, Tick)
    assert line.steps == Steps(1, [0.333333], {"other": [0.666667]})


def test_numbers_that_json_lacks_become_null() -> None:
    told = json.loads(to_json(Tick(1.0, 1, None, 0.0, device={"power_watts": math.nan, "xid_errors": [math.inf]})))
    assert told["device"] == {"power_watts": None, "xid_errors": [None]}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"is":"tick"}', '{"is":"later"}', to_json(TICK)[:-5], b"\xff", "[" * 100_000]
)
def test_what_is_no_line_is_none(text: str | bytes) -> None:
    assert from_json(text) is None
    assert event_from_json(text) is None


def test_fields_of_a_later_version_are_passed_over() -> None:
    told = json.loads(to_json(START)) | {"invented": 1}
    assert from_json(json.dumps(told)) == START


def test_paths_sort_by_rank() -> None:
    assert monitor_path(Path("run"), 7) == Path("run/monitor/rank-00007.jsonl")
    assert events_path(Path("run"), 10_239) == Path("run/events/rank-10239.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        {"time": None},
        {"time": math.inf},
        {"time": 10**400},
        {"step": -1},
        {"step": 2**60},
        {"step": True},
        {"phase": ["data"]},
        {"seconds": "long"},
        {"seconds": math.nan},
        {"device": []},
        {"process": 5},
    ],
)
def test_line_with_a_field_of_another_kind_is_none(change: dict[str, object]) -> None:
    assert from_json(json.dumps(json.loads(to_json(TICK)) | change)) is None


def test_fields_of_a_later_version_are_passed_over_within_steps_too() -> None:
    told = json.loads(to_json(TICK))
    told["steps"]["invented"] = 1
    assert from_json(json.dumps(told)) == TICK
