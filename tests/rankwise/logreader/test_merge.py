"""The records of all ranks by time."""

import os
import resource
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.logreader import merge
from rankwise.logreader.filters import build_filter
from rankwise.logreader.merge import Streams
from rankwise.logreader.options import parse_options


def open_streams(folder: Any, *arguments: str) -> Streams:
    options = parse_options(["run", *arguments], datetime.now(UTC))
    return Streams(folder, options.ranks, build_filter(options))


def messages(streams: Streams, *, is_final: bool = True) -> list[str]:
    return [entry.fields["message"] for entry in streams.entries(is_final=is_final)]


@pytest.fixture
def few_files() -> Iterator[None]:
    """Lets the process open little more than it has open now, whatever the system would let it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_ranks_are_merged_by_time_and_at_one_time_by_rank(logs: Any) -> None:
    logs.write(1, 1.0, "b")
    logs.write(1, 3.0, "e")
    logs.write(0, 2.0, "c")
    logs.write(0, 3.0, "d")
    logs.append("rank-00000.worker-9.jsonl", logs.line(0, 0.5, "a"))
    assert messages(open_streams(logs.folder)) == ["a", "b", "c", "d", "e"]


def test_rotated_files_are_merged_too(logs: Any) -> None:
    logs.append("rank-00000.000001.jsonl", logs.line(0, 1, "a"))
    logs.write(1, 2, "b")
    logs.write(0, 3, "c")
    assert messages(open_streams(logs.folder)) == ["a", "b", "c"]


def test_a_clock_set_back_does_not_change_the_order_within_a_rank(logs: Any) -> None:
    for seconds, message in ((5, "0a"), (1, "0b"), (6, "0c")):
        logs.write(0, seconds, message)
    logs.write(1, 5.5, "1a")
    assert messages(open_streams(logs.folder)) == ["0a", "0b", "1a", "0c"]


def test_only_files_of_wanted_ranks_are_read(logs: Any) -> None:
    for rank in range(6):
        logs.write(rank, rank, str(rank))
    logs.append("rank-00003.jsonl", b"foreign\n")
    streams = open_streams(logs.folder, "--rank", "1,4-")
    assert messages(streams) == ["1", "4", "5"]
    assert streams.known_ranks == set(range(6))
    assert not streams.tally.num_foreign


def test_foreign_and_torn_lines_are_counted_by_file(logs: Any) -> None:
    logs.write(0, 0, "a")
    logs.append("rank-00000.jsonl", b"Killed\n\n\n" + logs.line(0, 1, "torn")[:90] + b"\n")
    logs.write(0, 2, "b")
    logs.append("rank-00001.jsonl", logs.line(1, 3, "cut by the end")[:-9])
    streams = open_streams(logs.folder)
    assert messages(streams) == ["a", "b"]
    assert streams.tally.num_foreign == {"rank-00000.jsonl": 2, "rank-00001.jsonl": 1}


def test_a_last_record_without_line_end_counts(logs: Any) -> None:
    logs.append("rank-00000.jsonl", logs.line(0, 0, "whole").rstrip())
    assert messages(open_streams(logs.folder)) == ["whole"]


def test_new_files_and_new_lines_come_with_the_next_look(logs: Any) -> None:
    logs.write(0, 0, "a")
    streams = open_streams(logs.folder)
    assert messages(streams, is_final=False) == ["a"]
    logs.write(1, 1, "b")
    logs.append("rank-00000.jsonl", logs.line(0, 2, "c")[:-30])
    streams.refresh()
    assert messages(streams, is_final=False) == ["b"]
    logs.append("rank-00000.jsonl", logs.line(0, 2, "c")[-30:])
    streams.refresh()
    assert messages(streams, is_final=False) == ["c"]
    streams.close()


@given(st.lists(st.binary(max_size=300), max_size=4))
def test_any_bytes_are_merged_or_counted(tmp_path_factory: Any, contents: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("logs")
    for rank, content in enumerate(contents):
        (folder / f"rank-{rank:05d}.jsonl").write_bytes(content)
    streams = open_streams(folder)
    num_lines = sum(len([line for line in content.split(b"\n") if line]) for content in contents)
    assert len(messages(streams)) + sum(streams.tally.num_foreign.values()) == num_lines


def test_64_ranks_of_500_records_come_out_once_and_in_order(logs: Any) -> None:
    logs.write_training(64, 500)
    entries = list(open_streams(logs.folder).entries(is_final=True))
    assert len(entries) == 64 * 500
    assert all(before.time <= after.time for before, after in pairwise(entries))
    for rank in range(64):
        assert [entry.fields["step"] for entry in entries if entry.rank == rank] == list(range(500))


@pytest.mark.usefixtures("few_files")
def test_more_files_than_may_be_open_are_merged(logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge.resource, "setrlimit", refuse)
    monkeypatch.setattr(merge, "_BLOCKS_BYTES", 0)
    logs.write_training(60, 150)
    entries = list(open_streams(logs.folder).entries(is_final=True))
    assert len(entries) == 60 * 150
    assert all(before.time <= after.time for before, after in pairwise(entries))


@pytest.mark.usefixtures("few_files")
def test_the_limit_of_open_files_is_raised_where_it_may_be(logs: Any) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    logs.write_training(soft, 1)
    open_streams(logs.folder)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > soft


def refuse(*arguments: object) -> None:
    raise ValueError("not allowed to raise maximum limit")
