"""No rank outlives its launcher; real processes, real SIGKILL."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rankwise.errors import LaunchError
from rankwise.parent import LAUNCHER, POLL_SECONDS, end_with_parent, launcher_token, start_time

RANK_PROGRAM = """
import os, pathlib, sys, time
from rankwise.parent import end_with_parent
{before}
following = end_with_parent()
{after}
folder = pathlib.Path(sys.argv[1])
(folder / f"{{os.getpid()}}.new").write_text(str(following))
(folder / f"{{os.getpid()}}.new").rename(folder / f"{{os.getpid()}}.pid")
time.sleep(120)
"""


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"waited {seconds} s in vain for {what}"
        time.sleep(0.05)
    return time.monotonic() - start


def is_running(pid: int) -> bool:
    return start_time(pid) is not None


def token_of(pid: int) -> str:
    """What a launcher with this process id would have written."""
    place = launcher_token().rsplit(":", 2)[0]
    return f"{place}:{pid}:{start_time(pid)}"


def announced(folder: Path) -> dict[int, str]:
    return {int(path.stem): path.read_text() for path in folder.glob("*.pid")}


def write_program(folder: Path, before: str = "", after: str = "") -> Path:
    path = folder / "rank.py"
    path.write_text(RANK_PROGRAM.format(before=before, after=after))
    return path


def start_torchrun(folder: Path, program: Path, **environ: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(program)]
    log = open(folder / "torchrun.log", "wb")  # noqa: SIM115
    with log:
        return subprocess.Popen([*command, str(folder)], stdout=log, stderr=log, env=os.environ | environ)


def end_all(launcher: subprocess.Popen[bytes], folder: Path) -> None:
    launcher.kill()
    launcher.wait()
    for pid in announced(folder):
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("import rankwise.parent; rankwise.parent._ask_kernel_for_death_signal = lambda: None", ""),
        ("", "import signal; [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT)]"),
    ],
    ids=["kernel", "thread alone", "deaf to other signals"],
)
def test_ranks_end_within_five_seconds_of_a_killed_torchrun(tmp_path: Path, before: str, after: str) -> None:
    launcher = start_torchrun(tmp_path, write_program(tmp_path, before, after))
    try:
        wait_for(lambda: len(announced(tmp_path)) == 2, 60, "two ranks")
        ranks = announced(tmp_path)
        assert set(ranks.values()) == {"True"}
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        wait_for(lambda: not any(is_running(pid) for pid in ranks), 5, "the ranks to end")
    finally:
        end_all(launcher, tmp_path)


def test_rank_ends_with_the_launcher_named_by_variable_and_takes_its_children_along(tmp_path: Path) -> None:
    """The launcher is not the parent here: a wrapper stands between."""
    helper = "import subprocess; subprocess.Popen(['sleep', '120'])"
    with (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"]) as launcher,
        subprocess.Popen(
            [sys.executable, str(write_program(tmp_path, after=helper)), str(tmp_path)],
            env=os.environ | {LAUNCHER: token_of(launcher.pid)},
            stderr=subprocess.PIPE,
            text=True,
        ) as rank,
    ):
        wait_for(lambda: announced(tmp_path), 30, "the rank")
        (child,) = psutil.Process(rank.pid).children()
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        wait_for(lambda: rank.poll() is not None, 5, "the rank to end")
        wait_for(lambda: not is_running(child.pid), 5, "its child to end")
        assert rank.returncode == 1
        assert rank.stderr is not None
        assert f"rankwise: the launcher is gone; this rank (pid {rank.pid}) ends" in rank.stderr.read()


def test_rank_that_starts_after_its_launcher_died_ends_at_once(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as launcher:
        token = token_of(launcher.pid)
        launcher.kill()
    done = subprocess.run(
        [sys.executable, str(write_program(tmp_path)), str(tmp_path)],
        env=os.environ | {LAUNCHER: token},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert f"the launcher (pid {launcher.pid}) is gone" in done.stderr


def test_parent_that_dies_while_the_kernel_is_asked_is_noticed(tmp_path: Path) -> None:
    """The parent's death falls between the first look and the kernel's promise, which then never comes true."""
    program = write_program(
        tmp_path,
        before=(
            "import rankwise.parent\n"
            "def slow():\n"
            "    (pathlib.Path(sys.argv[1]) / 'asking').touch()\n"
            "    parent = os.getppid()\n"
            "    while os.getppid() == parent: time.sleep(0.01)\n"
            "rankwise.parent._ask_kernel_for_death_signal = slow\n"
            "os.environ['TORCHELASTIC_RUN_ID'] = 'none'\n"
        ),
    )
    errors = tmp_path / "errors"
    start = f"import subprocess, time; subprocess.Popen({[sys.executable, str(program), str(tmp_path)]!r}, "
    start += f"stderr=open({str(errors)!r}, 'w')); time.sleep(120)"
    with subprocess.Popen([sys.executable, "-c", start]) as parent:
        wait_for((tmp_path / "asking").exists, 30, "the rank to ask")
        parent.kill()
    wait_for(lambda: "the launcher is gone" in errors.read_text(), 5, "the rank to end")
    assert announced(tmp_path) == {}


def test_process_without_launcher_lives_on(tmp_path: Path) -> None:
    program = write_program(tmp_path)
    start = f"import subprocess; subprocess.Popen({[sys.executable, str(program), str(tmp_path)]!r})"
    subprocess.run([sys.executable, "-c", start], check=True)
    wait_for(lambda: announced(tmp_path), 30, "the process")
    ((pid, following),) = announced(tmp_path).items()
    try:
        assert following == "False"
        with pytest.raises(AssertionError, match="in vain"):
            wait_for(lambda: not is_running(pid), 3 * POLL_SECONDS, "an end that must not come")
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("value", ["", "x", "1234", "host:boot:namespace:-1:5", "host:boot:namespace:12:"])
def test_launcher_that_is_no_token_is_an_error(value: str) -> None:
    with pytest.raises(LaunchError, match=f"{LAUNCHER}='{value}' names no launcher"):
        end_with_parent({LAUNCHER: value})


@pytest.mark.parametrize("field", [0, 1, 2], ids=["host", "boot", "pid namespace"])
def test_launcher_of_another_host_boot_or_namespace_is_none_of_ours(field: int) -> None:
    fields = launcher_token().split(":")
    fields[field] += "0"
    fields[3] = "999999999"  # it would be gone if it were one of this host
    assert end_with_parent({LAUNCHER: ":".join(fields)}) is False


def test_process_that_took_over_the_launcher_s_id_is_not_the_launcher(tmp_path: Path) -> None:
    place = token_of(os.getpid()).rsplit(":", 1)[0]
    done = subprocess.run(
        [sys.executable, str(write_program(tmp_path)), str(tmp_path)],
        env=os.environ | {LAUNCHER: f"{place}:7"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert f"the launcher (pid {os.getpid()}) is gone" in done.stderr


def test_start_time_names_a_process_and_ends_with_it() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        begun = start_time(process.pid)
        assert begun is not None
        assert begun == start_time(process.pid)
        process.kill()
        # It is a zombie until it is waited for, and counts as gone.
        wait_for(lambda: start_time(process.pid) is None, 5, "the process to be gone")
