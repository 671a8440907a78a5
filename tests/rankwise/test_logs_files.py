"""A file of whole lines, whatever happens to the disk and to the process."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.logs.files import LinesFile, rotated_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_full_file_is_renamed_and_a_larger_number_is_newer(tmp_path: Path) -> None:
    lines = LinesFile(tmp_path / "rank-00000.jsonl", max_bytes=30)
    for number in range(5):
        assert lines.write([b"%d" % number + b"." * 8 + b"\n"] * 2) == 2
    lines.close()
    assert names(tmp_path) == [
        "rank-00000.000001.jsonl",
        "rank-00000.000002.jsonl",
        "rank-00000.000003.jsonl",
        "rank-00000.jsonl",
    ]
    content = b"".join((tmp_path / name).read_bytes() for name in names(tmp_path))
    assert content == b"".join(b"%d" % number + b"." * 8 + b"\n" for number in range(5) for _ in range(2))


def test_many_lines_at_once_are_spread_over_files(tmp_path: Path) -> None:
    lines = LinesFile(tmp_path / "a.jsonl", max_bytes=25)
    assert lines.write([b"123456789\n"] * 5) == 5
    lines.close()
    assert [(tmp_path / name).stat().st_size for name in names(tmp_path)] == [20, 20, 10]


def test_line_longer_than_a_file_may_be_is_kept_whole(tmp_path: Path) -> None:
    lines = LinesFile(tmp_path / "a.jsonl", max_bytes=10)
    lines.write([b"x" * 50 + b"\n", b"y\n"])
    lines.close()
    assert [(tmp_path / name).stat().st_size for name in names(tmp_path)] == [51, 2]


def test_oldest_files_beyond_the_wanted_number_are_removed(tmp_path: Path) -> None:
    lines = LinesFile(tmp_path / "a.jsonl", max_bytes=10, num_backups=2)
    for number in range(6):
        lines.write([b"%d........\n" % number])
    lines.close()
    assert names(tmp_path) == ["a.000004.jsonl", "a.000005.jsonl", "a.jsonl"]
    none = LinesFile(tmp_path / "b.jsonl", max_bytes=10, num_backups=0)
    for number in range(3):
        none.write([b"%d........\n" % number])
    none.close()
    assert (tmp_path / "b.jsonl").read_bytes() == b"2........\n"
    assert [name for name in names(tmp_path) if name.startswith("b")] == ["b.jsonl"]


def test_next_process_goes_on_with_the_numbers_and_the_file(tmp_path: Path) -> None:
    rotated_path(tmp_path / "a.jsonl", 41).write_text("old\n")
    (tmp_path / "a.worker-7.000099.jsonl").write_text("another's\n")
    (tmp_path / "a.jsonl").write_text("12345\n")
    lines = LinesFile(tmp_path / "a.jsonl", max_bytes=10)
    lines.write([b"67\n", b"89\n"])
    lines.close()
    assert (tmp_path / "a.000042.jsonl").read_text() == "12345\n67\n"
    assert (tmp_path / "a.jsonl").read_text() == "89\n"


def test_file_that_cannot_be_renamed_grows_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.EACCES, "no")

    monkeypatch.setattr(os, "rename", refuse)
    lines = LinesFile(tmp_path / "a.jsonl", max_bytes=5)
    assert lines.write([b"1234\n", b"5678\n"]) == 2
    lines.close()
    assert (tmp_path / "a.jsonl").read_text() == "1234\n5678\n"


def test_line_that_a_kill_has_cut_does_not_run_into_the_next(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"cut')
    lines = LinesFile(tmp_path / "a.jsonl")
    assert lines.write([b"whole\n"]) == 1
    lines.close()
    assert (tmp_path / "a.jsonl").read_text() == '{"cut\nwhole\n'


def test_full_disk_costs_the_lines_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = LinesFile(tmp_path / "a.jsonl")
    write = os.write
    room = [12]

    def write_until_full(descriptor: int, content: bytes) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= (num_written := write(descriptor, content[: room[0]]))
        return num_written

    monkeypatch.setattr(os, "write", write_until_full)
    assert lines.write([b"1234\n", b"5678\n", b"90ab\n", b"cdef\n"]) == 2
    assert lines.write([b"lost\n"]) == 0
    assert lines.num_dropped == 3
    monkeypatch.setattr(os, "write", write)
    assert lines.write([b"after\n"]) == 1
    lines.close()
    assert (tmp_path / "a.jsonl").read_text() == "1234\n5678\n90\nafter\n"
    (told,) = capsys.readouterr().err.splitlines()
    assert "12 of 20 bytes written" in told


def test_file_size_limit_of_the_system_is_met_in_the_same_way(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from rankwise.logs.files import LinesFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
lines = LinesFile(Path({str(tmp_path / "a.jsonl")!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (12, {resource.RLIM_INFINITY}))
print(lines.write([b"1234\\n"] * 4), lines.num_dropped)
resource.setrlimit(resource.RLIMIT_FSIZE, ({resource.RLIM_INFINITY}, {resource.RLIM_INFINITY}))
print(lines.write([b"after\\n"]), lines.num_dropped)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 2\n1 2\n", done.stderr
    assert (tmp_path / "a.jsonl").read_text() == "1234\n1234\n12\nafter\n"


def test_file_that_was_removed_is_begun_anew(tmp_path: Path) -> None:
    lines = LinesFile(tmp_path / "a.jsonl")
    assert lines.write([b"one\n"]) == 1
    (tmp_path / "a.jsonl").unlink()
    assert lines.write([b"two\n"]) == 1
    lines.close()
    assert (tmp_path / "a.jsonl").read_bytes() == b"two\n"


def test_lines_are_counted_while_the_folder_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    lines = LinesFile(folder / "a.jsonl")
    lines.write([b"one\n"])
    shutil.rmtree(folder)
    assert (lines.write([b"two\n"]), lines.write([b"three\n", b"four\n"]), lines.num_dropped) == (0, 0, 3)
    assert capsys.readouterr().err.count("cannot write") == 1
    assert not folder.exists()
    folder.mkdir()
    assert lines.write([b"five\n"]) == 1
    lines.close()
    assert (folder / "a.jsonl").read_bytes() == b"five\n"
