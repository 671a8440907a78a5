"""Numbers and Slurm's short lists are read exactly, and nothing else is taken for one."""

from itertools import islice

import pytest

from rankwise.errors import LaunchError
from rankwise.variables import hosts, number, shown, task_count


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        *((value, "not a whole number") for value in ("", "-1", "+1", "1.0", "1_0", " 1", "1\n", "one", "\u0663")),
        *((value, "too large to count processes") for value in ("9" * 10, "9" * 5000)),
    ],
)
def test_what_counts_nothing_is_refused_with_its_name_and_value(value: str, fault: str) -> None:
    with pytest.raises(LaunchError, match=rf"^RANK='.* is {fault}.*: set it right, or unset it\.$") as raised:
        number({"RANK": value}, "RANK")
    assert len(str(raised.value)) < 200


def test_leading_zeros_are_a_number() -> None:
    assert number({"RANK": "007"}, "RANK") == 7


def test_message_shows_only_what_is_set_and_stays_short() -> None:
    environ = {"A": "1", "B": "x" * 1000, "C": "a b\n"}
    assert shown(environ, "A", "MISSING", "A") == "A=1"
    assert len(shown(environ, "B")) < 60
    assert shown(environ, "C") == r"C='a b\n'"


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("1", [1]),
        ("2(x3),1", [2, 2, 2, 1]),
        ("3,1(x2)", [3, 1, 1]),
    ],
)
def test_task_count_of_every_node_is_read(text: str, counts: list[int]) -> None:
    found = [task_count({"TASKS": text}, "TASKS", node) for node in range(len(counts) + 1)]
    assert found == [(count, sum(counts)) for count in [*counts, 0]]


def test_task_count_of_a_huge_list_needs_no_memory() -> None:
    assert task_count({"TASKS": "1(x999999999)"}, "TASKS", 999999998) == (1, 999999999)


@pytest.mark.parametrize("text", ["", ",", "2(x99999999999)", "2(x3", "2(3)", "(x3)", "-1", "2,,1", "n1"])
def test_malformed_task_counts_are_an_error_that_shows_them(text: str) -> None:
    with pytest.raises(LaunchError, match=r"TASKS=.* is no list of task counts"):
        task_count({"TASKS": text}, "TASKS", 0)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu3", ["gpu3"]),
        ("n[1-2,07-09],gpu3", ["n1", "n2", "n07", "n08", "n09", "gpu3"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("a[1-2]b[3-4]", ["a1b3", "a1b4", "a2b3", "a2b4"]),
        ("a[1,3]-ib.cluster.org", ["a1-ib.cluster.org", "a3-ib.cluster.org"]),
    ],
)
def test_node_list_is_expanded_in_order(text: str, names: list[str]) -> None:
    assert list(hosts({"NODES": text}, "NODES")) == names


def test_huge_node_list_is_expanded_one_by_one() -> None:
    assert list(islice(hosts({"NODES": "n[1-999999999]a[1-999999999]"}, "NODES"), 2)) == ["n1a1", "n1a2"]


@pytest.mark.parametrize(
    "text",
    ["", ",", "n[", "n[1-2", "n1]", "n[]", "n[a-b]", "n[1-2-3]", "n[2-1]", "[1-2]", "n1,", "n 1", "n[1][1][1][1]"],
)
def test_malformed_node_list_is_an_error_that_says_what_to_set(text: str) -> None:
    with pytest.raises(LaunchError, match=r"NODES=.* is no node list .*MASTER_ADDR"):
        next(hosts({"NODES": text}, "NODES"))
