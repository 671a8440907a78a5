"""Whom the statistics blame: the rank that the others wait for, and nobody in jobs where nobody is slow."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from rankwise.monitor.statistics import (
    COMMUNICATION,
    MAX_PHASES,
    History,
    Judgement,
    Limits,
    Row,
    Window,
    judge,
    summarise,
)

sys.path.insert(0, str(Path(__file__).parent))

from straggler_noise import (
    EVERY_STEPS,
    NAMES,
    STEP_SECONDS,
    Extra,
    Noise,
    alarms,
    recorded_source,
    simulate,
    to_window,
)

NUM_STEPS = 10_000
NOISE = Noise()
QUIET = Noise(sigma=0.01, spike_rate=0.0, gc=0.0, save=0.0, static=0.0, drift=0.0, rank_drift=0.0)
JOBS = {
    "spikes, drift, collections and checkpoints": Noise(),
    "ten times the spikes": Noise(spike_rate=0.02),
    "30 % noise in each phase": Noise(sigma=0.3),
    "ranks that differ by 2 %": Noise(static=0.02, drift=0.02, rank_drift=0.01),
    "recorded": None,
}


def slower(ranks: list[int], phase: str, share: float, *, first: int = 0, last: int = 10**9) -> Extra:
    """These ranks take longer in a phase by a share of a step, in windows `first` to `last`."""

    def add(number: int, own: np.ndarray) -> None:
        if first <= number <= last:
            own[:, ranks, NAMES.index(phase)] += share * STEP_SECONDS

    return add


def found(world_size: int, extra: Extra, *, num_windows: int = 10, noise: Noise = NOISE, measured: bool = True):
    rng = np.random.default_rng(7)
    return alarms(simulate(world_size, num_windows, noise, rng, extra=extra, measured=measured), world_size)


@pytest.mark.parametrize("measured", [True, False], ids=["measured", "hidden"])
@pytest.mark.parametrize("world_size", [2, 8, 64])
@pytest.mark.parametrize("job", JOBS)
def test_nobody_is_blamed_in_ten_thousand_steps(job: str, world_size: int, measured: bool) -> None:
    rng = np.random.default_rng(world_size)
    source = recorded_source(world_size, rng) if JOBS[job] is None else None
    noise = JOBS[job] or Noise()
    windows = simulate(world_size, NUM_STEPS // EVERY_STEPS, noise, rng, measured=measured, source=source)
    assert alarms(windows, world_size) == []


@pytest.mark.parametrize("job", ["spikes, drift, collections and checkpoints", "recorded"])
def test_nobody_of_1024_is_blamed_in_ten_thousand_steps(job: str) -> None:
    rng = np.random.default_rng(1)
    source = recorded_source(1024, rng) if JOBS[job] is None else None
    assert alarms(simulate(1024, NUM_STEPS // EVERY_STEPS, Noise(), rng, source=source), 1024) == []


def test_noise_has_teeth_for_limits_without_patience() -> None:
    rng = np.random.default_rng(8)
    hasty = Limits(num_sigmas=0.0, num_windows=1, num_bad=1)
    history = History(8, hasty)
    windows = simulate(8, NUM_STEPS // EVERY_STEPS, Noise(spike_rate=0.02), rng)
    assert sum(len(history.add(judge(window, hasty)).begun) for window in windows) > 10


@pytest.mark.parametrize("phase", ["data", "forward", "backward", "optimizer", "other"])
@pytest.mark.parametrize("world_size", [2, 3, 8, 64])
def test_rank_slower_by_a_tenth_is_found_within_250_steps(world_size: int, phase: str) -> None:
    told = found(world_size, slower([1], phase, 0.10), num_windows=20)
    assert [(rank, name) for _, rank, name in told] == [(1, phase)]
    assert (told[0][0] + 1) * EVERY_STEPS <= 250


@pytest.mark.parametrize("phase", ["data", "forward", "optimizer"])
@pytest.mark.parametrize("world_size", [2, 8])
def test_rank_is_found_where_waiting_hides_in_backward(world_size: int, phase: str) -> None:
    told = found(world_size, slower([0], phase, 0.20), measured=False)
    assert [(rank, name) for _, rank, name in told] == [(0, phase)]


def test_ranks_that_are_slow_in_different_phases_are_all_found() -> None:
    for measured in (True, False):

        def extra(number: int, own: np.ndarray) -> None:
            slower([3], "data", 0.5)(number, own)
            slower([5], "forward", 0.3)(number, own)

        told = found(8, extra, measured=measured)
        assert {(rank, name) for _, rank, name in told} == {(3, "data"), (5, "forward")}


@pytest.mark.parametrize("measured", [True, False], ids=["measured", "hidden"])
def test_slow_half_is_blamed_and_not_the_half_that_waits(measured: bool) -> None:
    told = found(16, slower(list(range(8, 16)), "data", 0.3), measured=measured)
    assert {rank for _, rank, _ in told} == set(range(8, 16))
    assert {phase for _, _, phase in told} == {"data"}


def test_another_rank_that_becomes_slow_is_told_and_the_first_is_over() -> None:
    def extra(number: int, own: np.ndarray) -> None:
        slower([3], "data", 0.3, last=9)(number, own)
        slower([5], "forward", 0.3, first=10)(number, own)

    history = History(8)
    begun, ended = [], []
    for window in simulate(8, 20, Noise(), np.random.default_rng(0), extra=extra):
        change = history.add(judge(window))
        begun += change.begun.tolist()
        ended += change.ended.tolist()
    assert (begun, ended) == ([3, 5], [3])


def test_rank_that_is_slow_in_every_second_window_is_told_once() -> None:
    def extra(number: int, own: np.ndarray) -> None:
        if number % 2:
            slower([2], "data", 0.5)(number, own)

    assert [(rank, name) for _, rank, name in found(8, extra, num_windows=40)] == [(2, "data")]


def test_rank_that_is_slow_in_every_second_step_is_told() -> None:
    def extra(number: int, own: np.ndarray) -> None:
        own[::2, 2, 0] += 0.5 * STEP_SECONDS

    assert [(rank, name) for _, rank, name in found(8, extra)] == [(2, "data")]


def test_two_slow_windows_are_no_alarm() -> None:
    assert found(8, slower([2], "data", 2.0, first=3, last=4)) == []


def test_one_long_step_in_each_window_is_no_alarm() -> None:
    def extra(number: int, own: np.ndarray) -> None:
        own[number % EVERY_STEPS, 2, 4] += 20 * STEP_SECONDS

    assert found(8, extra, num_windows=40) == []


def test_main_process_that_writes_a_checkpoint_now_and_then_is_not_blamed() -> None:
    assert found(8, lambda number, own: None, num_windows=60, noise=Noise(save=100.0, save_every_steps=100)) == []


def test_main_process_that_logs_in_every_step_is_blamed_for_what_it_is() -> None:
    assert [(rank, name) for _, rank, name in found(8, slower([0], "other", 0.2))] == [(0, "other")]


def test_rank_with_more_work_is_not_blamed_where_nobody_waits_for_it() -> None:
    window = to_window(np.full((EVERY_STEPS, 4, len(NAMES)), 0.04), np.full(EVERY_STEPS, 0.05))
    window.own[1] += 0.1
    window.seconds[1] += 0.1
    window.phases["data"][0, 1] += 0.1
    assert judge(window).held.max() < 1e-9


def test_rank_is_found_where_gradients_are_averaged_in_one_step_of_eight() -> None:
    own = np.random.default_rng(0).normal(0.04, 0.001, (EVERY_STEPS, 4, len(NAMES)))
    own[:, 2, 1] += 0.1
    total = own.sum(axis=2)
    waits = np.zeros_like(total)
    for last in range(7, EVERY_STEPS, 8):
        passed = total[last - 7 : last + 1].sum(axis=0)
        waits[last] = passed.max() - passed + 0.01
    window = Window(4)
    for rank in range(4):
        phases = {name: own[:, rank, index].tolist() for index, name in enumerate(NAMES)}
        window.put(rank, Row.of((total + waits)[:, rank].tolist(), phases | {COMMUNICATION: waits[:, rank].tolist()}))
    judgement = judge(window)
    assert judgement.names[judgement.phase[2]] == "forward"
    assert judgement.held[2] == pytest.approx(0.1, rel=0.1)
    assert judgement.held[[0, 1, 3]].max() < judgement.limit


def test_window_says_by_how_much_the_others_are_held_up() -> None:
    window = next(simulate(8, 1, QUIET, np.random.default_rng(0), extra=slower([6], "data", 0.25)))
    judgement = judge(window)
    assert judgement.held[6] == pytest.approx(0.25 * STEP_SECONDS, rel=0.05)
    assert judgement.step_seconds == pytest.approx(1.25 * STEP_SECONDS + 0.02, rel=0.05)
    assert judgement.transfer_seconds == pytest.approx(0.02, rel=0.2)


def test_long_steps_are_capped_and_the_error_tells_of_busy_spells() -> None:
    seconds = np.full(50, 0.1)
    seconds[[7, 20]] = 5.0
    assert summarise(seconds)[0] == pytest.approx(0.1)
    independent = np.tile([0.1, 0.2], 25)
    spell = np.sort(independent)
    assert summarise(spell)[1] > 3 * summarise(independent)[1]


def test_few_steps_make_a_row_too() -> None:
    assert Row.of([0.3], {"data": [0.1], "other": [0.2]}) == Row(
        0.3, 0.3, 0.0, {"data": (0.1, 0.0), "other": (0.2, 0.0)}
    )


def test_row_with_what_is_no_number_is_known() -> None:
    assert Row(1.0, 1.0, 0.0, {"data": (0.1, 0.0)}).is_finite()
    assert not Row(1.0, float("nan"), 0.0, {}).is_finite()
    assert not Row(1.0, 1.0, 0.0, {"data": (float("inf"), 0.0)}).is_finite()


def test_missing_row_leaves_the_others_judged_and_the_alarm_standing() -> None:
    history = History(4)
    windows = list(simulate(4, 12, QUIET, np.random.default_rng(0), extra=slower([3], "data", 0.5)))
    for window in windows[:6]:
        history.add(judge(window))
    assert history.alarmed.tolist() == [False, False, False, True]
    for window in windows[6:]:
        window.present[3] = False
        judgement = judge(window)
        assert np.isnan(judgement.held[3])
        assert not np.isnan(judgement.held[:3]).any()
        assert history.add(judgement).ended.tolist() == []
    assert history.alarmed.tolist() == [False, False, False, True]


def test_no_row_or_one_row_blames_nobody() -> None:
    window = Window(3)
    assert np.isnan(judge(window).held).all()
    window.put(1, Row.of([0.1] * 4, {"data": [0.1] * 4}))
    judgement = judge(window)
    assert np.isnan(judgement.held).all()
    assert History(3).add(judgement).begun.tolist() == []


def test_phases_without_end_are_counted_as_other() -> None:
    window = Window(2)
    names = [f"phase {number}" for number in range(100)]
    window.put(0, Row.of([1.0] * 4, {name: [0.01] * 4 for name in names}))
    assert len(window.phases) == MAX_PHASES + 1
    assert window.phases["other"][0, 0] == pytest.approx(0.01 * (100 - MAX_PHASES))


def test_history_tells_since_when_and_how_much() -> None:
    history = History(2)
    for held in (0.0, 0.3, 0.4, 0.5):
        history.add(Judgement(np.array([0.0, held]), np.zeros(2), np.array([0, 0]), ("data",), 0.1, 1.0, 0.0))
    assert history.alarmed.tolist() == [False, True]
    assert history.num_windows(1) == 3
    assert history.mean_bad(1) == pytest.approx(0.4)
    assert history.phase(1) == "data"
