"""Columns: text, order, and how they share a line."""

import pytest

from rankwise.top.columns import NAMES, Piece, bar, cells, duration, header, sort_rows, widths
from rankwise.top.rows import Row

ROWS = [
    Row(0, "node-0000", "cuda:0", 5, 2.0, {"data": 0.25, "backward": 0.75}, own_seconds=0.3, age_seconds=1.0),
    Row(1, "node-0001", "cuda:1", 7, 2.5, {"data": 1.0}, temperature_celsius=91.0, marks=("hot",), lag_steps=12345),
    Row(2),
]


def text(pieces: list[Piece]) -> str:
    return "".join(piece for piece, _ in pieces)


@pytest.mark.parametrize("total", [*range(40, 120), 200])
def test_lines_fill_no_more_than_the_width_and_stand_in_columns(total: int) -> None:
    wide = widths(ROWS, total)
    lines = [header(wide, "rank", descending=False), *(cells(row, wide) for row in ROWS)]
    lengths = {len(text(line)) for line in lines}
    assert lengths == {sum(wide.values()) + len(wide) - 1}
    assert lengths.pop() <= total


def test_eighty_characters_have_room_for_every_column() -> None:
    assert set(widths(ROWS[:1], 80)) == set(NAMES)


def test_narrow_terminals_keep_what_tells_who_is_where() -> None:
    assert {"rank", "host", "step", "own", "age", "lag"} <= set(widths(ROWS, 50))


def test_of_a_long_host_the_end_is_kept() -> None:
    row = Row(0, "cluster-with-a-long-name-node-0042", "cuda:0")
    line = text(cells(row, widths([row], 80)))
    assert "0042 " in line
    assert "~" in line


def test_bar_gives_each_phase_its_share_of_letters() -> None:
    assert text(bar(ROWS[0], 8)) == "DDBBBBBB"
    mixed = Row(0, phases={"mine": 0.25, "other": 0.25, "communication": 0.5})
    assert text(bar(mixed, 8)) == "CCCC++.."


@pytest.mark.parametrize("width", range(8, 41))
def test_bar_is_always_full(width: int) -> None:
    row = Row(0, phases={"data": 0.037, "forward": 0.281, "backward": 0.43, "communication": 0.2, "other": 0.052})
    assert len(text(bar(row, width))) == width


def test_rank_that_is_stuck_shows_where_instead_of_a_bar() -> None:
    row = Row(0, phases={"data": 1.0}, phase="backward", phase_seconds=75.0, is_stuck=True)
    assert text(bar(row, 14)) == "backward 75s  "


def test_host_without_an_accelerator_shows_the_process() -> None:
    row = Row(0, "a", "cpu", cpu_percent=160.2, rss_gib=6.54)
    line = text(cells(row, widths([row], 100)))
    assert "c160%" in line
    assert "r6.5" in line


def test_unknown_numbers_are_dashes_and_sort_last_both_ways() -> None:
    assert text(cells(ROWS[2], widths(ROWS, 100))).split() == ["2", *["-"] * 9]
    for descending in (False, True):
        assert sort_rows(ROWS, "step", descending=descending)[-1].rank == 2
    assert [row.rank for row in sort_rows(ROWS, "step", descending=True)] == [1, 0, 2]
    assert [row.rank for row in sort_rows(ROWS, "host", descending=False)] == [0, 1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_every_column_sorts(name: str) -> None:
    assert sorted(row.rank for row in sort_rows(ROWS, name, descending=True)) == [0, 1, 2]


def test_header_shows_the_order() -> None:
    wide = widths(ROWS, 120)
    assert "stepv" not in text(header(wide, "rank", descending=False))
    assert "phasesv" in text(header(wide, "own", descending=True))
    assert ("bold underline" in {style for _, style in header(wide, "age", descending=True)}) is True


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "-"),
        (0.04, "0.0s"),
        (9.96, "10s"),
        (99.4, "99s"),
        (185, "3m05"),
        (600, "10m"),
        (5999, "99m"),
        (7800, "2h10"),
        (90000, "25h"),
        (864000, "10d"),
        (1e12, "999d"),
    ],
)
def test_duration_takes_four_characters(seconds: float | None, said: str) -> None:
    assert duration(seconds) == said
    assert len(said) <= 4


def test_names_cannot_move_the_cursor() -> None:
    row = Row(0, "a\x1b[2Jb", "c\nd")
    assert all(character.isprintable() for character in text(cells(row, widths([row], 100))))
