"""How long a rank may go without progress: what the user set, or what its own run has shown, phase by phase."""

import pytest

from rankwise.monitor.limits import FLOOR_SECONDS, NUM_KNOWN, STRETCHES, UNCOVERED_SHARE, Limits


def test_limit_that_is_set_is_that_of_every_phase() -> None:
    limits = Limits(5.0, timeout_seconds=600.0)
    for _ in range(10):
        limits.learn("validation", 100.0)
    assert {limits.of(phase) for phase in (None, "data", "validation")} == {5.0}
    assert limits.smallest_seconds == 5.0


@pytest.mark.parametrize("num_seen", range(NUM_KNOWN))
def test_phase_that_was_not_seen_often_has_the_time_of_the_session(num_seen: int) -> None:
    limits = Limits(None, timeout_seconds=600.0)
    for _ in range(num_seen):
        limits.learn("checkpoint", 1.0)
    assert limits.of("checkpoint") == 600.0


def test_short_phases_get_a_minute_and_long_ones_three_times_their_longest() -> None:
    limits = Limits(None, timeout_seconds=600.0)
    for seconds in (90.0, 0.1, 0.1):
        limits.learn("forward", seconds)
        limits.learn("data", 0.1)
    assert limits.of("data") == FLOOR_SECONDS == 60.0
    assert limits.of("forward") == STRETCHES * 90.0 == 270.0
    assert limits.of("validation") == 600.0


def test_limit_is_never_above_the_time_of_the_session() -> None:
    limits = Limits(None, timeout_seconds=100.0)
    for _ in range(NUM_KNOWN):
        limits.learn("validation", 90.0)
    assert limits.of("validation") == 100.0
    short = Limits(None, timeout_seconds=10.0)
    assert short.smallest_seconds == 10.0
    for _ in range(NUM_KNOWN):
        short.learn("data", 1.0)
    assert short.of("data") == 10.0


def test_steps_are_learned_by_their_phases() -> None:
    limits = Limits(None, timeout_seconds=600.0)
    for _ in range(NUM_KNOWN):
        limits.learn_step(45.0, {"forward": 40.0, "other": 5.0})
    assert limits.of("forward") == 120.0
    assert limits.of("backward") == 600.0


def test_steps_without_phases_are_learned_whole() -> None:
    limits = Limits(None, timeout_seconds=600.0)
    for _ in range(NUM_KNOWN):
        limits.learn_step(150.0, {})
    assert limits.of(None) == 450.0


def test_outside_of_phases_the_limit_is_half_the_time_of_the_session_at_least() -> None:
    limits = Limits(None, timeout_seconds=600.0)
    for _ in range(NUM_KNOWN):
        limits.learn_step(1.0, {"forward": 0.9, "other": 0.1})
    assert limits.of("forward") == FLOOR_SECONDS
    assert limits.of(None) == UNCOVERED_SHARE * 600.0 == 300.0


def test_stretches_within_one_validation_do_not_make_it_known() -> None:
    limits = Limits(None, timeout_seconds=600.0)
    for _ in range(10 * NUM_KNOWN):
        limits.note("validation", 1.0)
        limits.note(None, 1.0)
    assert limits.of("validation") == limits.of(None) == 600.0
    limits.note("validation", 90.0)
    for _ in range(NUM_KNOWN):
        limits.learn("validation", 1.0)
    assert limits.of("validation") == STRETCHES * 90.0
