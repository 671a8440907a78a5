"""Of ranks that hang, who is the cause and who only waits; and the line that says so."""

import time
from collections.abc import Sequence
from typing import Any

import pytest

from rankwise.monitor.blame import Hang, Row, find_hang, in_words


def row(rank: int, idle_seconds: float = 70.0, **told: Any) -> Row:
    """A rank in step 6 that has been stuck in its forward, and may be for a minute."""
    default = {"step": 5, "phase": "forward", "limit_seconds": 60.0, "where": "train.py:8 in step", "host": "node-b"}
    return Row(rank, idle_seconds=idle_seconds, **{**default, **told})


def waiting(rank: int, idle_seconds: float = 69.0, **told: Any) -> Row:
    return row(rank, idle_seconds, **{"phase": "communication", "waits": True, "where": "train.py:9 in step"} | told)


def causes(rows: Sequence[Row], absent: Sequence[int] = ()) -> tuple[int, ...] | None:
    hang = find_hang(rows, absent)
    return None if hang is None else tuple(row.rank for row in hang.causes)


def test_rank_that_works_is_the_cause_and_those_that_wait_are_not() -> None:
    assert causes([waiting(0), waiting(1), row(2), waiting(3)]) == (2,)


@pytest.mark.parametrize("idle_seconds", [0.0, 59.0])
def test_ranks_within_their_limits_do_not_hang(idle_seconds: float) -> None:
    assert causes([row(rank, idle_seconds) for rank in range(3)]) is None


def test_waiting_ranks_are_patient_while_the_one_they_wait_for_may_take_its_time() -> None:
    assert causes([row(0, 70.0, phase="checkpoint", limit_seconds=600.0), waiting(1), waiting(2)]) is None
    assert causes([row(0, 0.1), waiting(1), waiting(2)]) is None


def test_rank_that_is_stuck_in_a_way_that_looks_like_work_waits_for_one_that_may_take_its_time() -> None:
    patient = row(0, 70.0, phase="validation", limit_seconds=600.0)
    assert causes([patient, row(1), row(2)]) is None


def test_stuck_rank_is_told_of_though_others_go_on_without_it() -> None:
    assert causes([row(0, 0.1, step=90), row(1, step=5), row(2, 0.2, step=91)]) == (1,)


def test_silent_rank_is_the_cause_even_if_it_said_last_that_it_waits() -> None:
    assert causes([waiting(0), waiting(1, silent=True), waiting(2)]) == (1,)
    assert causes([row(0), waiting(1, silent=True), row(2)]) == (1,)


def test_rank_at_an_earlier_step_is_the_cause() -> None:
    assert causes([row(0, step=6), row(1, step=5), row(2, step=6)]) == (1,)
    assert causes([waiting(0, step=6), waiting(1, step=5), waiting(2, step=6)]) == (1,)


def test_rank_that_has_begun_fewer_collectives_is_the_cause() -> None:
    assert causes([row(0, enqueued=40), row(1, enqueued=39), row(2, enqueued=40)]) == (1,)


def test_of_ranks_that_all_work_the_one_at_another_place_is_the_cause() -> None:
    assert causes([row(0), row(1), row(2, where="loader.py:3 in read"), row(3)]) == (2,)


def test_where_all_are_at_one_place_none_is_the_cause() -> None:
    hang = find_hang([row(rank) for rank in range(4)])
    assert hang is not None
    assert hang.causes == ()
    assert hang.ranks == (0, 1, 2, 3)
    assert in_words(hang, None) == (
        "no progress for 70 s: all 4 ranks are in forward of step 6 (train.py:8 in step), and none is behind the others"
    )


def test_where_all_wait_the_one_in_another_collective_is_the_cause() -> None:
    rows = [waiting(rank, collective="barrier 'end'") for rank in range(3)] + [waiting(3, collective="agree on any")]
    assert causes(rows) == (3,)
    hang = find_hang(rows)
    assert hang is not None
    assert "rank 3 (node-b) is in agree on any of step 6" in in_words(hang, None)
    assert in_words(hang, None).endswith("the 3 others wait in barrier 'end'")


def test_rank_that_left_is_the_cause_where_all_others_wait() -> None:
    assert causes([waiting(0), row(1, left=True), waiting(2)]) == (1,)
    assert causes([row(0), row(1, left=True), waiting(2)]) == (0,)


def test_ranks_that_have_left_do_not_hang() -> None:
    assert causes([row(rank, 7000.0, left=True) for rank in range(3)]) is None


def test_rank_that_never_spoke_is_the_cause_where_all_others_wait() -> None:
    hang = find_hang([waiting(0), waiting(2)], absent=[1])
    assert hang is not None
    assert hang.ranks == (1,)
    assert "rank 1 has never been heard of; the 2 others wait in communication" in in_words(hang, None)
    busy = find_hang([row(0), waiting(2)], absent=[1])
    assert busy is not None
    assert busy.ranks == (0,)


@pytest.mark.parametrize(
    "held", [{"at_prompt": True}, {"facts": {"state": "t"}}, {"facts": {"state": "S", "tracer": 7}}]
)
def test_rank_in_a_debugger_is_no_hang(held: dict[str, Any]) -> None:
    assert causes([waiting(0), row(1, silent="facts" in held, **held), waiting(2)]) is None


def test_process_alone_that_is_stuck_is_the_cause() -> None:
    assert causes([row(0)]) == (0,)
    assert causes([waiting(0)]) == (0,)


def test_line_names_rank_node_device_process_and_place() -> None:
    told = {"device": "cuda:1", "pid": 71, "phase": "backward", "step": 1041, "silent": True, "facts": {"state": "T"}}
    others = tuple(waiting(rank, 60.0, step=1041) for rank in range(8) if rank != 3)
    hang = Hang((row(3, 62.0, **told),), others)
    assert in_words(hang, "RUN/hangs/x") == (
        "no progress for 62 s: rank 3 (node-b, cuda:1, pid 71) was last in backward of step 1042 (train.py:8 in step), "
        "stopped by a signal; the 7 others wait in communication. Stacks: RUN/hangs/x"
    )


def test_line_tells_apart_others_that_wait_and_others_that_work() -> None:
    hang = Hang((row(0),), (waiting(1), row(2, phase="data")))
    assert in_words(hang, None).endswith("(train.py:8 in step); 1 waits in communication, 1 more is in data")


def test_line_names_a_few_of_many_causes() -> None:
    line = in_words(Hang(tuple(row(rank, silent=True) for rank in range(100)), ()), None)
    assert line.count("rank ") == 4
    assert line.endswith("and does not answer, 96 more ranks too")


def test_ten_thousand_ranks_are_judged_in_a_moment() -> None:
    rows = [waiting(rank) for rank in range(10_239)] + [row(10_239)]
    begin = time.process_time()
    assert causes(rows) == (10_239,)
    assert time.process_time() - begin < 2.0
