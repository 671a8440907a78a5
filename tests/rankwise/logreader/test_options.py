"""What `rankwise logs` takes, and what it refuses."""

import contextlib
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.logreader.options import is_within, parse_level, parse_options, parse_ranges, parse_steps, parse_time
from rankwise.logs.fold import ranks_as_text

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


@given(st.sets(st.integers(0, 5000), min_size=1))
def test_ranks_that_the_console_names_can_be_asked_for(ranks: set[int]) -> None:
    ranges = parse_ranges(ranks_as_text(ranks))
    assert {rank for rank in range(5002) if is_within(rank, ranges)} == ranks


@given(st.text(max_size=30))
def test_any_text_is_ranges_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        ranges = parse_ranges(text)
        assert ranges
        assert all(is_within(low, ranges) for low, _ in ranges)


@given(st.text(alphabet="0123456789:-", max_size=12))
def test_any_text_is_steps_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        ranges = parse_steps(text)
        assert is_within(ranges[0][0], ranges)


@given(st.text(max_size=30))
def test_any_text_is_a_time_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert len(parse_time(text, NOW)) == 26


def test_a_range_may_have_no_end() -> None:
    ranges = parse_ranges("1,8-")
    assert [rank for rank in (0, 1, 2, 7, 8, 10**9) if is_within(rank, ranges)] == [1, 8, 10**9]


@pytest.mark.parametrize(("text", "inside", "outside"), [
    ("3", [3], [2, 4]),
    ("3:", [3, 10**6], [2]),
    (":3", [0, 3], [4]),
    ("3:5", [3, 5], [2, 6]),
])  # fmt: skip
def test_steps_include_both_ends(text: str, inside: list[int], outside: list[int]) -> None:
    ranges = parse_steps(text)
    assert all(is_within(step, ranges) for step in inside)
    assert not any(is_within(step, ranges) for step in outside)


@pytest.mark.parametrize(("text", "expected"), [
    ("2026-05-01", datetime(2026, 5, 1)),
    ("2026-05-01T12:30", datetime(2026, 5, 1, 12, 30)),
    ("2026-05-01 12:30:01.5Z", datetime(2026, 5, 1, 12, 30, 1, 500000)),
    ("2026-05-01T12:30+02:00", datetime(2026, 5, 1, 10, 30)),
    ("90s", datetime(2026, 5, 1, 11, 58, 30)),
    ("1.5h", datetime(2026, 5, 1, 10, 30)),
    ("2d", datetime(2026, 4, 29, 12)),
])  # fmt: skip
def test_times_are_utc_or_so_long_ago(text: str, expected: datetime) -> None:
    assert parse_time(text, NOW) == expected.isoformat(timespec="microseconds").encode()


@given(st.datetimes(min_value=datetime(1, 1, 2)), st.timedeltas(timedelta(microseconds=1), timedelta(hours=1)))
def test_times_compare_as_moments_do(moment: datetime, later: timedelta) -> None:
    if moment < datetime.max - later:
        assert parse_time(moment.isoformat(), NOW) < parse_time((moment + later).isoformat(), NOW)


def test_levels_are_known_by_name_in_any_case_and_by_number() -> None:
    assert [parse_level(text) for text in ("warning", "Error", "DEBUG", "25")] == [30, 40, 10, 25]


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "required: RUN"),
    (["run", "--rank", "a"], "'a' is no list of ranks such as 0,3-7"),
    (["run", "--rank", "7-3"], "'7-3' ends before it begins"),
    (["run", "--rank", "9" * 5000], "is no list of ranks"),
    (["run", "--rank", "0,,1"], "is no list of ranks"),
    (["run", "--level", "loud"], "'loud' is no level; there are debug, info"),
    (["run", "--text", "("], "'(' is no regular expression (missing ), "),
    (["run", "--steps", "5:1"], "'5:1' ends before it begins"),
    (["run", "--steps", ":"], "':' is no range of steps"),
    (["run", "--since", "yesterday"], "'yesterday' is no time such as"),
    (["run", "--until", "999999999d"], "'999999999d' is no time such as"),
    (["run", "--tail", "-1"], "'-1' is no number of lines"),
    (["run", "--tai", "1"], "unrecognized arguments: --tai"),
])  # fmt: skip
def test_what_cannot_be_understood_is_refused_with_a_reason(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=r"See rankwise logs --help\.$") as caught:
        parse_options(arguments, NOW)
    assert said in str(caught.value)
    assert ".." not in str(caught.value)


def test_folding_is_for_people_unless_it_is_said() -> None:
    def folds(*arguments: str) -> bool:
        return parse_options(["run", *arguments], NOW).fold

    assert (folds(), folds("--no-fold"), folds("--json"), folds("--json", "--fold")) == (True, False, False, True)
