"""Errors say who failed and with what, and survive the way to other processes."""

import pickle

import pytest

from rankwise.errors import (
    CheckpointCorruptError,
    DeviceError,
    LaunchError,
    RankFailedError,
    RankFailure,
    RankwiseError,
)


def failure(rank: int, message: str = "no room") -> RankFailure:
    return RankFailure(rank, "node-a", "OSError", message)


def test_first_failure_is_told_and_the_others_are_counted() -> None:
    assert str(RankFailedError((failure(3),))) == "rank 3 (node-a) failed: OSError: no room"
    assert str(RankFailedError((failure(3),), "failed first")).startswith("rank 3 (node-a) failed first: ")
    many = str(RankFailedError(tuple(failure(rank) for rank in range(20))))
    assert "also failed: 19 more, rank 1, 2, 3" in many
    assert many.endswith("8, ...)")


def test_traceback_is_kept_for_foreign_errors_only() -> None:
    try:
        raise ValueError("foreign")
    except ValueError as error:
        foreign = RankFailure.of(error, rank=1, host="a")
    assert "test_errors.py" in foreign.traceback
    assert RankFailure.of(DeviceError("ours"), rank=1, host="a").traceback == ""


def test_errors_pickle_with_all_they_know() -> None:
    error = RankFailedError((failure(1), failure(2)), "failed first")
    error.on_every_rank = True
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.failures, copy.on_every_rank) == (str(error), error.failures, True)


def test_what_a_user_can_fix_in_the_environment_is_a_value_error() -> None:
    assert issubclass(LaunchError, (RankwiseError, ValueError))
    assert issubclass(CheckpointCorruptError, RankwiseError)
    assert RankwiseError("x").on_every_rank is False


def test_values_of_secret_variables_are_in_neither_message_nor_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "do-not-tell-anybody")
    try:
        raise ValueError("refused: do-not-tell-anybody")
    except ValueError as error:
        failure = RankFailure.of(error, rank=1, host="a")
    assert failure.message == "refused: ***"
    assert "ValueError: refused: ***" in failure.traceback
    assert "do-not-tell" not in failure.traceback


def test_error_that_cannot_say_what_it_is_still_reaches_the_others() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    failure = RankFailure.of(Mute(), rank=1, host="a")
    assert (failure.error_type, failure.message) == ("Mute", "<no text: RuntimeError in its __str__>")
