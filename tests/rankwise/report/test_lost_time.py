"""Who is blamed for the waiting of the others."""

import numpy as np
import pytest

from rankwise.report.heat import RankSteps
from rankwise.report.lost_time import find_blame


def run(
    num_ranks: int, num_steps: int, slow: int | None, phase: str = "data", extra: float = 0.1, noise: float = 0.02
) -> list[RankSteps]:
    """Ranks in step: whoever is done waits in communication."""
    random = np.random.default_rng(0)
    work = {
        name: 0.1 * (1 + noise * random.standard_normal((num_ranks, num_steps)))
        for name in ("data", "forward", "backward")
    }
    if slow is not None:
        work[phase][slow, num_steps // 2 :] += extra
    own = sum(work.values())
    seconds = own.max(axis=0) + 0.01
    steps = np.arange(11, 11 + num_steps)
    return [
        RankSteps(
            rank,
            steps,
            seconds,
            {name: values[rank] for name, values in work.items()} | {"communication": seconds - own[rank]},
        )
        for rank in range(num_ranks)
    ]


def test_the_slow_rank_is_named_with_its_phase_and_steps_not_those_that_wait() -> None:
    for phase in ("data", "backward"):
        (blame,) = find_blame(run(8, 200, slow=5, phase=phase), (11, 210), 3)
        assert (blame.rank, blame.phase) == (5, phase)
        assert 105 <= blame.first_step <= 115
        assert 205 <= blame.last_step <= 210
        assert 1.25 < blame.slowdown < 1.45
        assert 9.0 < blame.seconds < 11.0


def test_of_two_ranks_the_slow_one_is_named() -> None:
    (blame,) = find_blame(run(2, 100, slow=1), (11, 110), 3)
    assert blame.rank == 1


def test_noise_blames_nobody() -> None:
    assert find_blame(run(64, 300, slow=None), (11, 310), 3) == []


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_few_ranks_that_are_last_by_turns_blame_nobody(num_ranks: int) -> None:
    ranks = run(num_ranks, 300, slow=None, noise=0.3)
    assert find_blame(ranks, (11, 310), 3) == []


def test_two_of_eight_that_are_slow_are_both_named() -> None:
    ranks = run(8, 200, slow=5)
    late = run(8, 200, slow=2)
    both = [late[2] if rank.rank == 2 else rank for rank in ranks]
    assert {blame.rank for blame in find_blame(both, (11, 210), 3)} == {2, 5}


def test_one_rank_waits_for_nobody() -> None:
    assert find_blame(run(1, 50, slow=0), (11, 60), 3) == []


def test_ranks_that_share_no_step_are_not_compared() -> None:
    early, late = (RankSteps(rank, np.arange(5) + 10 * rank, np.ones(5), {}) for rank in range(2))
    assert find_blame([early, late], (0, 14), 3) == []
