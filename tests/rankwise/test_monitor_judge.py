"""The main process's judgement, on beats made by hand; and what a stand-in does while the main process is silent."""

import os
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rankwise.errors import RankFailure
from rankwise.monitor import judge as judge_module
from rankwise.monitor import standin as standin_module
from rankwise.monitor.blame import Row
from rankwise.monitor.judge import Judge
from rankwise.monitor.standin import StandIn
from rankwise.monitor.testimony import Order
from rankwise.parent import start_time
from rankwise.store import machine
from rankwise.telemetry import Event


class Voice:
    """Keeps what a watchdog would say and do."""

    silence_seconds = 5.0
    ends = False

    def __init__(self, run_dir: Path | None = None, rank: int = 0) -> None:
        self.first: RankFailure | None = None
        self.session: Any = SimpleNamespace(
            identity=SimpleNamespace(world_size=3, rank=rank),
            run_dir=run_dir,
            token="t0ken",
            first_failure=lambda timeout_seconds: self.first,
        )
        self.told: list[Event] = []
        self.declared: list[tuple[Event, Order, bool]] = []

    def declare(self, event: Event, order: Order, *, say: bool) -> None:
        self.declared.append((event, order, say))

    def tell(self, event: Event) -> None:
        self.told.append(event)

    def over(self) -> None:
        pass


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(judge_module, "tell_others", lambda topic, content: said.append(content))
    return said


def row(rank: int, idle_seconds: float, **told: Any) -> Row:
    default: dict[str, Any] = {"step": 5, "phase": "forward", "limit_seconds": 60.0, "machine": "a", "pid": 100 + rank}
    return Row(rank, idle_seconds=idle_seconds, **default | told)


def beat(judge: Judge, told: Row, seconds_ago: float = 0.0) -> None:
    judge.hear(told.rank, {"beat": asdict(told)})
    kept, heard = judge._rows[told.rank]
    judge._rows[told.rank] = kept, heard - seconds_ago


def test_first_beat_is_told_from_the_next() -> None:
    judge = Judge(Voice())
    assert judge.hear(1, {"beat": asdict(row(1, 0.0))})
    assert not judge.hear(1, {"beat": asdict(row(1, 0.0))})


def test_hang_is_declared_once_and_its_end_too(sent: list[dict[str, Any]], tmp_path: Path) -> None:
    voice = Voice(tmp_path)
    judge, now = Judge(voice), time.monotonic()
    for rank in (1, 2):
        beat(judge, row(rank, 61.0, waits=rank == 2, number=7))
    own = row(0, 61.0, waits=True)
    for _ in range(4):
        judge.turn(now, own)
    ((event, order, say),) = voice.declared
    assert (event.kind, event.ranks, event.phase, say) == ("hang", (1,), "forward", False)
    assert event.details["causes"][0]["pid"] == 101
    assert order.causes == (1,)
    assert Order.of(sent[-1]["order"]) == order
    beat(judge, row(1, 0.1, number=8))
    judge.turn(now + 3, own)
    assert [event.message for event in voice.told] == ["rank 1 goes on after 64 s without progress"]
    assert sent[-1] == {"over": 1}


def test_rank_without_beats_is_asked_of_a_peer_of_its_machine_before_it_is_blamed(sent: list[dict[str, Any]]) -> None:
    voice = Voice()
    judge, now = Judge(voice), time.monotonic()
    beat(judge, row(1, 1.0, machine="b"), seconds_ago=62.0)
    beat(judge, row(2, 61.0, waits=True, machine="b"))
    own = row(0, 61.0, waits=True)
    judge.turn(now, own)
    assert sent == [{"look": {"1": {"reporter": 2, "pid": 101, "started": None, "rank": 1}}}]
    judge.turn(now + 1, own)
    assert voice.declared == []
    judge.hear(2, {"facts": {"1": {"state": "T", "tracer": 0}}})
    judge.turn(now + 2, own)
    ((event, order, _),) = voice.declared
    assert "rank 1 (pid 101) was last in forward of step 6, stopped by a signal" in event.message
    assert order.deaf == {"1": {"reporter": 2, "pid": 101, "started": None}}


def test_rank_of_which_no_peer_tells_is_blamed_after_a_while(sent: list[dict[str, Any]]) -> None:
    voice = Voice()
    judge, now = Judge(voice), time.monotonic()
    beat(judge, row(1, 1.0, machine="b"), seconds_ago=62.0)
    beat(judge, row(2, 61.0, waits=True, machine="b"))
    for seconds in (0, 4, 6):
        own = row(0, 61.0 + seconds, waits=True)
        judge._rows[2] = judge._rows[2][0], now + seconds
        judge.turn(now + seconds, own)
    assert "rank 1 (pid 101) was last in forward of step 6, and does not answer" in voice.declared[0][0].message


def test_rank_held_by_a_debugger_is_not_blamed(sent: list[dict[str, Any]]) -> None:
    voice = Voice()
    judge, now = Judge(voice), time.monotonic()
    beat(judge, row(1, 1.0, machine="b"), seconds_ago=62.0)
    beat(judge, row(2, 61.0, waits=True, machine="b"))
    judge.turn(now, row(0, 61.0, waits=True))
    judge.hear(2, {"facts": {"1": {"state": "t", "tracer": 9}}})
    for seconds in range(1, 4):
        judge.turn(now + seconds, row(0, 61.0, waits=True))
        judge.hear(2, {"facts": {"1": {"state": "t", "tracer": 9}}})
    assert voice.declared == []


