"""`rankwise logs` as a person calls it."""

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankwise.logreader import describe, main
from rankwise.logreader.streams import Tally

CODE = "import sys; from rankwise.logreader import main; sys.exit(main(sys.argv[1:]))"
# In development mode the interpreter tells of errors at its end that it else keeps to itself.
COMMAND = [sys.executable, "-X", "dev", "-c", CODE]
PATIENCE_SECONDS = 60.0


def start(*arguments: object, **more: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, **more)


def read_until(descriptor: int, wanted: bytes) -> bytes:
    """What comes, up to and with `wanted`."""
    content, end = b"", time.monotonic() + PATIENCE_SECONDS
    while wanted not in content:
        ready, _, _ = select.select([descriptor], [], [], max(end - time.monotonic(), 0))
        assert ready, f"{wanted!r} did not come; {content!r} did"
        block = os.read(descriptor, 65536)
        assert block, f"{wanted!r} did not come; {content!r} did, and the end"
        content += block
    return content


def wait_until_full(descriptor: int) -> None:
    """Wait until who writes into the pipe has to wait, as for a pager that nobody scrolls."""
    size, end = fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ), time.monotonic() + PATIENCE_SECONDS
    num_waiting = 0
    while num_waiting < size // 2:
        assert time.monotonic() < end
        time.sleep(0.2)
        num_waiting = int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)
    time.sleep(0.2)


