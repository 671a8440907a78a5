import importlib.util
import logging
import math
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rankwise
from rankwise import monitor as current_monitor
from rankwise import telemetry
from rankwise.errors import RankwiseError
from rankwise.monitor import current
from rankwise.monitor.monitor import Monitor
from rankwise.session import Session
from rankwise.telemetry import End, Event, Start, Tick
from rankwise.testing import on_ranks


def lines_of(run_dir: Path, rank: int = 0) -> list[telemetry.Line]:
    found = [telemetry.from_json(line) for line in telemetry.monitor_path(run_dir, rank).read_text().splitlines()]
    return [line for line in found if line is not None]


def events_of(run_dir: Path, rank: int = 0) -> list[Event]:
    path = telemetry.events_path(run_dir, rank)
    found = map(telemetry.event_from_json, path.read_text().splitlines() if path.exists() else [])
    return [event for event in found if event is not None]


def steps_of(run_dir: Path, rank: int = 0) -> dict[int, dict[str, float]]:
    """Phases by step; where one comes twice the later counts."""
    steps = {}
    for line in lines_of(run_dir, rank):
        if isinstance(line, Tick) and line.steps is not None:
            for index, seconds in enumerate(line.steps.seconds):
                phases = {name: values[index] for name, values in line.steps.phases.items()}
                steps[line.steps.first + index] = {"seconds": seconds, **phases}
    return steps


def test_a_run_leaves_its_steps_and_phases(tmp_path: Path) -> None:
    with rankwise.init(tmp_path) as session, rankwise.Monitor(session) as monitor:
        for _ in range(3):
            with monitor.phase("data"):
                time.sleep(0.02)
            with monitor.phase("backward"):
                with monitor.phase("communication"):
                    time.sleep(0.03)
                time.sleep(0.01)
            monitor.step()
    first, *_, end = lines_of(tmp_path)
    assert isinstance(first, Start)
    assert (first.clock, first.device) == ("host", "cpu")
    assert isinstance(end, End)
    assert end.step == 3
    steps = steps_of(tmp_path)
    assert sorted(steps) == [1, 2, 3]
    for step in steps.values():
        assert step["data"] >= 0.02
        assert step["communication"] >= 0.03
        assert 0.01 <= step["backward"] < step["seconds"] - 0.05
        parts = sum(value for name, value in step.items() if name != "seconds")
        assert math.isclose(parts, step["seconds"], abs_tol=1e-4)


def test_a_resumed_run_goes_on_with_its_numbers(tmp_path: Path) -> None:
    for first, num_steps in ((0, 5), (3, 2)):
        with rankwise.init(tmp_path) as session, Monitor(session, step=first) as monitor:
            for _ in range(num_steps):
                monitor.step()
    lines = lines_of(tmp_path)
    assert sum(isinstance(line, Start) for line in lines) == 2
    assert [line.step for line in lines if isinstance(line, End)] == [5, 5]
    assert sorted(steps_of(tmp_path)) == [1, 2, 3, 4, 5]


def test_log_records_carry_the_step(tmp_path: Path) -> None:
    with rankwise.init(tmp_path) as session, Monitor(session) as monitor:
        monitor.step(41)
        monitor.step()
        rankwise.get_logger("x").info("after 42")
    text = (tmp_path / "logs" / "rank-00000.jsonl").read_text()
    (line,) = [line for line in text.splitlines() if "after 42" in line]
    assert '"step": 42' in line or '"step":42' in line


@pytest.mark.parametrize("number", ["x", 1.5, -1, torch.tensor([1, 2])])
def test_a_step_that_is_no_number_is_refused(tmp_path: Path, number: Any) -> None:
    with rankwise.init(tmp_path) as session, Monitor(session) as monitor:
        with pytest.raises(RankwiseError, match="give its number"):
            monitor.step(number)
        monitor.step(torch.tensor(7))  # type: ignore[arg-type]
        monitor.step()
        assert monitor.position().step == 8
        assert type(monitor.position().step) is int


def test_without_a_run_directory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with rankwise.init() as session, Monitor(session) as monitor:
        with monitor.phase("data"):
            pass
        monitor.step()
        monitor.log(1, {"loss": 1.0})
        monitor.tell(Event("hang", 0.0, 1, "a message"))
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_no_end_and_passes_through(tmp_path: Path) -> None:
    def fail() -> None:
        with rankwise.init(tmp_path) as session, Monitor(session) as monitor:
            monitor.step()
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    lines = lines_of(tmp_path)
    assert not any(isinstance(line, End) for line in lines)
    assert sorted(steps_of(tmp_path)) == [1]
    assert current.get_open() is None


