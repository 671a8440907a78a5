"""The picture of step times keeps the worst of what shares a cell."""

from typing import Any

import numpy as np
import pytest

from rankwise.report import heat
from rankwise.report.heat import RankSteps, build_heat, build_totals, choose_phases


class Unpacked:
    """Takes arrays as a Packer does and gives them back."""

    def add(self, values: Any) -> Any:
        return np.array(values)

    add_seconds = add


def rank_steps(rank: int, seconds: list[float], first: int = 1, **phases: list[float]) -> RankSteps:
    steps = np.arange(first, first + len(seconds))
    return RankSteps(rank, steps, np.array(seconds), {name: np.array(values) for name, values in phases.items()})


def picture(ranks: list[RankSteps], phases: list[str], span: tuple[int, int]) -> dict[str, Any]:
    return build_heat(ranks, phases, span, Unpacked())  # type: ignore[arg-type]


def test_each_step_has_its_own_cell_where_there_is_room() -> None:
    ranks = [rank_steps(0, [1.0, 2.0], data=[0.5, 0.25]), rank_steps(1, [3.0], first=2, data=[1.0])]
    made = picture(ranks, ["data"], (1, 2))
    assert (made["width"], made["rows"], made["columns"]) == (1, 2, 2)
    np.testing.assert_array_equal(made["step"], [[1.0, 2.0], [np.nan, 3.0]])
    np.testing.assert_array_equal(made["atWorst"][0], [[0.5, 0.25], [np.nan, 1.0]])


def test_a_column_of_many_steps_shows_the_slowest_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat, "MIN_COLUMNS", 2)
    monkeypatch.setattr(heat, "MAX_COLUMNS", 2)
    rank = rank_steps(0, [1.0, 5.0, 2.0, 1.0, 1.0, 7.0], data=[0.9, 0.1, 0.0, 0.0, 0.3, 0.2])
    made = picture([rank], ["data"], (1, 6))
    assert made["width"] == 3
    np.testing.assert_array_equal(made["step"], [[5.0, 7.0]])
    np.testing.assert_array_equal(made["worstStep"], [[1, 2]])
    np.testing.assert_array_equal(made["atWorst"][0], [[0.1, 0.2]])
    np.testing.assert_array_equal(made["most"][0], [[0.9, 0.3]])
    np.testing.assert_array_equal(made["typical"], [[2.0, 1.0]])


def test_a_row_of_many_ranks_shows_the_slowest_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat, "MAX_ROWS", 2)
    ranks = [rank_steps(rank, [float(rank % 3 + 1)] * 2, communication=[0.5, 0.5]) for rank in range(4)]
    made = picture(ranks, [], (1, 2))
    assert (made["rows"], made["ranksPerRow"]) == (2, 2)
    np.testing.assert_array_equal(made["step"], [[2.0, 2.0], [3.0, 3.0]])
    np.testing.assert_array_equal(made["worstRank"], [[1, 1], [0, 0]])
    np.testing.assert_array_equal(made["own"], [[1.5, 1.5], [2.5, 2.5]])


def test_a_row_of_ranks_in_step_names_the_one_that_the_others_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat, "MAX_ROWS", 1)
    waits = [[0.5, 0.4], [0.1, 0.4], [0.5, 0.1]]
    ranks = [rank_steps(rank, [1.0, 1.0], communication=wait) for rank, wait in enumerate(waits)]
    made = picture(ranks, ["communication"], (1, 2))
    np.testing.assert_array_equal(made["worstRank"], [[1, 2]])
    np.testing.assert_array_equal(made["own"], [[0.9, 0.9]])
    np.testing.assert_array_equal(made["atWorst"][0], [[0.1, 0.1]])


def test_a_cell_tells_how_long_the_step_took_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat, "MIN_COLUMNS", 1)
    monkeypatch.setattr(heat, "MAX_COLUMNS", 1)
    made = picture([rank_steps(0, [3.0, 2.0], communication=[2.5, 0.0])], ["communication"], (1, 2))
    assert (made["step"], made["own"], made["worstSeconds"], made["worstStep"]) == ([[3.0]], [[2.0]], [[2.0]], [[1]])


def test_a_rank_without_steps_is_a_row_without_values() -> None:
    made = picture([rank_steps(0, [1.0]), rank_steps(1, [])], [], (1, 1))
    np.testing.assert_array_equal(made["step"], [[1.0], [np.nan]])


def test_totals_are_those_of_the_whole_run() -> None:
    ranks = [rank_steps(0, [1.0, 3.0, np.nan], data=[0.5, 0.7, 0.0], communication=[0.2, 0.2, 0.0]), rank_steps(1, [])]
    totals = build_totals(ranks, ["data", "forward"])
    assert (totals["worst"][0], totals["worst_step"][0]) == (3.0, 2)
    assert (totals["mean"][0], totals["own"][0]) == (2.0, pytest.approx(1.8))
    assert totals["phases"][0].tolist() == [pytest.approx(0.4), pytest.approx(np.nan, nan_ok=True)]
    assert np.isnan(totals["mean"][1])


def test_known_phases_come_first_in_their_order_and_idle_ones_not_at_all() -> None:
    rank = rank_steps(0, [9.0], mine=[5.0], forward=[1.0], data=[2.0], backward=[0.0])
    assert choose_phases([rank], ("data", "forward", "backward")) == ["data", "forward", "mine"]
