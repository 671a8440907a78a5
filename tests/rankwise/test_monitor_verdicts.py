"""What the main process tells: one line for a person, about a rank, a node or several ranks; and when it is over."""

from __future__ import annotations

import pytest

from rankwise.monitor.probe import Link
from rankwise.monitor.statistics import Row
from rankwise.monitor.verdicts import MAX_EVENTS, MAX_OPEN_WINDOWS, Judge, Place
from rankwise.telemetry import Event, event_from_json, to_json


class Job:
    """A judge of `num_nodes` nodes of `per_node` ranks each, and rows for it."""

    def __init__(self, num_nodes: int, per_node: int, every_steps: int = 50) -> None:
        self.events: list[Event] = []
        self.num_probes = 0
        self.num_ranks = num_nodes * per_node
        self.number = 0
        places = [
            Place(f"node-{'abcdefgh'[rank // per_node]}", f"cuda:{rank % per_node}", rank // per_node)
            for rank in range(self.num_ranks)
        ]
        machines = [place.host for place in places]
        self.judge = Judge(places, machines, every_steps, self.events.append, self._probe)

    def _probe(self) -> None:
        self.num_probes += 1

    def window(self, slow: dict[int, float], phase: str = "data", *, without: tuple[int, ...] = ()) -> None:
        """Every rank's own time is 300 ms, but for `slow` ones; a step takes as long as the slowest's, and 28 ms."""
        step = 0.328 + max(slow.values(), default=0.0)
        for rank in range(self.num_ranks):
            if rank not in without:
                self.judge.put(rank, self.number, self.row(step, slow.get(rank, 0.0), phase))
        self.number += 1
        self.judge.poll(self.number * 50)

    @staticmethod
    def row(step: float, more: float, phase: str) -> Row:
        own = 0.3 + more
        phases = {"data": 0.05, "forward": 0.1, "backward": 0.15}
        phases[phase] = phases.get(phase, 0.0) + more
        told = {name: (seconds, 0.001) for name, seconds in phases.items()}
        return Row(step, own, 0.001, told | {"communication": (step - own, 0.001)})


def test_slow_rank_is_told_in_one_line() -> None:
    job = Job(2, 4)
    for _ in range(6):
        job.window({5: 0.084})
    (event,) = job.events
    assert event.message == (
        "rank 5 (node-b, cuda:1) holds the others up by 84 ms of 412 ms a step (20 %) in data, for 150 steps"
    )
    assert (event.kind, event.step, event.ranks, event.phase) == ("straggler", 150, (5,), "data")
    assert event.details == {
        "held_seconds": 0.084,
        "step_seconds": 0.412,
        "percent": 20.4,
        "num_steps": 150,
        "hosts": ["node-b"],
        "device": "cuda:1",
    }
    told = event_from_json(to_json(event))
    assert told is not None
    assert (told.message, list(told.ranks)) == (event.message, [5])


def test_end_is_told_with_how_long_it_was() -> None:
    job = Job(2, 4)
    for _ in range(8):
        job.window({5: 0.084})
    for _ in range(4):
        job.window({})
    assert [event.kind for event in job.events] == ["straggler", "straggler_over"]
    assert job.events[1].message == (
        "rank 5 (node-b, cuda:1) no longer holds the others up (data; it was so for 400 steps)"
    )


def test_whole_node_is_told_as_a_node() -> None:
    job = Job(4, 4)
    for _ in range(6):
        job.window(dict.fromkeys(range(4, 8), 0.1), "forward")
    (event,) = job.events
    assert event.message.startswith("node-b (ranks 4 to 7) holds the others up by 100 ms of 428 ms a step (23 %)")
    assert tuple(event.ranks) == (4, 5, 6, 7)
    for _ in range(4):
        job.window({})
    assert [event.kind for event in job.events] == ["straggler", "straggler_over"]


def test_one_node_of_all_is_told_rank_by_rank() -> None:
    job = Job(1, 4)
    for _ in range(6):
        job.window({2: 0.1, 3: 0.1})
    assert [tuple(event.ranks) for event in job.events] == [(2,), (3,)]


def test_many_slow_ranks_make_one_line() -> None:
    job = Job(8, 4)
    slow = {rank: 0.1 for rank in range(32) if rank % 3 == 0}
    for _ in range(6):
        job.window(slow)
    (event,) = job.events
    assert event.message.startswith("ranks 0, 3, 6, 9, 12, 15, 18, 21 and 3 more hold the others up by 100 ms")
    assert len(event.ranks) == 11 > MAX_EVENTS


def test_main_process_that_holds_all_up_is_told_like_any_rank() -> None:
    job = Job(2, 4)
    for _ in range(6):
        job.window({0: 0.3}, "checkpoint")
    assert job.events[0].message.startswith("rank 0 (node-a, cuda:0) holds the others up by 300 ms of 628 ms a step")
    assert job.events[0].phase == "checkpoint"


def test_window_waits_for_late_rows_but_not_without_end() -> None:
    job = Job(2, 4)
    job.window({5: 0.1}, without=(7,))
    assert job.judge.num_judged == 0
    for _ in range(MAX_OPEN_WINDOWS):
        job.window({5: 0.1}, without=(7,))
    assert job.judge.num_judged == 1
    for _ in range(5):
        job.window({5: 0.1}, without=(7,))
    assert [tuple(event.ranks) for event in job.events] == [(5,)]


def test_window_that_most_rows_lack_is_left_out() -> None:
    job = Job(2, 4)
    for _ in range(20):
        job.window({0: 0.1}, without=(1, 2, 3, 4, 5))
    assert job.judge.num_judged > 10
    assert job.events == []


def test_rows_that_come_too_late_or_from_nowhere_are_dropped() -> None:
    job = Job(1, 2)
    job.window({})
    row = job.row(0.4, 0.0, "data")
    for number, rank in ((0, 1), (10**9, 1), (-5, 0), (1, 7), (1, -1)):
        job.judge.put(rank, number, row)
    job.judge.poll(100)
    assert job.judge.num_judged == 1
    job.window({})
    assert job.judge.num_judged == 2


@pytest.mark.parametrize(("scale", "words"), [(0.01, "5 ms of 8.3 ms"), (100.0, "50.0 s of 82.8 s")])
def test_durations_are_told_in_a_unit_that_suits(scale: float, words: str) -> None:
    job = Job(1, 4)
    for number in range(4):
        for rank in range(4):
            row = job.row(0.828, 0.5 if rank == 1 else 0.0, "data")
            phases = {name: (scale * mean, scale * error) for name, (mean, error) in row.phases.items()}
            job.judge.put(rank, number, Row(scale * row.seconds, scale * row.own, scale * row.own_error, phases))
        job.judge.poll(number)
    assert f"holds the others up by {words} a step (60 %)" in job.events[0].message


def test_slow_network_is_told_with_its_numbers_and_its_end() -> None:
    job = Job(4, 1)

    def window(transfer: float) -> None:
        for rank in range(4):
            phases = {"data": (0.1, 0.001), "communication": (transfer, 0.001)}
            job.judge.put(rank, job.number, Row(0.1 + transfer, 0.1, 0.001, phases))
        job.number += 1
        job.judge.poll(job.number * 50)

    for _ in range(3):
        window(0.3)
    assert job.num_probes == 1
    for _ in range(2):
        assert job.events == []
        for rank in range(4):
            others = [peer for peer in range(4) if peer != rank]
            links = [Link(rank, peer, 0.12 if 3 in (rank, peer) else 0.002, 0.001) for peer in others]
            job.judge.put_links(rank, links)
        job.judge.poll(160)
    assert job.num_probes == 2
    (event,) = job.events
    assert event.message == (
        "the network of rank 3 (node-d, cuda:0) is slow: a transfer takes 120 ms, 2 ms between others; all ranks "
        "spend 75 % of each step in communication, and nobody is late"
    )
    assert (event.phase, tuple(event.ranks), event.details["num_steps"]) == ("communication", (3,), 150)
    for _ in range(3):
        window(0.01)
    assert [event.kind for event in job.events] == ["straggler", "straggler_over"]
    assert job.events[1].message.startswith("the network of rank 3 (node-d, cuda:0) is no longer slow")
