"""The live table in a real terminal: it follows the run, obeys keys, and leaves everything as it was."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rankwise.top.live import Looker
from rankwise.top.rows import Snapshot

CALL = "import sys; from rankwise.top import main; sys.exit(main(sys.argv[1:]))"
END = "it has ended with status"
WAIT_SECONDS = 45.0


class Pane:
    """A tmux server of its own with one pane, in which `rankwise top` runs in a shell."""

    def __init__(self, folder: Path) -> None:
        self._tmux = ["tmux", "-u", "-f", os.devnull, "-S", str(folder / "tmux")]
        self._folder = folder

    def start(self, run: Path, *arguments: str, job_control: bool = False) -> None:
        top = shlex.join([sys.executable, "-W", "error", "-c", CALL, str(run), *arguments])
        # What the terminal is like before and after goes into files; `cat` holds the pane open.
        after = "echo stopped; stty -g > stopped; read line; fg; " if job_control else ""
        before = "set -m; " if job_control else "trap : INT; "
        script = (
            f"{before}stty -g > before; echo the shell; {top} 2> errors; {after}echo {END} $?; stty -g > after; cat"
        )
        size = ("-x", "80", "-y", "24")
        self.tell("new-session", "-d", *size, "-c", str(self._folder), "bash", "--norc", "-c", script)

    def settings(self, name: str) -> str:
        """Those of the terminal: before, stopped, after."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not (text := (self._folder / name).read_text() if (self._folder / name).exists() else ""):
            assert time.monotonic() < deadline, f"{name} is not written"
            time.sleep(0.05)
        return text

    def rows(self) -> list[str]:
        return [row.rstrip() for row in self.tell("capture-pane", "-p").splitlines()]

    def press(self, *keys: str) -> None:
        self.tell("send-keys", *keys)

    def wait_for(self, is_there: Callable[[list[str]], bool]) -> list[str]:
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_there(rows := self.rows()):
            assert time.monotonic() < deadline, "the screen shows:\n" + "\n".join(rows)
            time.sleep(0.1)
        return rows

    def wait_for_end(self, status: int) -> None:
        rows = self.wait_for(lambda rows: any(row.startswith(END) for row in rows))
        assert [row for row in rows if row] == ["the shell", f"{END} {status}"]
        assert (self._folder / "errors").read_text() == ""
        assert self.settings("before") == self.settings("after")

    def tell(self, *arguments: str) -> str:
        # The size of the terminal where the tests run is not that of the pane.
        environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        done = subprocess.run(
            [*self._tmux, *arguments], capture_output=True, text=True, check=False, timeout=30, env=environ
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, check=False)


@pytest.fixture
def pane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pane]:
    if shutil.which("tmux") is None:
        assert os.environ.get("CI") != "true", "tmux has to be installed where CI runs"
        pytest.skip("no tmux here")
    # A socket's path has to be short.
    found = Pane(tmp_path_factory.mktemp("t"))
    yield found
    found.close()


def shown(rows: list[str]) -> list[int]:
    """The ranks in the table."""
    heads = [number for number, row in enumerate(rows) if row.split()[:1] in (["rank"], ["rank^"], ["rankv"])]
    return (
        [int(row.split()[0]) for row in rows[heads[0] + 1 :] if row.split()[:1] and row.split()[0].isdecimal()]
        if heads
        else []
    )


def test_table_follows_the_run_and_q_leaves_the_terminal_as_it_was(pane: Pane, four: Any) -> None:
    pane.start(four.folder, "--interval", "0.2")
    rows = pane.wait_for(lambda rows: shown(rows) == [0, 1, 2, 3])
    assert rows[0] == "run  running  4 ranks on 2 nodes"
    for rank in range(4):
        four.tick(rank, 4711)
    pane.wait_for(lambda rows: rows[1].startswith("step 4,711"))
    four.event("hang", 3, "rank 3 is stuck in backward")
    pane.wait_for(lambda rows: any(row.endswith("rank 3 is stuck in backward") for row in rows))
    pane.press("q")
    pane.wait_for_end(0)


def test_ctrl_c_ends_it_as_q_does(pane: Pane, four: Any) -> None:
    pane.start(four.folder)
    pane.wait_for(lambda rows: shown(rows) == [0, 1, 2, 3])
    pane.press("C-c")
    pane.wait_for_end(0)


