"""The files of one process as one stream, while they grow, are rotated and removed."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.logreader import streams
from rankwise.logreader.streams import Stream, Tally, find_streams, rank_of, worker_of

STEM = "rank-00000"


@pytest.fixture(params=[True, False], ids=["kept open", "opened for each block"])
def stream(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    made = Stream(tmp_path, STEM, Tally(), block_bytes=16, keep_open=request.param)
    yield made
    made.close()


def read(stream: Stream, folder: Path, *, is_final: bool = False) -> list[bytes]:
    """What is new, after a look at the folder."""
    stream.update(find_streams(os.listdir(folder)).get(STEM, {}))
    return list(stream.lines(is_final=is_final))


def test_files_are_found_by_rank_and_worker() -> None:
    names = [
        "rank-00010.jsonl",
        "rank-00002.jsonl",
        "rank-00002.worker-77.jsonl",
        "rank-00002.000002.jsonl",
        "rank-00002.000001.jsonl",
        "rank-00002.worker-77.000001.jsonl",
        "rank-00003.jsonl.swp",
        "rank-x.jsonl",
        "notes.txt",
        "rank-99999999999999.jsonl",
    ]
    found = find_streams(names)
    assert list(found) == ["rank-00002", "rank-00002.worker-77", "rank-00010"]
    assert found["rank-00002"] == {1: "rank-00002.000001.jsonl", 2: "rank-00002.000002.jsonl"}
    assert [(rank_of(stem), worker_of(stem)) for stem in found] == [(2, None), (2, 77), (10, None)]


def test_rotated_files_are_read_from_the_oldest_on(stream: Stream, tmp_path: Path) -> None:
    (tmp_path / f"{STEM}.jsonl").write_bytes(b"e\n")
    (tmp_path / f"{STEM}.000010.jsonl").write_bytes(b"d\n")
    (tmp_path / f"{STEM}.000009.jsonl").write_bytes(b"a\nb\nc\n")
    assert read(stream, tmp_path, is_final=True) == [b"a", b"b", b"c", b"d", b"e"]


@given(st.lists(st.binary(max_size=40).map(lambda part: part.replace(b"\n", b"")), max_size=20), st.integers(1, 64))
def test_lines_are_whole_whatever_the_size_of_a_block(tmp_path_factory: Any, parts: list[bytes], size: int) -> None:
    folder = tmp_path_factory.mktemp("logs")
    (folder / f"{STEM}.jsonl").write_bytes(b"\n".join(parts))
    stream = Stream(folder, STEM, Tally(), block_bytes=size, keep_open=True)
    assert read(stream, folder, is_final=True) == [part for part in parts if part]


def test_an_unfinished_line_of_a_live_file_waits_for_its_rest(stream: Stream, tmp_path: Path) -> None:
    path = tmp_path / f"{STEM}.jsonl"
    assert read(stream, tmp_path) == []
    path.write_bytes(b"one\ntwo and a half, longer than a block")
    assert read(stream, tmp_path) == [b"one"]
    assert read(stream, tmp_path) == []
    with path.open("ab") as file:
        file.write(b", whole\nthree")
    assert read(stream, tmp_path) == [b"two and a half, longer than a block, whole"]
    assert read(stream, tmp_path, is_final=True) == [b"three"]


def test_nothing_is_lost_or_doubled_when_a_live_file_is_rotated(stream: Stream, tmp_path: Path) -> None:
    current = tmp_path / f"{STEM}.jsonl"
    current.write_bytes(b"1\n2\n")
    assert read(stream, tmp_path) == [b"1", b"2"]
    with current.open("ab") as file:
        file.write(b"3\n")
    current.rename(tmp_path / f"{STEM}.000001.jsonl")
    assert read(stream, tmp_path) == [b"3"]
    current.write_bytes(b"4\n")
    current.rename(tmp_path / f"{STEM}.000002.jsonl")
    current.write_bytes(b"5\n")
    assert read(stream, tmp_path) == [b"4", b"5"]


def test_a_file_rotated_after_the_look_at_the_folder_is_still_read_in_order(stream: Stream, tmp_path: Path) -> None:
    current = tmp_path / f"{STEM}.jsonl"
    current.write_bytes(b"1\n")
    stream.update({})
    current.rename(tmp_path / f"{STEM}.000001.jsonl")
    current.write_bytes(b"2\n")
    assert list(stream.lines(is_final=False)) == [b"1"]
    assert read(stream, tmp_path) == [b"2"]


def test_rotated_files_that_were_removed_are_passed_over(stream: Stream, tmp_path: Path) -> None:
    current = tmp_path / f"{STEM}.jsonl"
    current.write_bytes(b"1\n")
    assert read(stream, tmp_path) == [b"1"]
    (tmp_path / f"{STEM}.000004.jsonl").write_bytes(b"4\n")
    current.unlink()
    current.write_bytes(b"5\n")
    assert read(stream, tmp_path) == [b"4", b"5"]


def test_a_run_begun_anew_is_read_from_its_start(stream: Stream, tmp_path: Path) -> None:
    current = tmp_path / f"{STEM}.jsonl"
    current.write_bytes(b"first run\n")
    assert read(stream, tmp_path) == [b"first run"]
    current.unlink()
    current.write_bytes(b"2nd\n")
    assert read(stream, tmp_path) + read(stream, tmp_path) == [b"2nd"]


@given(st.lists(st.integers(1, 12), max_size=12), st.integers(0, 12), st.integers(0, 120))
def test_going_back_gives_the_last_whole_lines(tmp_path_factory: Any, sizes: list[int], cut: int, back: int) -> None:
    folder = tmp_path_factory.mktemp("logs")
    lines = [f"{i:x}".encode() * size for i, size in enumerate(sizes)]
    (folder / f"{STEM}.000001.jsonl").write_bytes(b"".join(line + b"\n" for line in lines[:cut]))
    (folder / f"{STEM}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines[cut:]))
    stream = Stream(folder, STEM, Tally(), block_bytes=16, keep_open=False)
    stream.update(find_streams(os.listdir(folder))[STEM])
    has_more = stream.go_back(back)
    found = list(stream.lines(is_final=True))
    assert found == lines[len(lines) - len(found) :]
    whole = [line for i, line in enumerate(lines) if sum(map(len, lines[i:])) + len(lines[i:]) < back]
    assert len(found) >= len(whole) - 1  # "about": the line that begins just there may be left out
    assert has_more or found == lines


def test_a_file_without_line_ends_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 64)
    (tmp_path / f"{STEM}.jsonl").write_bytes(b"x" * 1000 + b"\nnext\n")
    lines = read(Stream(tmp_path, STEM, Tally(), block_bytes=16, keep_open=True), tmp_path, is_final=True)
    assert max(map(len, lines)) <= 80
    assert b"".join(lines) == b"x" * 1000 + b"next"
    assert lines[-1] == b"next"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["a folder", "a named pipe"])
def test_what_is_no_file_is_told_and_not_waited_for(make: Any, stream: Stream, tmp_path: Path) -> None:
    make(tmp_path / f"{STEM}.jsonl")
    assert read(stream, tmp_path, is_final=True) == []
    assert list(stream._tally.unreadable) == [f"{STEM}.jsonl"]
