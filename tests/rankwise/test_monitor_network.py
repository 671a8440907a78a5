"""The network is measured when communication is long and nobody is late, and not over and over."""

from __future__ import annotations

import pytest

from rankwise.monitor import network
from rankwise.monitor.network import NetworkWatch
from rankwise.monitor.probe import Link

MACHINES = ["a", "b", "c", "d"]


class Job:
    """Counts how often links were to be measured, and answers for all ranks."""

    def __init__(self, slow: int | None = None) -> None:
        self.num_probes = 0
        self.slow = slow
        self.watch = NetworkWatch(MACHINES, self._begin)

    def _begin(self) -> None:
        self.num_probes += 1

    def answer(self, ranks: range = range(4)) -> None:
        for rank in ranks:
            links = [
                Link(rank, peer, 0.1 if self.slow in (rank, peer) else 0.001, 0.0001)
                for peer in range(4)
                if peer != rank
            ]
            self.watch.put(rank, links)

    def suspect(self) -> None:
        """The first of two measurements that find the same."""
        self.answer()
        assert self.watch.poll() is None

    def windows(self, num: int, transfer_seconds: float = 0.5, *, is_somebody_late: bool = False) -> None:
        for _ in range(num):
            self.watch.add(1.0, transfer_seconds, is_somebody_late)


def test_long_communication_is_measured_after_three_windows() -> None:
    job = Job()
    job.windows(2)
    assert job.num_probes == 0
    job.windows(1)
    assert job.num_probes == 1


def test_nothing_is_measured_where_a_rank_is_late_or_communication_is_short() -> None:
    job = Job()
    job.windows(20, is_somebody_late=True)
    job.windows(20, 0.1)
    assert job.num_probes == 0


def test_slow_rank_is_told_once_and_taken_back_when_communication_is_short_again() -> None:
    job = Job(slow=2)
    job.windows(3)
    assert job.watch.poll() is None
    job.answer(range(3))
    job.suspect()
    assert not job.watch.is_alarmed
    job.answer()
    found = job.watch.poll()
    assert found is not None
    assert found.ranks == [2]
    assert job.watch.is_alarmed
    job.windows(10)
    job.answer()
    assert (job.num_probes, job.watch.poll()) == (3, None)
    assert job.watch.is_alarmed
    job.windows(3, 0.05)
    assert not job.watch.is_alarmed


def test_other_ranks_in_the_second_measurement_are_no_alarm() -> None:
    job = Job(slow=2)
    job.windows(3)
    job.suspect()
    job.slow = 3
    job.suspect()
    job.slow = None
    job.answer()
    assert job.watch.poll() is None
    assert not job.watch.is_alarmed


def test_alarm_is_taken_back_when_the_links_are_well_again() -> None:
    job = Job(slow=2)
    job.windows(3)
    job.suspect()
    job.answer()
    assert job.watch.poll() is not None
    job.slow = None
    job.windows(10)
    job.answer()
    assert job.watch.poll() is None
    assert not job.watch.is_alarmed


def test_job_that_always_communicates_long_is_measured_ever_more_seldom() -> None:
    job = Job()
    for _ in range(1000):
        job.windows(1)
        job.answer()
        assert job.watch.poll() is None
    assert 4 <= job.num_probes <= 8


def test_communication_that_grows_is_measured_at_once() -> None:
    job = Job()
    job.windows(3, 0.3)
    job.answer()
    job.watch.poll()
    job.windows(5, 0.3)
    assert job.num_probes == 1
    job.windows(1, 0.6)
    assert job.num_probes == 2


def test_rank_that_does_not_answer_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "ANSWER_SECONDS", 0.0)
    job = Job(slow=2)
    job.windows(3)
    job.answer(range(3))
    assert job.watch.poll() is None
    job.answer(range(3))
    found = job.watch.poll()
    assert found is not None
    assert found.ranks == [2]
