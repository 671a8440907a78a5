import json
import logging
import math
import threading
from pathlib import Path

import pytest

from rankwise import telemetry
from rankwise.monitor.phases import FinishedStep
from rankwise.monitor.recorder import Recorder, batches
from rankwise.telemetry import End, Event, Tick


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_lines_and_events_have_files_of_their_rank(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 3)
    recorder.write([Tick(1.0, 2, "data", 0.5), End(2.0, 2)])
    recorder.event(Event("hang", 3.0, 2, "rank 3 hangs", (3,)))
    tick, end = map(telemetry.from_json, lines_of(tmp_path / "monitor" / "rank-00003.jsonl"))
    assert isinstance(tick, Tick)
    assert (tick.step, tick.phase) == (2, "data")
    assert isinstance(end, End)
    (event,) = map(telemetry.event_from_json, lines_of(tmp_path / "events" / "rank-00003.jsonl"))
    assert event is not None
    assert event.message == "rank 3 hangs"


def test_the_half_line_of_a_killed_run_is_ended(tmp_path: Path) -> None:
    path = telemetry.monitor_path(tmp_path, 0)
    path.parent.mkdir()
    path.write_text('{"is":"tick","ti')
    Recorder(tmp_path, 0).write([End(2.0, 2)])
    assert [telemetry.from_json(line) is None for line in lines_of(path)] == [True, False]


def test_without_a_run_directory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recorder = Recorder(None, 0)
    recorder.write([End(2.0, 2)])
    recorder.event(Event("hang", 3.0, 2, "rank 3 hangs"))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_is_told_once_and_lines_come_again_when_it_takes_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "monitor").write_text("a file where the folder should be")
    recorder = Recorder(tmp_path, 0)
    with caplog.at_level(logging.WARNING):
        recorder.write([End(1.0, 1)])
        recorder.write([End(2.0, 2)])
    (record,) = caplog.records
    assert "no longer complete" in record.getMessage()
    assert "Training goes on" in record.getMessage()
    (tmp_path / "monitor").unlink()
    recorder.write([End(3.0, 3)])
    assert [json.loads(line)["step"] for line in lines_of(telemetry.monitor_path(tmp_path, 0))] == [3]


def test_lines_of_several_threads_stay_whole(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    event = Event("device", 0.0, 0, "x" * 5000)

    def tell() -> None:
        for _ in range(20):
            recorder.event(event)

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [telemetry.event_from_json(line) for line in lines_of(telemetry.events_path(tmp_path, 0))]
    assert found == [telemetry.event_from_json(telemetry.to_json(event))] * 80


def test_steps_without_a_gap_are_one_batch() -> None:
    steps = [FinishedStep(4, 3.0, {"data": 1.0, "other": 2.0}), FinishedStep(5, 2.0, {"other": 2.0})]
    (batch,) = batches(steps)
    assert (batch.first, list(batch.seconds)) == (4, [3.0, 2.0])
    assert batch.phases == {"data": [1.0, 0.0], "other": [2.0, 2.0]}


def test_a_gap_and_a_step_back_begin_a_new_batch() -> None:
    steps = [FinishedStep(number, 1.0, {}) for number in (1, 2, 4, 3, 4)]
    assert [(batch.first, len(batch.seconds)) for batch in batches(steps)] == [(1, 2), (4, 1), (3, 2)]
    assert batches([]) == []


def test_the_shares_of_a_batch_add_up_to_its_steps() -> None:
    steps = [FinishedStep(1, 0.3, {"data": 0.1, "other": 0.2}), FinishedStep(2, 0.5, {"forward": 0.5})]
    (batch,) = batches(steps)
    for index, seconds in enumerate(batch.seconds):
        assert math.isclose(sum(values[index] for values in batch.phases.values()), seconds)
