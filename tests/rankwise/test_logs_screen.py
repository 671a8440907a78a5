"""What a person sees: plain lines in a pipe, columns in a terminal, and progress bars that stay whole."""

import importlib.util
import io
import os
import pty
import re
import select
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from rankwise.logs import screen, state
from rankwise.logs.fold import Line

RECORD: dict[str, Any] = {
    "time": "2026-01-02T03:04:05.000006+00:00",
    "level": "WARNING",
    "logger": "a.b",
    "message": "hot",
    "rank": 5,
    "host": "node-a",
    "device": "cuda:1",
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain(line: Line, own_rank: int | None = 0) -> str:
    return screen.as_text(line, own_rank)[9:]


def test_plain_line_has_a_clock_a_level_a_place_and_the_message() -> None:
    line = Line(RECORD, ranks=(5,))
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING \[rank 5, node-a, cuda:1\] a\.b: hot", screen.as_text(line, 0))
    assert plain(line, 5) == "WARNING a.b: hot"
    assert plain(Line(RECORD | {"worker": 2}, ranks=(5,)), 5) == "WARNING [rank 5, node-a, cuda:1, worker 2] a.b: hot"
    assert plain(Line({name: RECORD[name] for name in ("level", "logger", "message", "rank")}, ranks=(5,))) == (
        "WARNING [rank 5] a.b: hot"
    )


def test_traceback_follows_on_lines_of_its_own() -> None:
    exception = {"type": "KeyError", "message": "1", "traceback": "Traceback ...\nKeyError: 1\n"}
    assert plain(Line(RECORD | {"exception": exception}, ranks=(5,)), 5) == (
        "WARNING a.b: hot\nTraceback ...\nKeyError: 1"
    )


def test_pipe_gets_each_line_with_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []
    pipe = io.StringIO()
    monkeypatch.setattr(pipe, "write", writes.append)
    monkeypatch.setattr(sys, "stderr", pipe)
    screen.show([Line(RECORD, ranks=(5,)), Line(RECORD, ranks=(5,))], 0)
    assert len(writes) == 2
    assert all(text.endswith("hot\n") for text in writes)


def test_terminal_gets_colour_and_the_message_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen.forget_terminal()
    screen.show([Line(RECORD | {"message": "look [here] 1"}, ranks=(5,))], 0)
    screen.forget_terminal()
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert "WARNING" in shown
    assert "[rank 5, node-a, cuda:1] a.b: look [here] 1" in shown
    assert shown != terminal.getvalue()


@pytest.mark.parametrize("rank", [0, 1])
def test_progress_bar_is_drawn_by_the_main_process_alone(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(state, "rank", rank)
    screen.forget_terminal()
    with Progress(console=screen.console()) as bar:
        bar.update(bar.add_task("training", total=2), completed=2)
    screen.show([Line(RECORD, ranks=(5,))], 0)
    screen.forget_terminal()
    assert ("training" in terminal.getvalue()) == (rank == 0)
    assert "hot" in terminal.getvalue()


def test_traceback_and_stack_stand_below_the_line() -> None:
    more = {"exception": {"type": "E", "message": "m", "traceback": "Traceback:\nE: m\n"}, "stack": "Stack:\n  here"}
    text = screen.as_text(Line(RECORD | more, ranks=(5,)), 5)
    assert text.splitlines()[1:] == ["Traceback:", "E: m", "Stack:", "  here"]


def test_stream_that_is_gone_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        screen.show([Line(RECORD, ranks=(5,))], 0)


def run_in_terminal(code: str, tmp_path: Path) -> list[str]:
    """The screen, row by row, that a program has left in a terminal of 100 columns."""
    script = tmp_path / "program.py"
    script.write_text(code)
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (40, 100))
    environ = os.environ | {"TERM": "xterm-256color"}
    process = subprocess.Popen([sys.executable, str(script)], stdin=its, stdout=its, stderr=its, env=environ)
    os.close(its)
    received = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        if not part:
            break
        received += part
    os.close(ours)
    assert process.wait(60) == 0, received.decode()
    return rows(received.decode())


def rows(output: str) -> list[str]:
    """What a terminal shows after this output: it knows what progress bars use, and fails on anything else."""
    screen_rows: list[str] = [""]
    row = column = 0
    for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", output):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            if row == len(screen_rows):
                screen_rows.append("")
        elif not part.startswith("\x1b"):
            old = screen_rows[row].ljust(column)
            screen_rows[row] = old[:column] + part + old[column + len(part) :]
            column += len(part)
        elif part.endswith("A"):
            row -= int(part[2:-1] or 1)
        elif part.endswith("K"):
            screen_rows[row] = "" if part[2:-1] == "2" else screen_rows[row][:column]
        else:
            assert part[-1] in "mhl", f"unknown control sequence {part!r}"
    return [text.rstrip() for text in screen_rows if text.strip()]


BODY = """
import logging, time
from rankwise import logs
from rankwise.identity import Identity
handle = logs.configure(Identity(0, 0, 0, 1, 1, 1), None)
log = logs.get_logger("a")
"""


def test_lines_stand_above_a_rich_progress_bar(tmp_path: Path) -> None:
    code = (
        BODY
        + """
from rich.progress import Progress
with Progress(console=logs.console()) as bar:
    task = bar.add_task("training", total=20)
    for number in range(20):
        bar.advance(task)
        if number % 5 == 0:
            log.info("line %d", number)
            handle.flush()
        time.sleep(0.01)
handle.close()
"""
    )
    shown = run_in_terminal(code, tmp_path)
    assert [re.sub(r"^\S+ ", "", text) for text in shown[:-1]] == [f"INFO     a: line {n}" for n in (0, 5, 10, 15)]
    assert shown[-1].startswith("training")
    assert "100%" in shown[-1]


def test_lines_stand_above_a_tqdm_progress_bar(tmp_path: Path) -> None:
    if importlib.util.find_spec("tqdm") is None:
        assert os.environ.get("CI") != "true", "tqdm has to be installed where CI runs"
        pytest.skip("tqdm is not installed")
    code = (
        BODY
        + """
from tqdm import tqdm
for number in tqdm(range(20), desc="training", mininterval=0):
    if number % 5 == 0:
        log.info("line %d", number)
        handle.flush()
handle.close()
"""
    )
    shown = run_in_terminal(code, tmp_path)
    assert [re.sub(r"^\S+ ", "", text) for text in shown[:-1]] == [f"INFO     a: line {n}" for n in (0, 5, 10, 15)]
    assert shown[-1].startswith("training: 100%")


def test_lines_stand_above_a_progress_bar_on_a_console_of_its_own(tmp_path: Path) -> None:
    code = (
        BODY
        + """
from rich.progress import track
for number in track(range(20), description="training"):
    if number % 5 == 0:
        log.info("line %d", number)
        handle.flush()
    time.sleep(0.01)
handle.close()
"""
    )
    shown = run_in_terminal(code, tmp_path)
    assert [re.sub(r"^\S+ ", "", text) for text in shown[:-1]] == [f"INFO     a: line {n}" for n in (0, 5, 10, 15)]
    assert shown[-1].startswith("training")
    assert "100%" in shown[-1]
