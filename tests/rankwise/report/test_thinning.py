"""What is left when there is too much has the extremes in it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rankwise.report.thinning import build_columns, median_of, thin_grid, thin_line, worst_of


def test_columns_have_room_for_every_step_and_are_no_more_than_asked_for() -> None:
    for count in (1, 2, 999, 1000, 1001, 10_000):
        columns = build_columns(5, 5 + count - 1, 1000)
        assert columns.num <= 1000
        assert (columns.num - 1) * columns.width < count <= columns.num * columns.width


def test_worst_and_median_ignore_what_is_missing() -> None:
    laid = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan], [2.0, 9.0, 5.0]])
    worst, place = worst_of(laid)
    np.testing.assert_array_equal(worst, [3.0, np.nan, 9.0])
    assert (place[0], place[2]) == (2, 1)
    np.testing.assert_array_equal(median_of(laid), [1.0, np.nan, 5.0])


@given(st.lists(st.floats(-1e6, 1e6) | st.just(np.nan), min_size=1, max_size=300), st.integers(4, 60))
def test_a_thinned_line_keeps_its_ends_and_extremes(values: list[float], most: int) -> None:
    y = np.array(values)
    x = np.arange(y.size, dtype=np.float64)
    thin_x, thin_y = thin_line(x, y, most)
    assert thin_x.size <= max(most, 4)
    assert (thin_x[0], thin_x[-1]) == (x[0], x[-1])
    assert np.all(np.diff(thin_x) > 0)
    np.testing.assert_array_equal(thin_y, y[thin_x.astype(int)])
    if not np.isnan(y).all():
        assert (np.nanmin(thin_y), np.nanmax(thin_y)) == (np.nanmin(y), np.nanmax(y))


def test_a_gap_stays_a_gap() -> None:
    y = np.ones(1000)
    y[400:600] = np.nan
    _, thin_y = thin_line(np.arange(1000.0), y, 100)
    assert np.isnan(thin_y).any()


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(-1e3, 1e3)), max_size=200), st.integers(1, 20))
def test_a_grid_keeps_each_parts_lowest_and_highest_in_their_order(points: list[tuple[float, float]], num: int) -> None:
    points.sort()
    times, values = np.array([t for t, _ in points]), np.array([v for _, v in points])
    grid = thin_grid(times, values, num, 100.0).reshape(num, 2)
    for part in range(num):
        inside = np.flatnonzero(np.clip((times / 100.0 * num).astype(int), 0, num - 1) == part)
        if not inside.size:
            assert np.isnan(grid[part]).all()
            continue
        assert sorted(grid[part]) == [values[inside].min(), values[inside].max()]
        first = values[inside][np.isin(values[inside], grid[part])][0]
        if np.unique(values[inside]).size == inside.size:
            assert grid[part][0] == first