def test_after_a_failure_nothing_is_declared(sent: list[dict[str, Any]]) -> None:
    voice = Voice()
    voice.first = RankFailure(1, "there", "RankLost", "gone")
    judge = Judge(voice)
    for rank in (1, 2):
        beat(judge, row(rank, 70.0))
    for seconds in range(3):
        judge.turn(time.monotonic() + seconds, row(0, 70.0))
    assert voice.declared == []


def test_ranks_that_were_not_heard_while_this_process_slept_are_not_silent(sent: list[dict[str, Any]]) -> None:
    voice = Voice()
    judge, now = Judge(voice), time.monotonic()
    for rank in (1, 2):
        beat(judge, row(rank, 1.0), seconds_ago=100.0)
    judge.wake(now)
    for seconds in range(3):
        judge.turn(now + seconds, row(0, float(seconds)))
    assert voice.declared == []


def test_rank_that_never_spoke_is_the_failure_that_the_job_would_end_with(sent: list[dict[str, Any]]) -> None:
    voice = Voice()
    judge, now = Judge(voice), time.monotonic()
    beat(judge, row(2, 61.0, waits=True))
    for seconds in range(2):
        judge.turn(now + seconds, row(0, 61.0, waits=True))
    ((event, order, _),) = voice.declared
    assert event.ranks == (1,)
    assert order.failure["rank"] == 1


def silent_main(standin: StandIn, **told: Any) -> None:
    """Let the main process have been silent for 70 seconds."""
    standin.hear(row(0, 0.5, **told))
    assert standin._main is not None
    standin._main = standin._main[0], time.monotonic() - 70.0


def stuck(rank: int) -> Row:
    return row(rank, 65.0, waits=True, phase="communication")


def act(standin: StandIn, own: Row) -> None:
    now = time.monotonic()
    standin.turn(now, own)
    standin.turn(now + 10, own)
    for thread in [thread for thread in standin_module.threading.enumerate() if thread.name == "rankwise-standin"]:
        thread.join(30)


def test_one_of_those_that_stand_in_speaks_and_all_write_in_one_folder(tmp_path: Path) -> None:
    voices = [Voice(tmp_path, rank) for rank in (1, 2)]
    for voice in voices:
        standin = StandIn(voice)
        silent_main(standin, pid=os.getpid(), started=start_time(os.getpid()), machine=machine())
        act(standin, stuck(voice.session.identity.rank))
    (first, first_order, first_says), (second, second_order, second_says) = (voice.declared[0] for voice in voices)
    assert (first_says, second_says) == (True, False)
    assert re.match(r"no progress for 8\d s: rank 0 \(pid \d+\) was last in forward", first.message)
    assert "; rank 1, which tells it, waits in communication of step 6. Stacks: " in first.message
    assert second.message == ""
    assert first_order.folder == second_order.folder
    assert first_order.deaf["0"]["pid"] == os.getpid()
    assert first_order.alone


@pytest.mark.parametrize(("rank", "speaks"), [(1, True), (2, False)])
def test_without_a_run_directory_rank_one_speaks(rank: int, speaks: bool) -> None:
    voice = Voice(None, rank)
    standin = StandIn(voice)
    silent_main(standin)
    act(standin, stuck(rank))
    assert [say for _, _, say in voice.declared] == [speaks]


@pytest.mark.parametrize(("waits", "blamed"), [(False, 1), (True, 0)])
def test_main_process_that_left_is_blamed_by_those_alone_that_wait(waits: bool, blamed: int) -> None:
    voice = Voice(rank=1)
    standin = StandIn(voice)
    silent_main(standin, left=True)
    act(standin, replace(stuck(1), waits=waits))
    ((event, order, _),) = voice.declared
    assert (event.ranks, order.causes, order.failure["rank"]) == ((blamed,), (blamed,), blamed)
    assert event.details["idle_seconds"] > 60.0
    assert ("left the loop" in event.message) is waits
    assert event.message.split(": ", 1)[1].startswith(f"rank {blamed} ")


def test_nobody_stands_in_for_a_main_process_that_beats_or_may_take_its_time(tmp_path: Path) -> None:
    voice = Voice(tmp_path, 1)
    standin = StandIn(voice)
    act(standin, stuck(1))  # never heard of: it has no watchdog
    standin.hear(row(0, 100.0))
    standin.turn(time.monotonic(), stuck(1))
    silent_main(standin, limit_seconds=600.0)
    act(standin, stuck(1))
    silent_main(standin)
    act(standin, replace(stuck(1), idle_seconds=1.0))
    act(standin, replace(stuck(1), left=True))
    assert voice.declared == []


def test_end_of_a_hang_of_the_main_process_is_told_by_who_told_the_hang(tmp_path: Path) -> None:
    voices = [Voice(tmp_path, rank) for rank in (1, 2)]
    for voice in voices:
        standin = StandIn(voice)
        silent_main(standin)
        act(standin, stuck(voice.session.identity.rank))
        standin.hear(row(0, 0.1))
        standin.turn(time.monotonic(), row(voice.session.identity.rank, 0.1))
    assert [[event.kind for event in voice.told] for voice in voices] == [["hang_over"], []]
    assert re.match(r"rank 0 goes on after 8\d s without progress", voices[0].told[0].message)
