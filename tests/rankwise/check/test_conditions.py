import ast

import pytest

from rankwise.check.conditions import combine, compare, truth
from rankwise.check.values import UNKNOWN, Atom, Kind, Many, Value, const, of
from rankwise.check.values import Test as Condition

RANK, LOCAL, SIZE = of("rank"), of("local_rank"), of("world_size")
MAIN, SINGLE = Atom("rank", "main"), Atom("single", "main")


@pytest.mark.parametrize(
    ("operator", "number", "main"),
    [(ast.Eq(), 0, True), (ast.NotEq(), 0, False), (ast.Gt(), 0, False), (ast.LtE(), 0, True), (ast.Lt(), 1, True)],
)
def test_a_comparison_with_0_divides_rank_0_from_the_others(operator: ast.cmpop, number: int, main: bool) -> None:
    test = compare(RANK, operator, const(number), "")
    assert test is not None
    assert test.when_true == ((MAIN,) if main else (MAIN.opposite,))
    assert test.when_false == ((MAIN.opposite,) if main else (MAIN,))


def test_the_sides_may_be_turned() -> None:
    test = compare(const(0), ast.Lt(), RANK, "")
    assert test is not None
    assert test.when_true == (MAIN.opposite,)


@pytest.mark.parametrize("kind", ["rank", "local_rank", "spawn_rank", "some_rank"])
def test_minus_1_means_a_lone_process(kind: Kind) -> None:
    test = compare(of(kind), ast.Eq(), const(-1), "")
    assert test is not None
    assert test.when_true == (SINGLE,)


def test_a_world_of_1_is_a_lone_process() -> None:
    test = compare(SIZE, ast.Gt(), const(1), "")
    assert test is not None
    assert test.when_false == (SINGLE,)


def test_membership_of_0_and_minus_1_is_the_main_process() -> None:
    numbers = Value(data=Many((const(0), const(-1))))
    test = compare(LOCAL, ast.In(), numbers, "")
    assert test is not None
    assert test.when_true == (Atom("local_rank", "main"),)


def test_a_rank_as_a_truth_is_not_rank_0() -> None:
    assert truth(RANK).when_true == (MAIN.opposite,)


def test_and_keeps_both_and_tells_nothing_of_the_rest() -> None:
    test = combine([truth(RANK), Condition()], True)
    assert test.when_true == (MAIN.opposite,)
    assert all(not atom.sure for atom in test.when_false)


def test_or_with_an_unknown_flag_is_no_sure_guard() -> None:
    test = combine([Condition(), ~truth(RANK)], False)
    assert [atom.sure for atom in test.when_true] == [False]


def test_or_with_not_distributed_stays_sure() -> None:
    test = combine([Condition((SINGLE,), ()), ~truth(RANK)], False)
    assert test.when_true == (MAIN,)


def test_unknown_values_say_nothing() -> None:
    assert compare(UNKNOWN, ast.Eq(), const(0), "") is None
