"""Many records become few lines, and every one of them is counted."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.logs.fold import (
    MAX_KNOWN_PATTERNS,
    MAX_PATTERN_LENGTH,
    Folder,
    Line,
    level_number,
    pattern,
    ranks_as_text,
)
from rankwise.logs.screen import as_text


def record(rank: int, message: str, level: str = "WARNING", **more: Any) -> dict[str, Any]:
    place = {"rank": rank, "host": f"node-{rank // 8}", "device": f"cuda:{rank % 8}"}
    return {
        "time": "2026-01-02T03:04:05.000006+00:00",
        "level": level,
        "logger": "a.b",
        "message": message,
        **place,
    } | more


def said(lines: list[Line]) -> list[str]:
    return [as_text(line, 0)[len("00:00:00 WARNING ") :] for line in lines]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("loss 3.2e-05 at step 1,204", "loss 17 at step 9"),
        ("took 1.5s on cuda:3", "took -0.25s on cuda:11"),
        ("at 0xDEADbeef of 550e8400-e29b-41d4-a716-446655440000", "at 0x1 of 6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
        ("commit deadbeef1", "commit 0123abcd99"),
    ],
)
def test_messages_that_differ_in_numbers_have_one_pattern(one: str, other: str) -> None:
    assert pattern(one) == pattern(other)


def test_nan_and_words_are_no_numbers() -> None:
    assert len({pattern(f"loss {value}") for value in ("1.0", "nan", "inf", "defaced")}) == 4


@settings(deadline=None)  # a loaded machine
@given(st.text())
def test_pattern_of_a_pattern_is_itself(text: str) -> None:
    assert pattern(pattern(text)) == pattern(text)


@settings(deadline=None)  # a loaded machine
@given(st.sets(st.integers(0, 300)))
def test_ranks_as_text_names_exactly_the_ranks(ranks: set[int]) -> None:
    named: set[int] = set()
    for part in filter(None, ranks_as_text(ranks).split(", ")):
        first, _, last = part.partition("-")
        named |= set(range(int(first), int(last or first) + 1))
    assert named == ranks


def test_ranks_as_text_joins_neighbours() -> None:
    assert ranks_as_text([9, 1, 0, 2, 3, 7, 10, 11, 12, 7]) == "0-3, 7, 9-12"


def test_equal_records_of_many_ranks_become_one_line() -> None:
    folder = Folder(0)
    for rank in range(512):
        assert folder.add(record(rank, "slow disk"), rank / 1000) == []
    assert folder.next_due() == 1.0
    assert folder.due(0.99) == []
    assert said(folder.due(1.0)) == ["a.b: slow disk (x512, ranks 0-511)"]
    assert (folder.next_due(), folder.flush(2.0)) == (None, [])


def test_near_equal_records_become_one_line_that_says_so() -> None:
    folder = Folder(0)
    for rank in (0, 1, 2, 5):
        folder.add(record(rank, f"step took {rank}.5 s"), 0.0)
    assert said(folder.due(1.0)) == ["a.b: step took 0.5 s (x4, ranks 0-2, 5, numbers differ)"]


def test_record_of_one_rank_is_labelled_with_its_place() -> None:
    folder = Folder(0)
    folder.add(record(37, "hot"), 0.0)
    folder.add(record(0, "mine"), 0.0)
    assert said(folder.due(1.0)) == ["[rank 37, node-4, cuda:5] a.b: hot", "a.b: mine"]


def test_records_of_other_words_levels_loggers_or_exceptions_stay_apart() -> None:
    folder = Folder(0)
    folder.add(record(1, "a"), 0.0)
    folder.add(record(2, "b"), 0.0)
    folder.add(record(3, "a", "ERROR"), 0.0)
    folder.add(record(4, "a", logger="c"), 0.0)
    folder.add(record(5, "a", exception={"type": "KeyError", "message": "", "traceback": "x"}), 0.0)
    assert [line.ranks for line in folder.due(1.0)] == [(1,), (2,), (3,), (4,), (5,)]


def test_own_info_is_a_line_at_once_and_the_first_own_warning_too_where_the_rank_is_alone() -> None:
    assert said(Folder(0).add(record(0, "step 1", "INFO   "), 0.0)) == ["a.b: step 1"]
    assert said(Folder(0, is_alone=True).add(record(0, "mine"), 0.0)) == ["a.b: mine"]
    assert Folder(0).add(record(0, "mine"), 0.0) == []


def test_flood_of_one_pattern_is_shown_ever_more_rarely_and_counted() -> None:
    folder = Folder(0, is_alone=True)
    lines = [(tick / 100, line) for tick in range(30_000) for line in folder.add(record(0, f"n {tick}"), tick / 100)]
    lines += [(300.0, line) for line in folder.flush(300.0)]
    assert sum(line.count for _, line in lines) == 30_000
    assert len(lines) < 45
    assert max(then - now for (now, _), (then, _) in pairwise(lines)) <= 11
    assert as_text(lines[3][1], 0).endswith("more like this)")


def test_count_of_a_flood_is_told_with_thousands() -> None:
    folder = Folder(0, is_alone=True)
    shown = [line for _ in range(4813) for line in folder.add(record(0, "again"), 0.0)]
    assert said(shown + folder.flush(0.1)) == ["a.b: again", "a.b: again (... 4,812 more like this)"]


def test_rank_that_joins_a_flood_is_shown_after_a_short_window() -> None:
    folder = Folder(0)
    for tick in range(3000):
        folder.add(record(1, "again"), tick / 100)
    late = folder.next_due()
    assert late is not None
    assert late > 31
    folder.add(record(2, "again"), 30.0)
    (line,) = folder.due(31.0)
    assert 2 in line.ranks


def test_rank_that_joins_a_flood_right_after_its_line_is_shown_after_a_short_window_too() -> None:
    folder = Folder(0)
    for tick in range(3000):
        folder.add(record(1, "again"), tick / 100)
    folder.flush(30.0)
    folder.add(record(2, "again"), 30.01)
    folder.add(record(1, "again"), 30.02)
    (line,) = folder.due(31.1)
    assert line.ranks == (1, 2)


def test_pattern_that_comes_back_after_a_pause_is_a_plain_line_again() -> None:
    folder = Folder(0)
    folder.add(record(1, "again"), 0.0)
    folder.due(1.0)
    folder.add(record(1, "again"), 100.0)
    assert said(folder.due(101.0)) == ["[rank 1, node-0, cuda:1] a.b: again"]


def test_flood_of_own_info_is_limited_for_each_window() -> None:
    folder = Folder(0, max_lines=10)
    shown = [line for tick in range(1000) for line in folder.add(record(0, f"step {tick}", "INFO"), tick / 1000)]
    assert len(shown) == 10
    (rest,) = folder.due(2.0)
    assert (rest.count, rest.record["message"]) == (990, "step 10")


def test_flood_of_different_words_is_limited_and_counted() -> None:
    folder = Folder(0, max_lines=10)
    for number in range(1000):
        folder.add(record(number % 4, "word " + "abcdefghij"[number % 10] * (1 + number // 10)), 0.0)
    lines = folder.due(1.0)
    assert len(lines) == 11
    assert said(lines)[-1] == (
        "rankwise.logs: lines of other kinds, too many to show; the files of the ranks hold them (x990, ranks 0-3)"
    )


def test_record_that_stands_for_many_counts_for_as_many() -> None:
    folder = Folder(0)
    other = Folder(3, is_alone=True)
    (first,) = other.add(record(3, "n 1"), 0.0)
    other.add(record(3, "n 2"), 0.1)
    other.add(record(3, "n 3"), 0.2)
    (rest,) = other.flush(0.3)
    for line in (first, rest):
        folder.add(line.as_record(), 0.5)
    (line,) = folder.due(2.0)
    assert (line.count, line.ranks, line.is_exact) == (3, (3,), False)


def test_memory_stays_bounded_whatever_comes() -> None:
    folder = Folder(0)
    for number in range(5000):
        word = "".join("abcdefghij"[int(digit)] for digit in str(number))
        folder.add(record(1, word), number * 10.0)
    assert len(folder._batches) <= 1001


def test_levels_have_their_numbers() -> None:
    assert [level_number(name) for name in ("ERROR", "Level 35", "nobody's")] == [40, 35, 20]


def word(number: int) -> str:
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def test_flood_of_info_takes_no_room_from_warnings() -> None:
    folder = Folder(0, max_lines=10)
    for number in range(1000):
        folder.add(record(0, word(number), "INFO"), 0.0)
    folder.add(record(1, "broken", "ERROR"), 0.0)
    assert [line.record["message"] for line in folder.due(1.0) if line.record["level"] == "ERROR"] == ["broken"]


def test_flood_of_different_warnings_is_limited_where_the_rank_is_alone() -> None:
    folder = Folder(0, is_alone=True)
    lines = [line for number in range(5000) for line in folder.add(record(0, word(number)), number / 10_000)]
    lines += folder.flush(1.0)
    assert len(lines) == 201
    assert said(lines)[-1].endswith("lines of other kinds, too many to show; the files of the ranks hold them (x4,800)")


def test_repeat_shows_the_newest_message() -> None:
    folder = Folder(0, is_alone=True)
    shown = [line for number in range(3) for line in folder.add(record(0, f"loss {number}"), 0.0)]
    assert said(shown + folder.flush(0.1)) == ["a.b: loss 0", "a.b: loss 2 (... 2 more like this)"]


def test_line_that_comes_again_after_a_pause_is_shown_within_two_seconds_however_often_it_came() -> None:
    folder = Folder(0)
    for tick in range(2000):
        folder.add(record(1, "again"), tick / 100)
    folder.flush(20.0)
    for now in (23.0, 26.5, 30.0):
        folder.add(record(1, "again"), now)
        assert said(folder.due(now + 1.0)) == ["[rank 1, node-0, cuda:1] a.b: again"]


def test_lines_of_other_kinds_of_many_ranks_add_up() -> None:
    folder = Folder(0)
    for rank in (1, 2):
        other = Folder(rank, is_alone=True, max_lines=10)
        lines = [line for number in range(500) for line in other.add(record(rank, word(number)), 0.0)]
        for line in lines + other.flush(0.1):
            folder.add(line.as_record(), 0.2)
    lines = folder.flush(1.0)
    assert sum(line.count for line in lines) == 1000
    (rest,) = [line for line in said(lines) if "other kinds" in line]
    assert rest.endswith("(x960, ranks 1-2)")


def test_errors_of_one_message_whose_reasons_differ_stay_apart_but_for_numbers() -> None:
    folder = Folder(0)
    for rank, reason in enumerate(["file 1 is torn", "file 2 is torn", "no such file"]):
        error = {"type": "ValueError", "message": reason, "traceback": f"Traceback ...\nValueError: {reason}\n"}
        folder.add(record(rank, "cannot decode", "ERROR", exception=error), 0.0)
    lines = folder.flush(2.0)
    assert [(line.ranks, line.is_exact) for line in lines] == [((0, 1), False), ((2,), True)]


def test_patterns_are_forgotten_though_the_oldest_of_them_waits() -> None:
    folder = Folder(0)
    for number in range(MAX_KNOWN_PATTERNS + 100):
        folder.add(record(1, "oldest"), 0.0)
        if number == 0:
            folder.flush(0.0)
            folder.add(record(1, "oldest"), 0.0)
        folder.add(record(1, f"word {word(number)}"), 0.0)
        folder._finish(next(key for key in folder._waiting if key[2] != "oldest"), 0.0)
    assert len(folder._batches) <= MAX_KNOWN_PATTERNS


def test_long_messages_have_one_pattern_only_if_their_ends_are_equal() -> None:
    begin = "1 " * MAX_PATTERN_LENGTH
    assert pattern(begin + "end") == pattern("2" + begin[1:] + "end")
    assert pattern(begin + "end") != pattern(begin + "other end")
    assert len(pattern("1" + "x" * 1_000_000)) < 2 * MAX_PATTERN_LENGTH
