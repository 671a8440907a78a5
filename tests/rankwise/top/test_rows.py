"""What is said of each rank and of the job."""

import json
import os
import time
from typing import Any

import pytest

from rankwise.runreader import Tail
from rankwise.telemetry import End, monitor_path
from rankwise.top.rows import Snapshot, make_snapshot


def snapshot(maker: Any) -> Snapshot:
    return make_snapshot(str(maker.folder), Tail(maker.folder).look())


def test_row_has_what_its_rank_told(four: Any) -> None:
    row = snapshot(four).rows[2]
    assert (row.rank, row.host, row.device, row.step) == (2, "node-b", "cuda:2", 9)
    assert row.steps_per_second == pytest.approx(2.0)
    assert row.phases["data"] == pytest.approx(0.1)
    assert (row.utilisation_percent, row.memory_used_gib, row.temperature_celsius) == (92, 40.2, 91)
    assert row.own_seconds == pytest.approx(0.4)
    assert row.age_seconds is not None


def test_lag_is_counted_from_the_foremost(four: Any) -> None:
    assert [row.lag_steps for row in snapshot(four).rows] == [0, 0, 0, 1]


def test_rank_with_most_to_do_is_named_as_slowest(four: Any) -> None:
    assert snapshot(four).slowest == "rank 1 (node-a, cuda:1): 80 ms a step more to do than most"


def test_nobody_is_named_where_all_have_as_much_to_do(maker: Any) -> None:
    for rank in range(4):
        maker.start(rank)
        # One that has just validated is not slow.
        for step in range(1, 9):
            maker.tick(rank, step)
    maker.tick(3, 9, phases={"data": 0.05, "validation": 5.0})
    assert snapshot(maker).slowest is None


def test_of_two_ranks_the_slower_one_is_named_with_all_of_its_delay(maker: Any) -> None:
    for rank, data in ((0, 0.05), (1, 0.15)):
        maker.start(rank)
        maker.tick(rank, 1, phases={"data": data, "backward": 0.2, "communication": 0.16 - data})
    assert snapshot(maker).slowest == "rank 1 (node-a, cuda:1): 100 ms a step more to do than most"


def test_straggler_that_was_told_is_the_slowest(four: Any) -> None:
    four.event("straggler", 3, "rank 3 is slow")
    found = snapshot(four)
    assert found.slowest == "rank 3 (told as straggler)"
    assert found.rows[3].marks == ("straggler",)


def test_marks_say_the_worst_first(four: Any) -> None:
    four.event("hang", 2, "rank 2 is stuck")
    four.tick(2, 10, device={"temperature_celsius": 91, "throttle_reasons": ["thermal"]})
    assert snapshot(four).rows[2].marks == ("hang", "throttled", "hot")


def test_rank_that_fell_silent_is_stale_and_a_silent_run_is_said(four: Any) -> None:
    old = time.time() - 60
    os.utime(monitor_path(four.folder, 1), (old, old))
    found = snapshot(four)
    assert [row.marks for row in found.rows] == [(), ("stale",), ("hot",), ()]
    assert found.state == "running"
    for rank in range(4):
        os.utime(monitor_path(four.folder, rank), (old, old))
    assert snapshot(four).state == "silent"


def test_ended_ranks_are_neither_stale_nor_hot(four: Any) -> None:
    old = time.time() - 60
    for rank in range(4):
        four.append(rank, End(10.0, 9))
        os.utime(monitor_path(four.folder, rank), (old, old))
    found = snapshot(four)
    assert [row.marks for row in found.rows] == [("ended",)] * 4
    assert (found.state, found.slowest, found.remaining_seconds) == ("ended", None, None)


def test_rank_in_one_phase_for_long_is_stuck(four: Any) -> None:
    four.tick(0, 10, phase="data", seconds=9.0)
    four.tick(1, 10, phase="data", seconds=11.0)
    assert [row.is_stuck for row in snapshot(four).rows] == [False, True, False, False]


def test_long_steps_are_not_taken_for_stuck(maker: Any) -> None:
    maker.start(0)
    maker.tick(0, 1, phases={"forward": 30.0}, seconds=100.0)
    maker.tick(0, 2, phases={"forward": 30.0}, seconds=100.0)
    assert not snapshot(maker).rows[0].is_stuck
    maker.tick(0, 3, phases={"forward": 30.0}, seconds=160.0)
    assert snapshot(maker).rows[0].is_stuck


def test_remaining_time_comes_from_the_slowest_rank_and_the_usual_pace(four: Any) -> None:
    (four.folder / "config.json").write_text(json.dumps({"num_steps": 108}))
    found = snapshot(four)
    assert (found.step, found.num_steps) == (8, 108)
    assert found.remaining_seconds == pytest.approx(50)


def test_ranks_of_run_json_without_a_file_are_rows_without_numbers(four: Any) -> None:
    rows = [{"rank": rank, "host": "node-z", "device": "cpu"} for rank in range(5)]
    info = {"ranks": rows, "world_size": 5, "num_nodes": 1, "job_id": "77"}
    (four.folder / "run.json").write_text(json.dumps(info))
    found = snapshot(four)
    assert (found.world_size, found.num_nodes, found.job_id) == (5, 1, "77")
    assert (found.rows[4].host, found.rows[4].step, found.rows[4].age_seconds, found.rows[4].marks) == (
        "node-z",
        None,
        None,
        (),
    )


def test_before_the_first_line_the_run_is_waited_for(maker: Any) -> None:
    found = snapshot(maker)
    assert (found.state, found.rows, found.step) == ("waiting", (), None)


def test_readings_that_are_no_numbers_are_not_known(maker: Any) -> None:
    maker.start(0)
    maker.tick(0, 1, device={"utilisation_percent": "all", "temperature_celsius": True}, process={"rss_gib": None})
    row = snapshot(maker).rows[0]
    assert (row.utilisation_percent, row.temperature_celsius, row.rss_gib) == (None, None, None)


def test_full_load_is_no_throttling(maker: Any) -> None:
    for rank, reasons in enumerate(([], ["power"], ["power", "thermal"], ["0x800"], "thermal")):
        maker.start(rank)
        maker.tick(rank, 1, device={"throttle_reasons": reasons})
    assert [row.marks for row in snapshot(maker).rows] == [(), (), ("throttled",), (), ()]