@pytest.fixture
def follower(logs: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """`rankwise logs --follow` on a run whose first line it has shown."""
    logs.write(0, 0, "begun")
    process = start(logs.run, "--follow", stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        read_until(process.stdout.fileno(), b"begun\n")
        yield process
    finally:
        process.kill()
        process.communicate()


def test_what_eight_ranks_say_alike_is_one_line_and_a_lone_warning_another(logs: Any, capfd: Any) -> None:
    for rank in range(8):
        logs.write(rank, rank / 100, "using 4 threads")
    logs.write(5, 1, "disk is slow", level="WARNING")
    assert main([str(logs.run)]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        "2026-05-01T12:00:00.000Z INFO     rank 0  train: using 4 threads  (x8, ranks 0-7)",
        "2026-05-01T12:00:01.000Z WARNING  rank 5  train: disk is slow",
    ]
    assert err == ""


def test_filters_work_together(logs: Any, capfd: Any) -> None:
    logs.write_training(8, 20)
    assert main([str(logs.run), "--rank", "2-3", "--steps", "4:5", "--text", "step 5", "--no-fold"]) == 0
    assert [line.partition("rank ")[2][0] for line in capfd.readouterr().out.splitlines()] == ["3", "2"]


def test_json_is_every_record_as_it_was_written(logs: Any, capfd: Any) -> None:
    logs.write_training(4, 10)
    assert main([str(logs.run), "--json"]) == 0
    shown = capfd.readouterr().out.splitlines()
    assert len(shown) == 40
    written = [line for path in logs.folder.iterdir() for line in path.read_text().splitlines()]
    assert sorted(shown) == sorted(written)
    assert [json.loads(line)["time"] for line in shown] == sorted(json.loads(line)["time"] for line in written)


def test_no_match_is_no_error(logs: Any, capfd: Any) -> None:
    logs.write(0, 0, "a")
    assert main([str(logs.run), "--level", "critical"]) == 0
    assert capfd.readouterr() == ("", "")


def test_ranks_that_are_not_there_are_told_from_those_that_are(logs: Any, capfd: Any) -> None:
    for rank in range(4):
        logs.write(rank, 0, "a")
    assert main([str(logs.run), "--rank", "9"]) == 0
    assert capfd.readouterr() == ("", "rankwise logs: none of these ranks; there are 0-3\n")


def test_the_logs_folder_itself_may_be_named(logs: Any, capfd: Any) -> None:
    logs.write(0, 0, "a")
    assert main([str(logs.folder)]) == 0
    assert capfd.readouterr().out.endswith("train: a\n")


@pytest.mark.parametrize(
    ("name", "said"), [("elsewhere", "there is no folder"), ("run", "no logs in"), ("file", "there is no folder")]
)
def test_where_there_are_no_logs_is_one_message_and_status_two(
    logs: Any, tmp_path: Path, capfd: Any, name: str, said: str
) -> None:
    (tmp_path / "file").write_text("")
    (logs.folder / "notes.txt").write_text("")
    assert main([str(tmp_path / name)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1


def test_an_option_that_is_not_understood_is_one_message_and_status_two(capfd: Any) -> None:
    assert main(["run", "--rank", "x"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_help_tells_the_options(capfd: Any) -> None:
    assert main(["--help"]) == 0
    assert "--steps A:B" in capfd.readouterr().out


def test_torn_and_foreign_lines_are_counted_at_the_end(logs: Any, capfd: Any) -> None:
    logs.append("rank-00000.jsonl", b"\x00\xff{[\n" + logs.line(0, 0, "whole") + logs.line(0, 1, "torn")[:50])
    assert main([str(logs.run)]) == 0
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    assert err == "rankwise logs: 2 lines are no whole log records: rank-00000.jsonl (2)\n"


def test_a_file_that_cannot_be_read_is_told_and_the_others_are_shown(logs: Any, capfd: Any) -> None:
    logs.write(0, 0, "a")
    (logs.folder / "rank-00001.jsonl").mkdir()
    assert main([str(logs.run)]) == 1
    out, err = capfd.readouterr()
    assert out.endswith("train: a\n")
    assert err == "rankwise logs: cannot read rank-00001.jsonl: Is a directory\n"


def test_very_many_bad_files_are_told_in_few_lines() -> None:
    names = [f"rank-{rank:05d}.jsonl" for rank in range(20)]
    tally = Tally(num_foreign=dict.fromkeys(names, 2), unreadable=dict.fromkeys(names, "Permission denied"))
    lines = describe(tally)
    assert len(lines) == 8
    assert lines[6] == "cannot read 14 more files"
    assert lines[7].startswith("40 lines are no whole log records: rank-00000.jsonl (2), ")
    assert lines[7].endswith(", and 14 more files")


def test_half_a_character_does_not_end_it(logs: Any, capfd: Any) -> None:
    logs.write(0, 0, "name \udce9")
    assert main([str(logs.run)]) == 0
    assert capfd.readouterr().out.endswith("name \\udce9\n")


def test_a_reader_that_has_seen_enough_ends_it_silently(logs: Any) -> None:
    logs.write_training(4, 1000)
    process = start(logs.run, "--no-fold", stdout=subprocess.PIPE)
    assert process.stdout is not None
    read_until(process.stdout.fileno(), b"\n")
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(PATIENCE_SECONDS) == 0
    process.stderr.close()


def test_an_output_that_is_full_is_one_message_and_status_one(logs: Any) -> None:
    logs.write(0, 0, "a")
    with open("/dev/full", "wb") as full:
        process = start(logs.run, stdout=full)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert err == b"error: the output cannot be written: No space left on device\n"
    assert process.returncode == 1


def test_an_output_that_is_closed_is_one_message_and_status_one(logs: Any) -> None:
    logs.write(0, 0, "a")
    process = start(logs.run, preexec_fn=lambda: os.close(1))
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert err == b"error: the output cannot be written: stdout is closed\n"
    assert process.returncode == 1


def test_ctrl_c_cuts_it_short_without_a_traceback(logs: Any) -> None:
    logs.write_training(4, 1000)
    process = start(logs.run, "--no-fold", stdout=subprocess.PIPE)
    assert process.stdout is not None
    wait_until_full(process.stdout.fileno())
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_SECONDS) == 130
    assert process.communicate()[1] == b""


def test_follow_shows_new_lines_and_ends_with_ctrl_c(logs: Any, follower: "subprocess.Popen[bytes]") -> None:
    assert follower.stdout is not None
    logs.append("rank-00000.jsonl", logs.line(0, 1, "cut in two")[:-20])
    logs.write(3, 1, "a new rank")
    assert b"cut in two" not in read_until(follower.stdout.fileno(), b"a new rank\n")
    logs.append("rank-00000.jsonl", logs.line(0, 1, "cut in two")[-20:])
    read_until(follower.stdout.fileno(), b"cut in two\n")
    follower.send_signal(signal.SIGINT)
    out, err = follower.communicate(timeout=PATIENCE_SECONDS)
    assert (out, err, follower.returncode) == (b"", b"", 0)


def test_follow_goes_on_through_a_rotation(logs: Any, follower: "subprocess.Popen[bytes]") -> None:
    assert follower.stdout is not None
    logs.write(0, 1, "before")
    (logs.folder / "rank-00000.jsonl").rename(logs.folder / "rank-00000.000001.jsonl")
    logs.write(0, 2, "after")
    shown = read_until(follower.stdout.fileno(), b"after\n")
    assert shown.count(b"before\n") == 1


def test_follow_begins_with_the_last_lines(logs: Any) -> None:
    for i in range(30):
        logs.write(0, i, f"line {i}")
    process = start(logs.run, "--follow", "--tail", "3", stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert read_until(process.stdout.fileno(), b"line 29\n").count(b"\n") == 3
    finally:
        process.kill()
        process.communicate()


def test_follow_waits_for_a_run_that_has_not_begun(logs: Any) -> None:
    logs.folder.rmdir()
    process = start(logs.run, "--follow", stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        read_until(process.stderr.fileno(), b"yet; waiting\n")
        logs.folder.mkdir()
        logs.write(0, 0, "first")
        read_until(process.stdout.fileno(), b"first\n")
    finally:
        process.kill()
        process.communicate()


def test_a_terminal_gets_colour(logs: Any) -> None:
    logs.write(0, 0, "bad", level="ERROR")
    ours, theirs = pty.openpty()
    environ = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = start(logs.run, stdout=theirs, env=environ | {"TERM": "xterm-256color"})
    os.close(theirs)
    try:
        assert b"\x1b[1;31mbad" in read_until(ours, b"bad\x1b[0m")
    finally:
        process.communicate(timeout=PATIENCE_SECONDS)
        os.close(ours)
    assert process.returncode == 0


def test_it_needs_no_torch(logs: Any) -> None:
    logs.write(0, 0, "a")
    code = (
        "import sys\n"
        "from rankwise.logreader import main\n"
        "status = main(sys.argv[1:])\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'torch was imported'\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(logs.run)], capture_output=True, timeout=PATIENCE_SECONDS)
    assert (done.returncode, done.stderr) == (0, b"")


def peak_mib(run: Path) -> float:
    """The largest memory that reading the run takes."""
    reader, writer = os.pipe()
    process = start(run, stdout=subprocess.DEVNULL, pass_fds=[writer])
    os.close(writer)
    os.close(reader)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.returncode == 0
    return usage.ru_maxrss / 1024


def test_memory_does_not_grow_with_the_number_of_records(logs: Any, tmp_path: Path) -> None:
    logs.write_training(16, 300)
    few = peak_mib(logs.run)
    for path in logs.folder.iterdir():
        path.write_bytes(path.read_bytes() * 20)
    assert sum(path.stat().st_size for path in logs.folder.iterdir()) > 20 << 20
    assert peak_mib(logs.run) < few + 80


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_1024_ranks_of_10000_records_merge_in_flat_memory(logs: Any) -> None:
    try:
        logs.write_training(1024, 10_000)
        assert peak_mib(logs.run) < 400
    finally:
        shutil.rmtree(logs.run)  # gigabytes
