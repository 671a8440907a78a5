"""Work on another thread: woken, finished in time, and started anew where it died."""

import threading
import time

import pytest

from rankwise.logs.background import Background


def wait_until(holds: object) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if holds():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False


def test_work_is_done_on_another_thread_once_woken_and_again_when_it_asks() -> None:
    calls: list[tuple[bool, bool]] = []

    def work(is_final: bool) -> float | None:
        calls.append((is_final, background.is_current()))
        return 0.01 if len(calls) < 3 else None

    background = Background("test", work)
    background.wake()
    assert wait_until(lambda: len(calls) == 3)
    assert calls == [(False, True)] * 3
    assert background.end(20)
    assert calls[3][0] is True


def test_finish_does_the_work_at_once_where_no_thread_was_started() -> None:
    calls: list[bool] = []
    background = Background("test", lambda is_final: calls.append(is_final))
    assert background.finish(0.0)
    assert calls == [True]


def test_finish_gives_up_on_work_that_hangs() -> None:
    release = threading.Event()

    def hang(is_final: bool) -> None:
        release.wait(20)

    background = Background("test", hang)
    background.wake()
    assert not background.finish(0.05)
    release.set()
    assert background.end(20)


def test_error_in_the_work_does_not_end_the_thread() -> None:
    calls: list[bool] = []

    def work(is_final: bool) -> None:
        calls.append(is_final)
        if len(calls) == 1:
            raise ValueError

    background = Background("test", work)
    background.wake()
    assert wait_until(lambda: len(calls) >= 1)
    assert background.finish(20)
    assert calls[-1] is True
    background.end(20)


def test_pause_gathers_many_wakes_into_one_call() -> None:
    calls: list[bool] = []
    background = Background("test", lambda is_final: calls.append(is_final), pause_seconds=0.2)
    for _ in range(100):
        background.wake()
    assert wait_until(lambda: bool(calls))
    assert len(calls) <= 2
    background.end(20)


def test_thread_that_could_not_start_is_tried_again_with_the_next_wake(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    background = Background("test", lambda is_final: calls.append(background.is_current()))

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        background.wake()
    assert calls == [False]
    background.wake()
    assert wait_until(lambda: True in calls)
    background.end(20)