def test_leaving_by_a_good_exit_status_is_good_order(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), rankwise.init(tmp_path) as session, Monitor(session):
        raise SystemExit(0)
    assert isinstance(lines_of(tmp_path)[-1], End)


def test_a_monitor_that_nobody_closed_ends_with_its_session(tmp_path: Path) -> None:
    with rankwise.init(tmp_path) as session:
        Monitor(session).step()
    assert current.get_open() is None
    assert isinstance(lines_of(tmp_path)[-1], End)
    with rankwise.init(tmp_path) as session, Monitor(session):
        pass


@pytest.mark.parametrize(("num_phases", "is_told"), [(5, False), (60, True)])
def test_phases_without_steps_are_told_of_at_the_end(
    num_phases: int, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    # A few are no mistake: an evaluation, in a run that has nothing left to train.
    with rankwise.init() as session, rankwise.Monitor(session) as monitor:
        for _ in range(num_phases):
            with monitor.phase("forward"):
                pass
    assert ("monitor.step() was never called" in caplog.text) == is_told


def test_one_step_is_enough_to_be_told_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with rankwise.init() as session, rankwise.Monitor(session) as monitor:
        monitor.step()
        for _ in range(60):
            with monitor.phase("forward"):
                pass
    assert "never called" not in caplog.text


def test_a_closed_monitor_does_nothing_more(tmp_path: Path) -> None:
    with rankwise.init(tmp_path) as session:
        monitor = Monitor(session)
        monitor.step()
        monitor.close()
        monitor.close()
        with monitor.phase("data"):
            monitor.step()
        monitor.log(9, {"loss": 1.0})
    assert sorted(steps_of(tmp_path)) == [1]
    assert not (tmp_path / "metrics" / "rank-00000.jsonl").exists()


def test_a_second_monitor_is_refused() -> None:
    with (
        rankwise.init() as session,
        Monitor(session),
        pytest.raises(RankwiseError, match="a Monitor is open already"),
    ):
        Monitor(session)


def test_a_session_that_is_over_is_refused() -> None:
    with rankwise.init() as session:
        pass
    with pytest.raises(RankwiseError, match=r"the session is not open. Make the Monitor within"):
        Monitor(session)


def test_what_is_no_session_is_refused() -> None:
    session: Any = Path("run")
    with pytest.raises(RankwiseError, match=r"was given a \w*Path"):
        Monitor(session)


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("step", -1, "the number of a step"),
        ("step", True, "the number of a step"),
        ("every_seconds", 0, "more than 0 seconds"),
        ("every_seconds", 1e9, "3600 at most"),
        ("every_seconds", math.nan, "more than 0 seconds"),
        ("straggler_steps", 0, "1 or more"),
        ("straggler_steps", 1.5, "1 or more"),
        ("hang_timeout_seconds", 0.0, "more than 0 seconds"),
        ("hang_timeout_seconds", "60", "more than 0 seconds"),
        ("on_hang", "kill", '"tell" or "end"'),
        ("prometheus_port", 0, "a port in 1..65535"),
        ("prometheus_port", 70_000, "a port in 1..65535"),
    ],
)
def test_a_bad_argument_is_refused_with_what_is_needed(name: str, value: Any, needed: str) -> None:
    with rankwise.init() as session:
        options: dict[str, Any] = {name: value}
        with pytest.raises(RankwiseError) as raised:
            Monitor(session, **options)
        assert f"{name} is {value!r}" in str(raised.value)
        assert needed in str(raised.value)
        with Monitor(session):  # nothing is left open
            pass


def test_a_pause_of_the_training_thread_shows_in_the_ticks(tmp_path: Path) -> None:
    with rankwise.init(tmp_path) as session, Monitor(session, every_seconds=0.05) as monitor:
        monitor.step()
        with monitor.phase("checkpoint"):
            time.sleep(0.5)
    ages = [line.seconds for line in lines_of(tmp_path) if isinstance(line, Tick) and line.phase == "checkpoint"]
    assert len(ages) > 2
    assert ages == sorted(ages)
    assert ages[-1] > 0.2


def test_losses_are_kept_by_step(tmp_path: Path) -> None:
    with rankwise.init(tmp_path) as session, Monitor(session) as monitor:
        current_monitor.log(1, {"loss": torch.tensor(0.5)})
        monitor.log(2, {"loss": math.nan})
        with pytest.raises(RankwiseError, match="'name' is a str"):
            monitor.log(3, {"name": "x"})
    text = (tmp_path / "metrics" / "rank-00000.jsonl").read_text()
    first, second = text.splitlines()
    assert '"loss": 0.5' in first
    assert '"loss": null' in second


