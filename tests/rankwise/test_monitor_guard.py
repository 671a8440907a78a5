"""A tracker that hangs, raises or is slow costs the training nothing but a line in the log."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from rankwise.errors import RankwiseError
from rankwise.monitor.guard import MAX_IMAGES_WAITING, Guarded, Tracker, close_all


class Kept(Tracker):
    """Keeps what it is given; `meddle` may raise or hang."""

    name = "Somewhere"

    def __init__(self, meddle: Callable[[str], None] = lambda call: None) -> None:
        self.calls: list[str] = []
        self.rows: list[tuple[int, dict[str, float], float]] = []
        self.images: list[str] = []
        self.threads: set[str] = set()
        self.failed: bool | None = None
        self._meddle = meddle

    def _called(self, call: str) -> None:
        self.calls.append(call)
        self.threads.add(threading.current_thread().name)
        self._meddle(call)

    def open(self) -> None:
        self._called("open")

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        self._called("log")
        self.rows.append((step, dict(values), seconds))

    def image(self, step: int, name: str, pixels: NDArray[np.uint8], seconds: float) -> None:
        self._called("image")
        self.images.append(name)

    def close(self, *, failed: bool) -> None:
        self._called("close")
        self.failed = failed


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened at the end of a test, so that no thread stays behind."""
    event = threading.Event()
    yield event
    event.set()


def on(call: str, act: Callable[[], object]) -> Callable[[str], None]:
    def meddle(seen: str) -> None:
        if seen == call:
            act()

    return meddle


