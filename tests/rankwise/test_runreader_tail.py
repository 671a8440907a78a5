"""The newest state of each rank, as its file grows."""

import json
import os
from pathlib import Path

import pytest

from rankwise.errors import RankwiseError
from rankwise.runreader import Tail
from rankwise.telemetry import End, Event, Line, Start, Steps, Tick, events_path, monitor_path, to_json


class Clock:
    """Both clocks of the reader, which the test sets."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> float:
        return self.seconds + 1e9


def start(rank: int = 0) -> Start:
    return Start(0.0, rank, rank, 0, 2, "node-a", 7, f"cuda:{rank}")


def tick(step: int, count: int = 1, seconds: float = 0.5, **more: object) -> Tick:
    phases = {"data": [0.1] * count, "communication": [0.2] * count}
    return Tick(float(step), step, "data", 0.1, Steps(step - count + 1, [seconds] * count, phases), **more)  # type: ignore[arg-type]


def write(folder: Path, rank: int, *lines: Line | str) -> Path:
    path = monitor_path(folder, rank)
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.writelines(line if isinstance(line, str) else to_json(line) + "\n" for line in lines)
    return path


def tail_of(folder: Path, clock: Clock) -> Tail:
    return Tail(folder, monotonic=clock.monotonic, now=clock.now)


def test_newest_tick_is_the_state_and_recent_steps_the_pace(tmp_path: Path) -> None:
    write(tmp_path, 0, start(), tick(2, 2), tick(5, 3, seconds=0.25))
    state = Tail(tmp_path).look().states[0]
    assert state.tick is not None
    assert state.tick.step == 5
    assert (state.num_recent_steps, state.recent_seconds) == (5, pytest.approx(1.75))
    assert state.recent_phases == {"data": pytest.approx(0.5), "communication": pytest.approx(1.0)}
    assert state.own_seconds == pytest.approx(0.05)
    assert not state.ended


def test_lines_that_come_later_are_read_and_half_lines_waited_for(tmp_path: Path) -> None:
    path = write(tmp_path, 0, start(), tick(1))
    tail = Tail(tmp_path)
    assert step(tail) == 1
    whole = to_json(tick(2)) + "\n"
    write(tmp_path, 0, whole[:30])
    assert step(tail) == 1
    write(tmp_path, 0, whole[30:], tick(3), to_json(tick(4)))
    assert step(tail) == 3
    with path.open("a") as file:
        file.write("\n")
    assert step(tail) == 4


def step(tail: Tail, rank: int = 0) -> int | None:
    tick = tail.look().states[rank].tick
    return None if tick is None else tick.step


def test_age_is_counted_from_when_the_reader_saw_the_file_change(tmp_path: Path) -> None:
    clock = Clock()
    path = write(tmp_path, 0, start(), tick(1))
    os.utime(path, (clock.now() - 40, clock.now() - 40))
    tail = tail_of(tmp_path, clock)
    assert tail.look().states[0].age_seconds == pytest.approx(40)
    clock.seconds += 5
    assert tail.look().states[0].age_seconds == pytest.approx(45)
    write(tmp_path, 0, tick(2))
    # The writer's clock is an hour ahead, then an hour behind: that must not matter.
    os.utime(path, (clock.now() + 3600, clock.now() + 3600))
    assert tail.look().states[0].age_seconds == 0
    clock.seconds += 7
    assert tail.look().states[0].age_seconds == pytest.approx(7)
    write(tmp_path, 0, tick(3))
    os.utime(path, (clock.now() - 3600, clock.now() - 3600))
    assert tail.look().states[0].age_seconds == 0


def test_age_is_never_negative_where_the_file_systems_clock_is_ahead(tmp_path: Path) -> None:
    clock = Clock()
    path = write(tmp_path, 0, start())
    os.utime(path, (clock.now() + 50, clock.now() + 50))
    tail = tail_of(tmp_path, clock)
    assert tail.look().states[0].age_seconds == 0
    clock.seconds += 5
    assert tail.look().states[0].age_seconds == pytest.approx(5)


def test_end_line_and_new_start_change_the_state(tmp_path: Path) -> None:
    write(tmp_path, 0, start(), tick(9), End(9.5, 9))
    tail = Tail(tmp_path)
    assert tail.look().states[0].ended
    write(tmp_path, 0, start())
    state = tail.look().states[0]
    assert (state.tick, state.ended, state.num_recent_steps) == (None, False, 0)
    write(tmp_path, 0, tick(4))
    assert step(tail) == 4


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, 0, start(), *(tick(number) for number in range(1, 3000)))
    assert path.stat().st_size > 200_000
    with path.open("r+b") as file:
        file.write(b"\xff" * 1000)  # what is at the beginning is not looked at
    state = Tail(tmp_path).look().states[0]
    assert state.tick is not None
    assert state.tick.step == 2999
    assert state.num_recent_steps == 15


def test_line_longer_than_the_first_read_is_found(tmp_path: Path) -> None:
    write(tmp_path, 0, start(), tick(1), tick(3000, 2999))
    state = Tail(tmp_path).look().states[0]
    assert state.num_recent_steps == 3000


def test_file_that_was_replaced_by_a_shorter_one_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path, 0, start(), tick(50), tick(51))
    tail = Tail(tmp_path)
    assert step(tail) == 51
    path.unlink()
    write(tmp_path, 0, start(), tick(1))
    assert step(tail) == 1


def test_lines_that_are_none_of_ours_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, 0, start(), tick(1), '{"is":"tick","step":"x"}\n', "garbage\n", '{"is":"tick","time":0}\n')
    odd = {"is": "tick", "time": 1, "step": 2, "phase": None, "seconds": 0}
    odd["steps"] = {"first": 2, "seconds": ["a"], "phases": {}}
    write(tmp_path, 0, json.dumps(odd) + "\n")
    tail = Tail(tmp_path)
    assert step(tail) == 2
    assert tail.look().states[0].num_recent_steps == 1


def test_new_ranks_are_found_and_ranks_of_an_earlier_size_left_out(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"ranks": [{"rank": 0}, {"rank": 1}]}))
    write(tmp_path, 0, start(), tick(1))
    write(tmp_path, 7, start(7), tick(1))
    tail = Tail(tmp_path)
    assert list(tail.look().states) == [0]
    write(tmp_path, 1, start(1), tick(1))
    assert list(tail.look().states) == [0, 1]


@pytest.mark.parametrize("text", ["1e999", "1" + "0" * 400, "NaN", "null", '"long"'])
def test_steps_of_no_reasonable_length_count_for_nothing(tmp_path: Path, text: str) -> None:
    write(tmp_path, 0, start(), tick(1))
    with monitor_path(tmp_path, 0).open("a") as file:
        steps = f'{{"first":2,"seconds":[{text}],"phases":{{"data":[{text}]}}}}'
        file.write(f'{{"is":"tick","time":2.0,"step":2,"phase":null,"seconds":0.0,"steps":{steps}}}\n')
    state = Tail(tmp_path).look().states[0]
    assert state.tick is not None
    assert (state.tick.step, state.num_recent_steps) == (2, 1)


def test_without_run_json_new_ranks_tell_their_places(tmp_path: Path) -> None:
    write(tmp_path, 0, start())
    tail = Tail(tmp_path)
    assert list(tail.look().rows) == [0]
    write(tmp_path, 1, start(1))
    look = tail.look()
    assert (list(look.states), look.rows[1]["device"]) == ([0, 1], "cuda:1")


def tell(folder: Path, *events: Event) -> None:
    path = events_path(folder, 0)
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.writelines(to_json(event) + "\n" for event in events)


def test_stragglers_and_hangs_are_open_until_they_are_over(tmp_path: Path) -> None:
    write(tmp_path, 0, start())
    tail = Tail(tmp_path)
    tell(tmp_path, Event("straggler", 5, 1, "slow", [3]), Event("hang", 6, 1, "stuck", [1, 2]))
    look = tail.look()
    assert (list(look.stragglers), list(look.hangs)) == ([3], [1, 2])
    tell(tmp_path, Event("straggler_over", 7, 2, "well", [3]), Event("hang_over", 8, 2, "on", [1]))
    look = tail.look()
    assert (list(look.stragglers), list(look.hangs)) == ([], [2])
    assert [event.message for event in look.events] == ["slow", "stuck", "well", "on"]


def test_what_was_open_before_the_newest_start_is_over(tmp_path: Path) -> None:
    info = {"started": "2026-01-01T00:00:00+00:00", "ranks": [{"rank": 0}]}
    (tmp_path / "run.json").write_text(json.dumps(info))
    begun = 1767225600.0
    tell(tmp_path, Event("hang", begun - 60, 1, "then", [0]), Event("straggler", begun + 60, 1, "now", [0]))
    tail = Tail(tmp_path)
    look = tail.look()
    assert (list(look.hangs), list(look.stragglers)) == ([], [0])
    (tmp_path / "run.json").write_text(json.dumps(info | {"started": "2026-01-02T00:00:00+00:00"}))
    assert list(tail.look().stragglers) == []


def test_what_is_no_run_is_said_and_so_is_one_that_vanishes(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match="is no run directory"):
        Tail(tmp_path)
    run = tmp_path / "run"
    (run / "monitor").mkdir(parents=True)
    tail = Tail(run)
    assert tail.look().states == {}
    (run / "monitor").rmdir()
    assert tail.look().states == {}
    run.rmdir()
    with pytest.raises(RankwiseError, match="is gone"):
        tail.look()