def test_ctrl_z_gives_the_terminal_back_until_it_goes_on(pane: Pane, four: Any) -> None:
    pane.start(four.folder, "--interval", "0.2", job_control=True)
    pane.wait_for(lambda rows: shown(rows) == [0, 1, 2, 3])
    pane.press("C-z")
    rows = pane.wait_for(lambda rows: "stopped" in rows)
    assert shown(rows) == []
    assert pane.settings("before") == pane.settings("stopped")
    pane.press("Enter")
    pane.wait_for(lambda rows: shown(rows) == [0, 1, 2, 3])
    four.tick(0, 4711)
    pane.press("4")
    pane.wait_for(lambda rows: shown(rows)[:1] == [0] and any(" 4711 " in row for row in rows))
    pane.press("q")
    pane.wait_for(lambda rows: f"{END} 0" in rows)
    assert pane.settings("before") == pane.settings("after")


def test_sigterm_ends_it_with_the_terminal_as_it_was(pane: Pane, four: Any) -> None:
    pane.start(four.folder)
    pane.wait_for(lambda rows: shown(rows) == [0, 1, 2, 3])
    shell = psutil.Process(int(pane.tell("display-message", "-p", "#{pane_pid}")))
    (child,) = shell.children()
    child.send_signal(signal.SIGTERM)
    pane.wait_for_end(128 + signal.SIGTERM)


def test_keys_scroll_sort_and_filter(pane: Pane, maker: Any) -> None:
    for rank in range(60):
        maker.start(rank)
        maker.tick(rank, 100 + rank)
    pane.start(maker.folder)
    first = shown(pane.wait_for(lambda rows: len(shown(rows)) > 10))
    assert first[:3] == [0, 1, 2]
    pane.press("NPage")
    pane.wait_for(lambda rows: shown(rows)[:1] == [first[-1] + 1])
    pane.press("End")
    pane.wait_for(lambda rows: shown(rows)[-1:] == [59])
    pane.press("4")
    pane.wait_for(lambda rows: shown(rows)[:2] == [59, 58])
    pane.press("/", "r", "a", "n", "k", "=", "5", "-", "7", "Enter")
    pane.wait_for(lambda rows: shown(rows) == [7, 6, 5])
    pane.press("Escape")
    pane.wait_for(lambda rows: shown(rows)[:2] == [59, 58])
    pane.press("q")
    pane.wait_for_end(0)


def test_it_fills_the_terminal_when_that_changes_its_size(pane: Pane, maker: Any) -> None:
    for rank in range(60):
        maker.start(rank)
        maker.tick(rank, 1)
    pane.start(maker.folder)
    few = shown(pane.wait_for(lambda rows: len(shown(rows)) > 10))
    pane.tell("resize-window", "-x", "120", "-y", "40")
    rows = pane.wait_for(lambda rows: len(shown(rows)) == len(few) + 16)
    assert "60 (60" not in rows[-1]
    assert rows[-1].endswith("? help")
    pane.tell("resize-window", "-x", "60", "-y", "12")
    rows = pane.wait_for(lambda rows: len(shown(rows)) == len(few) - 12)
    assert rows[-1].startswith("1-")
    pane.press("q")
    pane.wait_for_end(0)


def test_run_directory_that_vanishes_ends_it_with_a_word(pane: Pane, four: Any, tmp_path: Path) -> None:
    pane.start(four.folder, "--interval", "0.2")
    pane.wait_for(lambda rows: shown(rows) == [0, 1, 2, 3])
    shutil.rmtree(four.folder)
    rows = pane.wait_for(lambda rows: any(row.startswith(END) for row in rows))
    assert f"{END} 2" in rows


def test_looker_gives_each_snapshot_once_and_what_a_look_raises() -> None:
    answers = iter([Snapshot("a"), Snapshot("b")])
    may_go_on = threading.Semaphore(0)
    is_news = threading.Semaphore(0)

    def look() -> Snapshot:
        may_go_on.acquire()
        return next(answers)

    looker = Looker(look, 0.01, is_news.release)
    for name in "ab":
        may_go_on.release()
        assert is_news.acquire(timeout=WAIT_SECONDS)
        found = looker.take()
        assert found is not None
        assert found.run == name
        assert looker.take() is None
    may_go_on.release()
    assert is_news.acquire(timeout=WAIT_SECONDS)
    with pytest.raises(StopIteration):
        looker.take()
    looker.close()
