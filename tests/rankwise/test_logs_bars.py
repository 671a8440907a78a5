"""tqdm's bars: one, on the main process, and programs that ask their bar get the answers they always got."""

import io
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from rankwise import logs
from rankwise.identity import Identity
from rankwise.logs import screen
from rankwise.logs.bars import hide_tqdm
from rankwise.logs.fold import Line

try:
    from tqdm import auto, std
except ImportError:
    assert os.environ.get("CI") != "true", "tqdm has to be installed where CI runs"
    pytest.skip("tqdm is not installed", allow_module_level=True)


def drawn(monkeypatch: pytest.MonkeyPatch, begin: Callable[[], Any]) -> str:
    """What the bar writes to stderr."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in begin():
        pass
    monkeypatch.undo()
    return stream.getvalue()


@pytest.mark.parametrize("rank", [0, 1])
def test_bars_are_drawn_by_the_main_process_alone(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = logs.configure(Identity(rank, rank, 0, 2, 2, 1), None)
    try:
        for kind in (std.tqdm, auto.tqdm):
            assert ("100%" in drawn(monkeypatch, lambda: kind(range(3), desc="here"))) == (rank == 0)  # noqa: B023
            assert ("3/3" in drawn(monkeypatch, lambda: kind(range(3), file=sys.stderr))) == (rank == 0)  # noqa: B023
    finally:
        handle.close()
    assert "100%" in drawn(monkeypatch, lambda: std.tqdm(range(3)))


def test_hidden_bar_counts_and_one_into_a_file_is_drawn() -> None:
    restore = hide_tqdm()
    try:
        bar = std.tqdm(total=4)
        bar.update(3)
        assert (bar.n, bar.disable, bar.start_t > 0) == (3, False, True)
        bar.close()
        file = io.StringIO()
        assert list(std.tqdm(range(2), file=file)) == [0, 1]
        assert list(std.tqdm(range(2), "here", 2, True, file)) == [0, 1]
        assert file.getvalue().count("100%") == 2
    finally:
        restore()


def test_hook_of_somebody_else_around_ours_stays_and_is_passed_on_to(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = hide_tqdm()
    ours = std.tqdm.__init__

    def theirs(self: Any, *args: Any, **options: Any) -> None:
        ours(self, *args, **options)

    original = ours.__wrapped__
    std.tqdm.__init__ = theirs
    try:
        restore()
        assert std.tqdm.__init__ is theirs
        assert "100%" in drawn(monkeypatch, lambda: std.tqdm(range(3)))
    finally:
        std.tqdm.__init__ = original


def others_may_draw() -> bool:
    """Whether another thread could draw a bar now."""
    answers: list[bool] = []

    def ask() -> None:
        lock = std.TqdmDefaultWriteLock.th_lock
        answers.append(lock.acquire(blocking=False))
        if answers[0]:
            lock.release()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return answers[0]


def test_bar_that_begins_waits_for_the_line_that_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            answers.append(others_may_draw())
            return len(text)

    answers: list[bool] = []
    monkeypatch.setattr(sys, "stderr", Terminal())
    screen.forget_terminal()
    screen.show([Line({"level": "INFO", "logger": "a", "message": "here", "rank": 0}, ranks=(0,))], 0)
    screen.forget_terminal()
    assert answers
    assert not any(answers)
    assert others_may_draw()


def test_forked_process_may_draw_though_a_thread_of_its_parent_was_drawing() -> None:
    std.tqdm.get_lock().acquire()
    try:
        assert not others_may_draw()
        held = std.tqdm.get_lock()
        screen.forget_terminal()  # as in the child
        assert others_may_draw()
        assert std.tqdm.get_lock() is not held
    finally:
        held.release()
