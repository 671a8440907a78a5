"""Which launcher is at work is read from its own variables, and contradictions are named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import LaunchError
from rankwise.identity import Identity
from rankwise.launchers import find_placement

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
}
BY_HAND = {name: value for name, value in TORCHRUN.items() if name != "TORCHELASTIC_RUN_ID"}
SHORT = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_torchrun_gives_every_field_and_its_source() -> None:
    place = find_placement(TORCHRUN | {"TORCHELASTIC_RUN_ID": "job-7"})
    assert (place.launcher, place.job_id) == ("torchrun", "job-7")
    assert (place.rank, place.local_rank, place.node_rank) == (3, 1, 1)
    assert (place.world_size, place.local_world_size, place.num_nodes) == (4, 2, 2)
    assert place.sources["node_rank"] == "GROUP_RANK"


def test_nodes_of_unequal_size_are_right_under_torchrun() -> None:
    place = find_placement(TORCHRUN | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert (place.rank, place.local_rank, place.node_rank, place.num_nodes) == (3, 0, 1, 2)


def test_run_id_none_is_no_job() -> None:
    assert find_placement(TORCHRUN).job_id is None


def test_same_variables_by_hand_are_launcher_env() -> None:
    assert find_placement(BY_HAND).launcher == "env"


def test_nothing_set_is_a_single_process() -> None:
    place = find_placement({"PATH": "/bin"})
    assert (place.launcher, place.rank, place.world_size, place.num_nodes) == ("single", 0, 1, 1)


def test_world_size_one_alone_is_a_single_process() -> None:
    assert find_placement({"WORLD_SIZE": "1"}).launcher == "single"


def test_what_the_environment_does_not_prove_is_marked_as_assumed() -> None:
    place = find_placement(SHORT)
    assert (place.local_world_size, place.num_nodes, place.node_rank) == (2, 1, 0)
    assert {name for name, source in place.sources.items() if source == "assumed"} == {
        "local_world_size",
        "num_nodes",
        "node_rank",
        "job_id",
    }


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (TORCHRUN | {"RANK": "4"}, ["RANK=4", "WORLD_SIZE=4", "0..3"]),
        (TORCHRUN | {"LOCAL_RANK": "2"}, ["LOCAL_RANK=2", "LOCAL_WORLD_SIZE=2"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, ["LOCAL_WORLD_SIZE=8", "WORLD_SIZE=4"]),
        (TORCHRUN | {"WORLD_SIZE": "0"}, ["WORLD_SIZE=0", "at least 1"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, ["LOCAL_WORLD_SIZE=0", "at least 1"]),
        (TORCHRUN | {"GROUP_RANK": "2"}, ["GROUP_RANK=2", "GROUP_WORLD_SIZE=2"]),
        (TORCHRUN | {"GROUP_WORLD_SIZE": "5"}, ["GROUP_WORLD_SIZE=5", "WORLD_SIZE=4"]),
        (TORCHRUN | {"GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"}, ["GROUP_WORLD_SIZE=1", "LOCAL_WORLD_SIZE=2"]),
        (TORCHRUN | {"RANK": "-1"}, ["RANK='-1'"]),
        (TORCHRUN | {"RANK": ""}, ["RANK=''"]),
        (TORCHRUN | {"RANK": "one"}, ["RANK='one'"]),
        (TORCHRUN | {"RANK": "1.0"}, ["RANK='1.0'"]),
        (TORCHRUN | {"RANK": "1_0"}, ["RANK='1_0'"]),
        (TORCHRUN | {"WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE='9999", "no count"]),
        (without(TORCHRUN, "LOCAL_RANK", "GROUP_RANK"), ["TORCHELASTIC_RUN_ID", "LOCAL_RANK, GROUP_RANK"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "RANK is not set"]),
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE is not set"]),
        ({"LOCAL_RANK": "0"}, ["LOCAL_RANK=0", "RANK is not set"]),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ["RANK=1", "WORLD_SIZE=2", "LOCAL_RANK is not set"]),
        (SHORT | {"LOCAL_RANK": "0"}, ["RANK=1", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE is not set"]),
        (SHORT | {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}, ["WORLD_SIZE=3", "LOCAL_WORLD_SIZE=2"]),
    ],
)
def test_contradiction_is_an_error_that_names_variables_and_values(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(LaunchError) as raised:
        find_placement(environ)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert len(str(raised.value)) < 300


NAMES = [*TORCHRUN, "HOSTNAME", "MASTER_ADDR"]
VALUES = st.one_of(st.integers(-2, 9).map(str), st.text(max_size=6), st.just("9" * 5000))


@given(st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text()), VALUES))
def test_any_mapping_gives_an_identity_or_our_error(environ: dict[str, str]) -> None:
    try:
        identity = Identity.resolve(environ)
    except LaunchError:
        return
    assert 0 <= identity.rank < identity.world_size
    assert 0 <= identity.local_rank < identity.local_world_size <= identity.world_size
    assert 0 <= identity.node_rank < identity.num_nodes <= identity.world_size
    assert identity.hostname