def fail(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_everything_reaches_the_tracker_in_order_on_a_thread_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    guarded = Guarded(kept)
    before = time.time()
    values = {"nll": 1.0}
    for step in range(50):
        values["nll"] = float(step)
        guarded.log(step, values)
    guarded.image(50, "clip", np.zeros((2, 2, 3), np.uint8))
    guarded.close()
    assert [(step, row) for step, row, _ in kept.rows] == [(step, {"nll": float(step)}) for step in range(50)]
    assert all(before <= seconds <= time.time() for _, _, seconds in kept.rows)
    assert (kept.calls[0], kept.calls[-1], kept.images, kept.failed) == ("open", "close", ["clip"], False)
    assert kept.threads == {"rankwise-Somewhere"}
    assert not warnings_of(caplog)


def test_a_tracker_that_hangs_holds_up_neither_a_step_nor_the_end(
    gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    guarded = Guarded(Kept(on("log", gate.wait)), max_waiting=20, close_seconds=0.2)
    began = time.monotonic()
    for step in range(1000):
        guarded.log(step, {"nll": 1.0})
    guarded.close()
    assert time.monotonic() - began < 10
    keeping_up, end = warnings_of(caplog)
    assert "Somewhere does not keep up" in keeping_up
    # One is being taken, or not yet.
    assert "did not finish within 0.2 s" in end
    assert any(f"; {number} entries" in end for number in (999, 1000))


def test_a_tracker_that_hangs_while_opening_is_left_alone(
    gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    guarded = Guarded(Kept(on("open", gate.wait)), close_seconds=0.1)
    guarded.log(1, {"nll": 1.0})
    guarded.close()
    (told,) = warnings_of(caplog)
    assert told == "Somewhere did not finish within 0.1 s and is left alone; 1 entries have not reached it"


@pytest.mark.parametrize("error", [ValueError("no such project\nsecond line"), SystemExit(1), KeyboardInterrupt()])
def test_errors_are_told_once_and_counted(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(on("log", fail(error)))
    guarded = Guarded(kept)
    for step in range(5):
        guarded.log(step, {"nll": 1.0})
    guarded.close()
    first, last = warnings_of(caplog)
    assert first.startswith(f"Somewhere takes not all values, and training goes on: {type(error).__name__}")
    assert "second line" not in first
    assert last == "5 entries have not reached Somewhere"
    assert kept.calls[-1] == "close"


def test_a_server_that_comes_later_gets_what_waited(caplog: pytest.LogCaptureFixture) -> None:
    attempts: list[int] = []

    def refuse_twice() -> None:
        attempts.append(1)
        if len(attempts) <= 2:
            raise ConnectionError("refused")

    kept = Kept(on("open", refuse_twice))
    guarded = Guarded(kept, retry_seconds=0.01)
    guarded.log(1, {"nll": 1.0})
    deadline = time.monotonic() + 30
    while not kept.rows and time.monotonic() < deadline:
        time.sleep(0.01)
    guarded.close()
    assert [step for step, _, _ in kept.rows] == [1]
    (told,) = warnings_of(caplog)
    assert "cannot be used yet, and training goes on: ConnectionError: refused" in told


def test_a_tracker_that_never_opens_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(on("open", fail(ConnectionError("refused"))))
    guarded = Guarded(kept, retry_seconds=1000.0, close_seconds=60.0)
    guarded.log(1, {"nll": 1.0})
    began = time.monotonic()
    guarded.close()
    assert time.monotonic() - began < 30
    assert "close" not in kept.calls
    assert warnings_of(caplog)[-1] == "1 entries have not reached Somewhere"


def test_an_error_at_the_end_is_told(caplog: pytest.LogCaptureFixture) -> None:
    guarded = Guarded(Kept(on("close", fail(OSError("gone")))))
    guarded.close()
    assert warnings_of(caplog) == ["Somewhere was not closed, and training goes on: OSError: gone"]


def test_secrets_in_errors_are_hidden(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEWHERE_API_KEY", "abcdef0123456789")
    guarded = Guarded(Kept(on("log", fail(ValueError("bad key abcdef0123456789 at http://me:pass@host/x")))))
    guarded.log(1, {"nll": 1.0})
    guarded.close()
    assert "abcdef0123456789" not in caplog.text
    assert "me:pass" not in caplog.text
    assert "bad key ***" in caplog.text


def test_few_pictures_wait(gate: threading.Event) -> None:
    kept = Kept(on("open", gate.wait))
    guarded = Guarded(kept, close_seconds=30.0)
    for step in range(50):
        guarded.image(step, f"clip-{step}", np.zeros((2, 2, 3), np.uint8))
    gate.set()
    guarded.close()
    assert len(kept.images) == MAX_IMAGES_WAITING


def test_it_is_told_whether_the_run_failed() -> None:
    kept = Kept()
    Guarded(kept).close(failed=True)
    assert kept.failed is True


def test_after_its_end_it_takes_nothing_and_a_second_end_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    guarded = Guarded(kept)
    guarded.close()
    guarded.log(1, {"nll": 1.0})
    guarded.close(failed=True)
    assert kept.calls == ["open", "close"]
    assert not warnings_of(caplog)


def test_several_that_hang_take_as_long_as_one(gate: threading.Event) -> None:
    all_of_them = [Guarded(Kept(on("open", gate.wait)), close_seconds=1.0) for _ in range(20)]
    began = time.monotonic()
    close_all(all_of_them, failed=True)
    assert time.monotonic() - began < 10


def test_a_missing_package_is_named_at_once() -> None:
    class Elsewhere(Tracker):
        name = "Elsewhere"
        package = "no_such_package_of_a_tracker"
        distribution = "elsewhere-client"

    with pytest.raises(
        RankwiseError, match=r"no_such_package_of_a_tracker is not installed.*pip install elsewhere-client"
    ):
        Guarded(Elsewhere())


def test_a_process_ends_although_its_tracker_hangs() -> None:
    program = """
import time
from rankwise.monitor.guard import Guarded, Tracker
class Hangs(Tracker):
    name = "Hangs"
    def open(self):
        time.sleep(1000)
guarded = Guarded(Hangs(), close_seconds=0.1)
guarded.log(1, {"nll": 1.0})
guarded.close()
print("end")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "end\n"
