"""One rank's file as arrays: later steps count, half lines and strange values do no harm."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankwise.runreader import RankHistory, read_history
from rankwise.telemetry import End, Line, Start, Steps, Tick, to_json


def start(time: float = 0.0) -> Start:
    return Start(time, 3, 1, 1, 4, "node-b", 71, "cuda:1")


def tick(time: float, step: int, first: int, seconds: list[float], **more: Any) -> Tick:
    return Tick(time, step, None, 0.0, Steps(first, seconds, {"data": seconds}), **more)


def read(folder: Path, lines: Iterable[Line | str]) -> RankHistory:
    path = folder / "rank-00003.jsonl"
    path.write_text("".join((line if isinstance(line, str) else to_json(line)) + "\n" for line in lines))
    return read_history(path, 3)


def test_steps_of_all_ticks_come_in_order(tmp_path: Path) -> None:
    history = read(tmp_path, [start(), tick(1, 2, 1, [0.5, 0.4]), Tick(2, 2, "data", 0.7), tick(3, 3, 3, [1.5])])
    assert history.steps.tolist() == [1, 2, 3]
    assert history.seconds.tolist() == [0.5, 0.4, 1.5]
    assert history.times.tolist() == [1, 1, 3]
    assert history.sample_times.tolist() == [1, 2, 3]
    assert history.sample_steps.tolist() == [2, 2, 3]


def test_of_steps_made_twice_the_later_counts(tmp_path: Path) -> None:
    lines = [start(), tick(1, 3, 1, [1, 1, 1]), start(9), tick(10, 4, 2, [2, 2, 2])]
    history = read(tmp_path, lines)
    assert history.steps.tolist() == [1, 2, 3, 4]
    assert history.seconds.tolist() == [1, 2, 2, 2]
    assert history.sessions.tolist() == [0, 1, 1, 1]


def test_phases_that_some_steps_lack_are_zero_there(tmp_path: Path) -> None:
    lines = [
        tick(1, 2, 1, [1, 1]),
        Tick(2, 3, None, 0, Steps(3, [5], {"checkpoint": [4], "data": [1]})),
        tick(3, 4, 4, [1]),
    ]
    history = read(tmp_path, lines)
    assert history.phases["checkpoint"].tolist() == [0, 0, 4, 0]
    assert history.phases["data"].tolist() == [1, 1, 1, 1]


def test_readings_that_some_samples_lack_are_nan(tmp_path: Path) -> None:
    lines = [
        tick(1, 1, 1, [1], device={"utilisation_percent": 90}),
        tick(2, 2, 2, [1], device={"temperature_celsius": 70, "throttle_reasons": ["thermal"]}),
        tick(3, 3, 3, [1], device={"utilisation_percent": None}, process={"rss_gib": 2.5}),
    ]
    history = read(tmp_path, lines)
    np.testing.assert_array_equal(history.device["utilisation_percent"], [90, math.nan, math.nan])
    np.testing.assert_array_equal(history.device["temperature_celsius"], [math.nan, 70, math.nan])
    np.testing.assert_array_equal(history.process["rss_gib"], [math.nan, math.nan, 2.5])
    assert history.words == {"throttle_reasons": ((1, ("thermal",)),)}
    assert "throttle_reasons" not in history.device


def test_spans_tell_how_sessions_ended(tmp_path: Path) -> None:
    lines = [start(0), tick(5, 2, 1, [1, 1]), start(20), tick(21, 3, 3, [1]), End(22, 3)]
    spans = read(tmp_path, lines).spans
    assert [(span.first_time, span.last_time, span.last_step, span.ended) for span in spans] == [
        (0, 5, 2, False),
        (20, 22, 3, True),
    ]
    assert spans[0].start is not None
    assert spans[0].start.host == "node-b"


@pytest.mark.parametrize(
    "strange",
    [
        to_json(tick(2, 2, 2, [1]))[:40],
        "[1, 2]",
        "\x00\x00",
        '{"is": "tick"}',
        '{"is":"tick","time":"noon","step":2,"phase":null,"seconds":0}',
        json.dumps({"is": "tick", "time": 2, "step": 2, "phase": None, "seconds": 0, "device": 7}),
        json.dumps({"is": "tick", "time": 2, "step": 2, "phase": None, "seconds": 0, "process": [1]}),
        json.dumps({"is": "tick", "time": 2, "step": 2, "phase": None, "seconds": 0, "device": {"xid_errors": 4}}),
        json.dumps(
            {"is": "tick", "time": 2, "step": 2, "phase": None, "seconds": 0}
            | {"steps": {"first": 2, "seconds": [1, 2], "phases": {"data": [1]}}}
        ),
        json.dumps(
            {"is": "tick", "time": 2, "step": 2, "phase": None, "seconds": 0}
            | {"steps": {"first": -5, "seconds": [1], "phases": {}}}
        ),
        json.dumps(
            {"is": "tick", "time": 2, "step": 2, "phase": None, "seconds": 0}
            | {"steps": {"first": 2, "seconds": "abc", "phases": {}}}
        ),
    ],
)
def test_lines_of_another_shape_are_counted_and_add_nothing(tmp_path: Path, strange: str) -> None:
    history = read(tmp_path, [start(), tick(1, 1, 1, [1]), strange, tick(3, 2, 2, [4])])
    assert history.num_foreign == 1
    assert history.steps.tolist() == [1, 2]
    assert history.seconds.tolist() == [1, 4]
    assert history.sample_times.tolist() == [1, 3]


def test_value_that_is_no_number_is_nan_and_harms_no_other(tmp_path: Path) -> None:
    odd = {"is": "tick", "time": 2, "step": 2, "phase": None, "seconds": 0}
    odd |= {"steps": {"first": 2, "seconds": ["x"], "phases": {"data": [[1]]}}, "device": {"power_watts": "much"}}
    lines = [tick(1, 1, 1, [1], device={"power_watts": 300}), json.dumps(odd), tick(3, 3, 3, [4])]
    history = read(tmp_path, lines)
    np.testing.assert_array_equal(history.seconds, [1, math.nan, 4])
    np.testing.assert_array_equal(history.phases["data"], [1, math.nan, 4])
    np.testing.assert_array_equal(history.device["power_watts"], [300, math.nan, math.nan])


def test_empty_file_gives_empty_arrays(tmp_path: Path) -> None:
    history = read(tmp_path, [])
    assert (len(history.steps), len(history.seconds), len(history.sample_times), history.spans) == (0, 0, 0, ())
    assert history.start is None


def test_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_history(tmp_path / "rank-00000.jsonl", 0)
