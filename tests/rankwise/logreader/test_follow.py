"""Reading once, and going on with what is written."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from rankwise.logreader import follow
from rankwise.logreader.filters import build_filter
from rankwise.logreader.folding import Group
from rankwise.logreader.follow import follow_groups, read_groups
from rankwise.logreader.merge import Streams
from rankwise.logreader.options import parse_options


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(follow, "time", clock)
    return clock


@pytest.fixture
def streams(logs: Any) -> Iterator[Streams]:
    opened = Streams(logs.folder, None, build_filter(parse_options(["run"], datetime.now(UTC))))
    yield opened
    opened.close()


def until_pause(groups: Iterator[Group | None]) -> list[tuple[str, int]]:
    found = []
    while (group := next(groups)) is not None:
        found.append((group.first.fields["message"], group.count))
    return found


def test_the_tail_is_the_last_lines_after_folding(logs: Any, streams: Streams) -> None:
    for rank in range(4):
        for i, message in enumerate(["a", "b", "c"]):
            logs.write(rank, i + rank / 10, message)
    streams.refresh()
    groups = read_groups(streams, is_folded=True, tail=2, is_final=True)
    assert [(group.first.fields["message"], group.count) for group in groups] == [("b", 4), ("c", 4)]


@pytest.mark.parametrize("tail", [0, 1, 7, 100, 700, 10_000])
@pytest.mark.parametrize("quiet", [False, True], ids=["equally", "one rank seldom"])
def test_the_tail_is_read_from_the_ends_of_files_and_is_the_same(
    logs: Any, streams: Streams, monkeypatch: pytest.MonkeyPatch, tail: int, quiet: bool
) -> None:
    monkeypatch.setattr(follow, "_TAIL_BYTES", 500)
    logs.write_training(3, 300)
    logs.append("rank-00007.jsonl", b"".join(logs.line(7, i * 10, "seldom") for i in range(3 if quiet else 300)))
    (logs.folder / "rank-00001.jsonl").rename(logs.folder / "rank-00001.000001.jsonl")
    logs.write(1, 31, "after a rotation")
    streams.refresh()

    def lines(tail: int | None) -> list[bytes]:
        return [group.first.line for group in read_groups(streams, is_folded=False, tail=tail, is_final=True)]

    last = lines(tail)
    streams.go_back(1 << 30)
    assert last == lines(None)[-tail:] if tail else last == []


def test_a_short_tail_does_not_read_whole_files(logs: Any, streams: Streams) -> None:
    logs.append("rank-00000.jsonl", b"foreign\n" * 100_000)
    for i in range(1000):
        logs.write(0, i, "x")
    streams.refresh()
    assert len(list(read_groups(streams, is_folded=False, tail=5, is_final=True))) == 5
    assert not streams.tally.num_foreign


def test_a_foreign_line_is_counted_once_however_often_the_end_is_read(
    logs: Any, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "_TAIL_BYTES", 500)
    for i in range(100):
        logs.write(0, i, "x")
    logs.append("rank-00000.jsonl", b"foreign\n")
    streams.refresh()
    assert len(list(read_groups(streams, is_folded=False, tail=90, is_final=True))) == 90
    assert streams.tally.num_foreign == {"rank-00000.jsonl": 1}


def test_a_line_is_shown_a_second_after_it_was_read_with_all_who_said_it(logs: Any, streams: Streams) -> None:
    groups = follow_groups(streams, is_folded=True)
    assert until_pause(groups) == []
    logs.write(0, 0.0, "slow")
    assert until_pause(groups) == []
    logs.write(1, 0.3, "slow")  # a file that is new
    shown = [until_pause(groups) for _ in range(6)]
    assert [lines for lines in shown if lines] == [[("slow", 2)]]


def test_unfolded_lines_are_shown_at_once(logs: Any, streams: Streams) -> None:
    groups = follow_groups(streams, is_folded=False)
    assert until_pause(groups) == []
    logs.write(0, 0.0, "slow")
    logs.write(1, 0.0, "slow")
    assert until_pause(groups) == [("slow", 1), ("slow", 1)]


def test_what_is_held_back_is_shown_when_ctrl_c_ends_it(
    logs: Any, streams: Streams, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    logs.write(0, 0.0, "last words")
    streams.refresh()
    groups = follow_groups(streams, is_folded=True)
    assert until_pause(groups) == []
    monkeypatch.setattr(clock, "sleep", interrupt)
    assert [group.first.fields["message"] for group in groups if group] == ["last words"]


def test_a_folder_that_vanishes_and_comes_back_is_followed(logs: Any, streams: Streams) -> None:
    groups = follow_groups(streams, is_folded=False)
    logs.write(0, 0.0, "a")
    assert until_pause(groups) == [("a", 1)]
    (logs.folder / "rank-00000.jsonl").unlink()
    logs.folder.rmdir()
    assert until_pause(groups) == []
    logs.folder.mkdir()
    logs.write(0, 0.0, "b")
    assert until_pause(groups) + until_pause(groups) == [("b", 1)]