def test_an_event_is_in_the_run_directory_and_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with rankwise.init(tmp_path) as session, Monitor(session) as monitor, caplog.at_level(logging.WARNING):
        monitor.tell(Event("straggler", 1.0, 7, "rank 3 holds the others up", (3,), "data"))
    (event,) = events_of(tmp_path)
    assert (event.message, event.ranks, event.phase) == ("rank 3 holds the others up", [3], "data")
    assert "rank 3 holds the others up" in caplog.text


def test_watching_what_is_no_module_is_refused() -> None:
    module: Any = "model"
    with rankwise.init() as session, Monitor(session) as monitor:
        monitor.watch(nn.Linear(2, 2))
        with pytest.raises(RankwiseError, match="takes modules, and was given a str"):
            monitor.watch(module)


def test_the_readings_are_served_where_that_is_asked_for() -> None:
    if importlib.util.find_spec("prometheus_client") is None and os.environ.get("CI") != "true":
        pytest.skip("needs prometheus-client (install rankwise[test])")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with rankwise.init() as session, Monitor(session, prometheus_port=port, every_seconds=0.05) as monitor:
        monitor.step()
        deadline = time.monotonic() + 20
        while True:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                text = page.read().decode()
            if "rankwise_step" in text and "process" in text:
                break
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2)


@on_ranks(2)
def test_waiting_in_our_collectives_is_communication(tmp_path: Path) -> None:
    with rankwise.init(tmp_path) as session, Monitor(session, straggler_steps=None) as monitor:
        for _ in range(3):
            with monitor.phase("validation"):
                if session.identity.rank == 1:
                    time.sleep(0.3)
                rankwise.barrier("validated")
            monitor.step()
        assert monitor.position().collective is None
    waited = [step.get("communication", 0.0) for step in steps_of(tmp_path, session.identity.rank).values()]
    assert len(waited) == 3
    if session.identity.rank == 0:
        assert min(waited) > 0.2
    else:
        assert max(waited) < 0.2


@on_ranks(2)
def test_the_position_names_the_collective_that_a_rank_waits_in() -> None:
    with rankwise.init() as session, Monitor(session, straggler_steps=None) as monitor:
        seen: list[Any] = []

        def look() -> None:
            time.sleep(0.3)
            seen.append(monitor.position())

        thread = threading.Thread(target=look)
        thread.start()
        if session.identity.rank == 1:
            time.sleep(0.8)
        rankwise.barrier("here")
        thread.join()
        if session.identity.rank == 0:
            assert (seen[0].phase, seen[0].collective) == ("communication", "barrier 'here'")
        else:
            assert (seen[0].phase, seen[0].collective) == (None, None)


def train_slowed(session: Session, monitor: Monitor, num_steps: int) -> None:
    """DDP on the CPU, with rank 1 slow in its data."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)))
    monitor.watch(ddp)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for _ in range(num_steps):
        with monitor.phase("data"):
            x = torch.randn(16, 32)
            if session.identity.rank == 1:
                time.sleep(0.1)
        with monitor.phase("forward"):
            loss = ddp(x).square().mean()
        with monitor.phase("backward"):
            loss.backward()
        with monitor.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        monitor.step()


@on_ranks(2, timeout_seconds=120.0)
def test_a_slowed_rank_is_named_on_the_console_and_on_the_time_line(tmp_path: Path) -> None:
    with (
        rankwise.init(tmp_path) as session,
        Monitor(session, straggler_steps=5, every_seconds=0.2) as monitor,
    ):
        train_slowed(session, monitor, 60)
        rankwise.barrier("trained")
    steps = steps_of(tmp_path, session.identity.rank)
    assert sorted(steps) == list(range(1, 61))
    settled = [step for number, step in steps.items() if number > 3]
    phase = "data" if session.identity.rank == 1 else "communication"
    assert sorted(step[phase] for step in settled)[len(settled) // 2] > 0.08
    if session.identity.is_main_process:
        stragglers = [event for event in events_of(tmp_path) if event.kind == "straggler"]
        assert stragglers
        assert list(stragglers[0].ranks) == [1]
        assert stragglers[0].phase == "data"
        assert "rank 1" in stragglers[0].message
        assert stragglers[0].message in (tmp_path / "logs" / "rank-00000.jsonl").read_text()
    else:
        assert not events_of(tmp_path, 1)
