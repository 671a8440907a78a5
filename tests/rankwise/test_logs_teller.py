"""Records reach the main process's console soon, folded; where nobody hears, a rank speaks for itself."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rankwise.identity import Identity
from rankwise.logs import state
from rankwise.logs import teller as teller_module
from rankwise.logs.record import Form, Item, notice
from rankwise.logs.teller import Teller

Make = Callable[..., Teller]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Teller] = []

    def teller(rank: int, world_size: int = 4) -> Teller:
        identity = Identity(rank, rank, 0, world_size, world_size, 1, hostname="node-a")
        made.append(Teller(Form(identity, "cpu", {}), rank=rank, world_size=world_size))
        return made[-1]

    yield teller
    state.send = None
    for teller_ in made:
        teller_.close()


def info(message: str) -> Item:
    return notice(message)._replace(level_number=20, level="INFO")


def of_rank(rank: int, message: str) -> dict[str, Any]:
    return Form(Identity(rank, rank, 0, 4, 4, 1, hostname="node-a"), "cpu", {}).told(notice(message))


def wait_for(text: str, capsys: pytest.CaptureFixture[str], seconds: float = 20) -> str:
    """What stderr has got by the time that it holds the text."""
    got, deadline = "", time.monotonic() + seconds
    while text not in got:
        assert time.monotonic() < deadline, f"{text!r} is not in {got!r}"
        got += capsys.readouterr().err
        time.sleep(0.01)
    return got


def test_info_of_the_main_process_is_shown_without_being_asked_for(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make(0).put(info("begins"))
    wait_for("INFO    rankwise.logs: begins\n", capsys)


def test_warnings_of_many_ranks_are_one_line_within_seconds(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    teller = make(0)
    teller.put(notice("hot 1"))
    for rank in (1, 2, 3):
        teller.put(of_rank(rank, f"hot {rank}"))
    shown = wait_for("\n", capsys)
    assert shown.endswith("WARNING rankwise.logs: hot 1 (x4, ranks 0-3, numbers differ)\n")


def test_close_shows_what_would_wait_for_others(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    teller = make(0)
    teller.put(of_rank(2, "hot"))
    teller.close()
    assert capsys.readouterr().err.endswith("WARNING [rank 2, node-a, cpu] rankwise.logs: hot\n")


def test_rank_sends_from_a_thread_of_the_logs_and_prints_nothing(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[dict[str, Any]] = []
    threads: list[threading.Thread] = []

    def send(record: dict[str, Any]) -> bool:
        sent.append(record)
        threads.append(threading.current_thread())
        return True

    state.send = send
    teller = make(3)
    teller.put(notice("hot"))
    assert teller.flush()
    (record,) = sent
    assert (record["rank"], record["message"], record["device"], record["level"]) == (3, "hot", "cpu", "WARNING")
    assert threads[0] is not threading.current_thread()
    assert capsys.readouterr().err == ""


def test_rank_folds_its_own_flood_before_it_is_sent(make: Make) -> None:
    sent: list[dict[str, Any]] = []
    state.send = lambda record: sent.append(record) is None
    teller = make(3)
    for number in range(1000):
        teller.put(notice(f"hot {number}"))
    teller.close()
    assert len(sent) < 10
    assert sum(record.get("count", 1) for record in sent) == 1000


def _refuse(record: dict[str, Any]) -> bool:
    return False


def _raise(record: dict[str, Any]) -> bool:
    raise ConnectionError


@pytest.mark.parametrize("send", [None, _refuse, _raise])
def test_rank_that_nobody_hears_prints_labelled(
    send: Callable[[dict[str, Any]], bool] | None, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    state.send = send
    teller = make(3)
    teller.put(notice("hot"))
    assert teller.flush()
    assert capsys.readouterr().err.endswith("WARNING [rank 3, node-a, cpu] rankwise.logs: hot\n")


def test_putting_never_waits_for_a_terminal_that_is_stopped_and_losses_are_told(
    make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, hangs = threading.Event(), threading.Event()
    write = sys.stderr.write

    def stop(text: str) -> int:
        hangs.set()
        goes_on.wait(20)
        return write(text)

    monkeypatch.setattr(teller_module, "MAX_WAITING", 50)
    monkeypatch.setattr(sys.stderr, "write", stop)
    teller = make(0, world_size=1)
    teller.put(info("first"))
    assert hangs.wait(20)
    for number in range(100):
        teller.put(info(f"number {number}"))
    assert not teller.flush(0.05)
    goes_on.set()
    assert teller.flush(20)
    shown = capsys.readouterr().err
    assert "records that came faster than they could be shown (x50)" in shown
    assert "number 49\n" not in shown
    assert "number 99\n" in shown


def test_record_that_cannot_be_shown_does_not_end_the_showing(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    teller = make(0)
    teller.put({"rank": "?"})
    teller.put(info("after"))
    wait_for("after", capsys)


def test_flood_of_info_displaces_no_warning(
    make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teller_module, "MAX_WAITING", 50)
    teller = make(0)
    monkeypatch.setattr(teller._background, "wake", lambda: None)
    teller.put(of_rank(2, "hot"))
    for number in range(200):
        teller.put(info(f"number {number}"))
    teller.flush()
    shown = capsys.readouterr().err
    assert "[rank 2, node-a, cpu] rankwise.logs: hot\n" in shown
    assert "records that came faster than they could be shown (x150)" in shown


def test_close_says_how_many_were_not_shown(
    make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teller = make(0)
    monkeypatch.setattr(teller._background, "wake", lambda: None)
    monkeypatch.setattr(teller._background, "end", lambda timeout_seconds: False)
    teller.put(notice("hot"))
    teller.put(info("begins"))
    teller.close()
    assert capsys.readouterr().err == "rankwise: 2 log records were not shown here in time\n"


def test_lines_stand_in_the_order_in_which_they_were_said(
    make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teller = make(0, world_size=1)
    monkeypatch.setattr(teller._background, "wake", lambda: None)
    said = [info("a"), notice("b"), info("c"), info("d"), notice("e")]
    for item in said:
        teller.put(item)
    teller.flush()
    shown = capsys.readouterr().err.splitlines()
    assert [line.rpartition(" ")[2] for line in shown] == ["a", "b", "c", "d", "e"]


def test_record_that_stands_for_many_is_missed_as_many(
    make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teller_module, "MAX_WAITING", 2)
    teller = make(0)
    monkeypatch.setattr(teller._background, "wake", lambda: None)
    for rank in (1, 2, 3):
        teller.put(of_rank(rank, "hot") | {"count": 10})
    teller.flush()
    shown = capsys.readouterr().err
    assert "hot (x20, ranks 2-3)" in shown
    assert "faster than they could be shown (x10)" in shown
