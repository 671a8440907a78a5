"""A progress bar and the log lines of two ranks in a real terminal: the screen stays clean, while and after."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from pathlib import Path
from rich.progress import Progress
import rankwise

log = rankwise.get_logger("train")
with rankwise.init(device_type="cpu", timeout_seconds=60) as session:
    rank = session.identity.rank
    with Progress(console=rankwise.console()) as bar:
        task = bar.add_task("training", total=20)
        for step in range(20):
            bar.advance(task)
            if step % 5 == 0:
                log.info("line %d", step)
            if step == 7 and rank == 1:
                log.warning("my fan is loud")
            if step == 8:
                log.warning("the disk is nearly full")
            if step == 12:
                while not Path(sys.argv[1]).exists():
                    time.sleep(0.05)
            if step == 17 and rank == 1:
                log.error("my fan is broken")
            time.sleep(0.02)
        time.sleep(2)  # the bar still moves when the last line comes
"""

FIRST_LINES = [
    r"INFO     train: line 0",
    r"INFO     train: line 10",
    r"INFO     train: line 5",
    r"WARNING  \[rank 1, \S+, cpu\] train: my fan is loud",
    r"WARNING  train: the disk is nearly full \(x2, ranks 0-1\)",
]
LAST_LINES = [
    r"INFO     train: line 15",
    r"ERROR    \[rank 1, \S+, cpu\] train: my fan is broken",
]
START = r"INFO     rankwise\.session: rank 0 of 2 on 1 node .*"
CLOCK = r"\d\d:\d\d:\d\d "
END = "the program has ended with status"
WAIT_SECONDS = 45.0


class Pane:
    """A tmux server of its own with one pane, 200 columns wide, in which one command runs."""

    def __init__(self, folder: Path) -> None:
        self._tmux = ["tmux", "-u", "-f", os.devnull, "-S", str(folder / "tmux")]

    def start(self, command: str) -> None:
        # `cat` holds the pane open, so that the last screen can be read.
        line = f"{command}; echo {shlex.quote(END)} $?; exec cat"
        self._call("new-session", "-d", "-x", "200", "-y", "45", "sh", "-c", line)

    def rows(self) -> list[str]:
        """What a person sees, with what has scrolled away, but for empty rows."""
        text = self._call("capture-pane", "-p", "-S", "-")
        return [row.rstrip() for row in text.splitlines() if row.strip()]

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, check=False)

    def _call(self, *arguments: str) -> str:
        # The size of the terminal where the tests run is not that of the pane.
        environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        done = subprocess.run(
            [*self._tmux, *arguments], capture_output=True, text=True, check=False, timeout=30, env=environ
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def pane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pane]:
    if shutil.which("tmux") is None:
        assert os.environ.get("CI") != "true", "tmux has to be installed where CI runs"
        pytest.skip("no tmux here")
    # A socket's path has to be short.
    found = Pane(tmp_path_factory.mktemp("t"))
    yield found
    found.close()


def wait_for(pane: Pane, is_there: Callable[[list[str]], bool]) -> list[str]:
    """The rows once they are as wanted: a single look may come between two writes of the bar."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_there(rows := pane.rows()):
        assert time.monotonic() < deadline, "the screen shows:\n" + "\n".join(rows)
        time.sleep(0.2)
    return rows


def since_start(rows: list[str]) -> list[str]:
    """The rows below the line of the start; torch may complain of the name service above it."""
    starts = [number for number, row in enumerate(rows) if re.fullmatch(CLOCK + START, row)]
    return rows[starts[0] + 1 :] if len(starts) == 1 else []


def lines_are(rows: list[str], expected: list[str]) -> bool:
    """Whether each row is one of the expected lines, whole, and each of them is there once."""
    if len(rows) != len(expected):
        return False
    return all(sum(re.fullmatch(CLOCK + line, row) is not None for row in rows) == 1 for line in expected)


def bars(rows: list[str]) -> list[str]:
    return [row for row in rows if row.startswith("training")]


def without_bars(rows: list[str]) -> list[str]:
    return [row for row in rows if not row.startswith("training")]


def test_bar_and_lines_of_two_ranks_leave_the_screen_clean(pane: Pane, tmp_path: Path) -> None:
    script, go = tmp_path / "program.py", tmp_path / "go"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "rankwise", "run", "--nproc-per-node", "2", str(script), str(go)]
    pane.start(shlex.join(command))

    def is_halfway(rows: list[str]) -> bool:
        own = since_start(rows)
        return lines_are(own[:-1], FIRST_LINES) and len(bars(own)) == 1 and own[-1].startswith("training")

    rows = wait_for(pane, is_halfway)
    assert re.fullmatch(r"training .* 65% \S+", rows[-1]), rows[-1]

    go.touch()
    rows = since_start(wait_for(pane, lambda rows: any(row.startswith(END) for row in rows)))
    assert rows[-1] == f"{END} 0", rows
    assert lines_are(without_bars(rows[:-1]), FIRST_LINES + LAST_LINES), rows
    assert [re.fullmatch(r"training .* 100% \S+", bar) is not None for bar in bars(rows)] == [True], rows
