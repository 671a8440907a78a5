"""What a key does to the screen."""

from dataclasses import replace

import pytest

from rankwise.telemetry import Event
from rankwise.top.frame import View
from rankwise.top.rows import Row, Snapshot

PHASES = {"data": 0.1, "forward": 0.3, "backward": 0.5, "communication": 0.1}


def snapshot(num_ranks: int = 100, **more: object) -> Snapshot:
    rows = tuple(
        Row(rank, f"node-{rank // 8:02d}", f"cuda:{rank % 8}", 500 - rank, 2.0, PHASES, lag_steps=rank, age_seconds=1.0)
        for rank in range(num_ranks)
    )
    whole = Snapshot("runs/mine", rows, num_ranks, 13, "77", "running", 400, 1000, 2.0, 300.0)
    return replace(whole, **more)  # type: ignore[arg-type]


@pytest.fixture
def view() -> View:
    made = View()
    made.show(snapshot())
    return made


def screen(view: View, width: int = 80, height: int = 24) -> list[str]:
    return ["".join(text for text, _ in line) for line in view.frame(width, height)]


def ranks(view: View, width: int = 80, height: int = 24) -> list[int]:
    lines = screen(view, width, height)
    top = next(number for number, line in enumerate(lines) if line.lstrip().startswith("rank"))
    return [int(line.split()[0]) for line in lines[top + 1 : -1] if line.strip() and line.split()[0].isdecimal()]


def press(view: View, *keys: str) -> None:
    for key in keys:
        view.press(key)


@pytest.mark.parametrize("size", [(80, 24), (40, 10), (200, 60), (20, 3), (1, 1)])
def test_frame_fits_the_terminal(view: View, size: tuple[int, int]) -> None:
    for keys in ((), ("?",), ("x", "/"), ("l", "a", "g", ">")):
        press(view, *keys)
        lines = screen(view, *size)
        assert len(lines) == size[1]
        assert max(map(len, lines)) <= size[0]


def test_before_the_first_look_it_says_that_it_reads() -> None:
    assert screen(View())[0] == "reading ..."


def test_head_tells_of_the_job(view: View) -> None:
    first, second, *_ = screen(view, 120)
    assert first == "mine  running  100 ranks on 13 nodes  job 77"
    assert second.startswith("step 400 of 1,000  2.00 it/s  5m00 left  data 10% forward 30%")


def test_narrow_head_has_letters_for_the_phases(view: View) -> None:
    assert screen(view, 76)[1] == "step 400 of 1,000  2.00 it/s  5m00 left  D 10% F 30% B 50% C 10%"


def test_news_and_trouble_are_above_the_table() -> None:
    view = View()
    events = (Event("checkpoint", 0.0, 1, "saved"), Event("hang", 1.8e9, 1, "rank 3 is stuck\x1b[2J"))
    rows = (replace(snapshot(1).rows[0], marks=("hang",)),)
    view.show(snapshot(rows=rows, events=events, trouble=("run.json is no object",)))
    lines = screen(view)
    assert "hang: 0" in lines[2]
    assert any("rank 3 is stuck [2J" in line for line in lines)
    assert "note: run.json is no object" in lines
    assert not any("saved" in line for line in lines)


def test_keys_scroll_and_stop_at_the_ends(view: View) -> None:
    shown = ranks(view)
    assert shown[0] == 0
    press(view, "up")
    assert ranks(view) == shown
    press(view, "down", "j")
    assert ranks(view)[0] == 2
    press(view, "pgdn")
    assert ranks(view)[0] == 2 + len(shown)
    press(view, "end")
    assert ranks(view)[-1] == 99
    press(view, "down", "pgdn")
    assert ranks(view)[-1] == 99
    press(view, "up")
    assert ranks(view)[-1] == 98
    press(view, "home")
    assert ranks(view) == shown


def test_page_is_as_long_as_the_terminal(view: View) -> None:
    assert len(ranks(view, 80, 40)) == len(ranks(view, 80, 24)) + 16


def test_sorting_by_another_column_shows_the_most_first(view: View) -> None:
    press(view, "4")
    assert ranks(view)[:2] == [0, 1]
    press(view, "r")
    assert ranks(view)[:2] == [99, 98]
    press(view, "<")
    assert "sort device" in screen(view)[-1]
    press(view, "left", "left", "left")
    assert "sort note" in screen(view)[-1]
    press(view, ">")
    assert "sort rank" in screen(view)[-1]


def test_filter_is_typed_applied_and_taken_away(view: View) -> None:
    press(view, "/", *"lag>=98x", "backspace")
    assert "filter: lag>=98_" in screen(view)[-1]
    assert len(ranks(view)) > 2
    press(view, "enter")
    assert ranks(view) == [98, 99]
    assert "1-2 of 2 (100 ranks)" in screen(view)[-1]
    press(view, "escape")
    assert ranks(view)[0] == 0


def test_keys_are_characters_while_a_filter_is_typed(view: View) -> None:
    press(view, "/", "q", "up", "j")
    assert "filter: qj_" in screen(view)[-1]
    assert not view.is_done
    press(view, "clear", "enter")
    assert ranks(view)[0] == 0


def test_filter_that_cannot_be_understood_is_said_and_can_be_mended(view: View) -> None:
    press(view, "/", *"lag>", "enter")
    assert "lacks a value" in screen(view, 120)[-1]
    press(view, "9", "8", "enter")
    assert ranks(view) == [99]


def test_filter_that_keeps_nobody_says_so(view: View) -> None:
    press(view, "/", *"nobody", "enter")
    assert any("no rank is like that" in line for line in screen(view))


def test_only_marked_ranks(view: View) -> None:
    rows = list(snapshot().rows)
    rows[7], rows[9] = replace(rows[7], marks=("stale",)), replace(rows[9], marks=("ended",))
    view.show(snapshot(rows=tuple(rows)))
    press(view, "m")
    assert ranks(view) == [7]
    press(view, "m")
    assert len(ranks(view)) > 5


def test_held_picture_stays_until_it_goes_on(view: View) -> None:
    press(view, "p")
    view.show(snapshot(3))
    assert len(ranks(view)) > 3
    assert "HELD" in screen(view, 120)[-1]
    press(view, "p")
    assert ranks(view) == [0, 1, 2]


def test_fewer_ranks_do_not_leave_the_screen_empty(view: View) -> None:
    press(view, "end")
    assert ranks(view)[-1] == 99
    view.show(snapshot(5))
    assert ranks(view) == [0, 1, 2, 3, 4]


def test_help_is_left_with_any_key_and_q_leaves(view: View) -> None:
    press(view, "?")
    assert any(line.startswith("q ") for line in screen(view))
    assert any("D data" in line for line in screen(view))
    press(view, "x")
    assert ranks(view)[0] == 0
    press(view, "q")
    assert view.is_done
