"""Records of many ranks as one, where they say the same."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from rankwise.logreader import folding
from rankwise.logreader.folding import Folder, Group, fold
from rankwise.logreader.merge import Entry
from rankwise.logreader.records import read_head


def entry(logs: Any, rank: int, seconds: float, message: str, **more: Any) -> Entry:
    line = logs.line(rank, seconds, message, **more)
    head = read_head(line)
    assert head is not None
    return Entry(head.time, rank, line, logs.record(rank, seconds, message, **more), rank, None)


def said(groups: list[Group]) -> list[tuple[str, int, tuple[int, ...], bool]]:
    return [(group.first.fields["message"], group.count, group.ranks, group.differs) for group in groups]


def test_equal_lines_of_512_ranks_are_one(logs: Any) -> None:
    groups = list(fold((entry(logs, rank, rank / 1000, "slow storage") for rank in range(512)), 5.0))
    assert said(groups) == [("slow storage", 512, tuple(range(512)), False)]


def test_lines_that_differ_in_numbers_are_one_and_show_the_first(logs: Any) -> None:
    groups = list(fold((entry(logs, rank, rank / 1000, f"{10 + rank} GiB free") for rank in (3, 5)), 5.0))
    assert said(groups) == [("10 GiB free".replace("10", "13"), 2, (3, 5), True)]


def test_what_one_rank_says_again_with_other_numbers_stays_apart(logs: Any) -> None:
    groups = list(fold([entry(logs, 0, 0.0, "loss 1.5"), entry(logs, 0, 0.1, "loss 1.4")], 5.0))
    assert [group.count for group in groups] == [1, 1]


def test_lines_of_ranks_meet_one_by_one_even_where_a_rank_runs_ahead(logs: Any) -> None:
    order = [(0, 1), (0, 2), (1, 1), (0, 3), (1, 2), (1, 3)]
    entries = [entry(logs, rank, i / 10, f"loss {10 * number + rank}") for i, (rank, number) in enumerate(order)]
    assert said(list(fold(entries, 5.0))) == [(f"loss {10 * number}", 2, (0, 1), True) for number in (1, 2, 3)]


def test_an_equal_line_is_preferred_to_an_earlier_near_one(logs: Any) -> None:
    entries = [entry(logs, 0, 0.0, "epoch 1"), entry(logs, 0, 0.1, "epoch 2"), entry(logs, 1, 0.2, "epoch 2")]
    assert said(list(fold(entries, 5.0))) == [("epoch 1", 1, (0,), False), ("epoch 2", 2, (0, 1), False)]


def test_what_one_rank_repeats_is_one_line(logs: Any) -> None:
    entries = [entry(logs, 7, i / 100, "retrying") for i in range(20)]
    assert said(list(fold(entries, 5.0))) == [("retrying", 20, (7,), False)]


def test_lines_of_other_steps_levels_loggers_and_errors_are_not_equal(logs: Any) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"step": 1},
        {"step": 2},
        {"level": "ERROR"},
        {"logger": "data"},
        {"error": ("ValueError", "bad", "Trace\n")},
        {"error": ("KeyError", "bad", "Trace\n")},
    ]
    entries = [entry(logs, rank, 0.0, "x", **kind) for rank, kind in enumerate(kinds)]
    assert [group.count for group in fold(entries, 5.0)] == [1] * len(kinds)


def test_a_line_after_the_window_begins_a_new_group(logs: Any) -> None:
    entries = [entry(logs, rank, seconds, "same") for rank, seconds in ((0, 0.0), (1, 5.0), (2, 5.000001))]
    assert said(list(fold(entries, 5.0))) == [("same", 2, (0, 1), False), ("same", 1, (2,), False)]


def test_groups_come_in_the_order_of_their_first_records(logs: Any) -> None:
    texts = ["a", "b", "c"]
    entries = [entry(logs, rank, rank + i / 10, text) for rank in range(3) for i, text in enumerate(texts)]
    assert [group.first.fields["message"] for group in fold(entries, 5.0)] == texts


def test_a_group_waits_no_longer_than_its_window(logs: Any) -> None:
    folder = Folder(1.0)
    assert list(folder.add(entry(logs, 0, 0.0, "early"), now=10.0)) == []
    assert [group.first.fields["message"] for group in folder.add(entry(logs, 0, 1.5, "late"), now=11.5)] == ["early"]
    assert list(folder.flush(opened_before=11.5)) == []
    assert [group.first.fields["message"] for group in folder.flush(opened_before=11.6)] == ["late"]


def test_open_groups_are_limited(logs: Any) -> None:
    folder = Folder(5.0)
    letters = [f"{'x' * i}" for i in range(folding._MAX_OPEN + 10)]
    closed = [group for text in letters for group in folder.add(entry(logs, 0, 0.0, text))]
    assert len(closed) == 10
    assert len(list(folder.flush())) == folding._MAX_OPEN
    assert not folder._equal
    assert not folder._alike


@given(
    st.lists(
        st.tuples(
            st.integers(0, 4),
            st.sampled_from([0.0, 0.5, 2.0, 9.0]),
            st.sampled_from(["a", "b", "n 1", "n 2", "n 3"]),
        ),
        max_size=120,
    )
)
def test_every_record_is_in_one_group(steps: list[tuple[int, float, str]]) -> None:
    seconds, entries = 0.0, []
    for rank, pause, message in steps:
        seconds += pause
        time = f"2026-05-01T12:{int(seconds // 60) % 60:02d}:{seconds % 60:09.6f}".encode()
        entries.append(Entry(time, rank, b"", {"message": message}, rank, None))
    folder = Folder(1.0)
    groups = [group for one in entries for group in folder.add(one)] + list(folder.flush())
    assert sum(group.count for group in groups) == len(entries)
    assert {rank for group in groups for rank in group.ranks} == {one.rank for one in entries}
    assert not folder._equal
    assert not folder._alike
    # A near group has each rank once; an equal one may have more records than ranks, never fewer.
    assert all(group.count >= len(group.ranks) for group in groups)


def test_a_time_that_no_calendar_has_is_folded_too() -> None:
    for time in (b"2026-02-31T12:00:00.000000", b"9999-12-31T23:59:59.999999", b"2026-19-39T29:00:00.000000"):
        assert len(list(fold([Entry(time, rank, b"", {"message": "m"}, rank, None) for rank in (0, 1)], 5.0))) == 1
