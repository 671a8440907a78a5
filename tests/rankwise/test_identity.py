"""An identity is a plain value that any environment gives, at no cost."""

import contextlib
import dataclasses
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise import identity as identity_module
from rankwise import launchers, rendezvous
from rankwise.errors import LaunchError
from rankwise.identity import Identity
from rankwise.rendezvous import MeetingPoint, find_meeting_point

ENVIRON = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
NODES = {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}


def numbers(identity: Identity) -> tuple[int, int, int, int, int, int]:
    places = (identity.rank, identity.local_rank, identity.node_rank)
    return (*places, identity.world_size, identity.local_world_size, identity.num_nodes)


def test_main_process_is_one_of_the_job_and_one_of_each_node() -> None:
    identities = [Identity.resolve(ENVIRON | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}) for rank in range(4)]
    assert [identity.is_main_process for identity in identities] == [True, False, False, False]
    assert [identity.is_local_main_process for identity in identities] == [True, False, True, False]
    assert [identity.node_rank for identity in identities] == [0, 0, 1, 1]


def test_nothing_set_is_a_single_process() -> None:
    identity = Identity.resolve({"PATH": "/bin"})
    assert (identity.launcher, *numbers(identity)) == ("single", 0, 0, 0, 1, 1, 1)
    assert {name for name, source in identity.sources.items() if source != "assumed"} == {"job_id"}
    assert (identity.job_id, identity.sources["job_id"]) == (None, "none")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        # rank, local rank and world size are given; local_rank, node_rank, ..., num_nodes are what fits them.
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}, (0, 0, 0, 8, 8, 1)),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, (1, 1, 0, 2, 2, 1)),
        ({"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, (1, 0, 1, 2, 1, 2)),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, (5, 1, 1, 8, 4, 2)),
        ({"RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": "8"}, (6, 2, 1, 8, 4, 2)),
        ({"RANK": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, (2, 1, 1, 4, 2, 2)),  # cyclic
        ({"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, (0, 1, 0, 4, 2, 2)),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}, (2, 0, 1, 3, 2, 2)),  # uneven
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, (3, 1, 1, 4, 2, 2)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 0, 3, 4, 1, 4)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", **NODES}, (0, 0, 1, 8, 4, 2)),
        ({"RANK": "7", "LOCAL_RANK": "6", "WORLD_SIZE": "8", **NODES}, (7, 6, 1, 8, 7, 2)),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "GROUP_RANK": "2"}, (2, 0, 2, 4, 2, 3)),
        ({"RANK": "2", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"}, (2, 2, 0, 4, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 0, 0, 1, 1, 1)),
    ],
)
def test_what_is_not_said_is_assumed_so_that_it_fits(environ: dict[str, str], expected: tuple[int, ...]) -> None:
    assert numbers(Identity.resolve(environ)) == expected


def test_what_the_environment_does_not_prove_is_marked_as_assumed() -> None:
    sources = Identity.resolve({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}).sources
    assert {name for name, source in sources.items() if source == "assumed"} == {
        "local_world_size",
        "num_nodes",
        "node_rank",
        "hostname",
    }


def test_one_node_is_proven_where_it_holds_all_processes() -> None:
    sources = Identity.resolve({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}).sources
    assert (sources["num_nodes"], sources["node_rank"]) == ("LOCAL_WORLD_SIZE", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RANK": "4"}, ["RANK=4", "WORLD_SIZE=4", "RANK must lie in 0..3"]),
        ({"LOCAL_RANK": "2"}, ["LOCAL_RANK=2", "LOCAL_WORLD_SIZE=2", "LOCAL_RANK must lie in 0..1"]),
        ({"LOCAL_RANK": "4"}, ["LOCAL_RANK=4", "WORLD_SIZE=4"]),
        ({"LOCAL_WORLD_SIZE": "8"}, ["LOCAL_WORLD_SIZE=8", "WORLD_SIZE=4", "must lie in 1..4"]),
        ({"WORLD_SIZE": "0"}, ["RANK=2", "WORLD_SIZE=0"]),
        ({"LOCAL_WORLD_SIZE": "0"}, ["LOCAL_WORLD_SIZE=0", "must lie in 1..4"]),
        ({"GROUP_RANK": "2", "GROUP_WORLD_SIZE": "2"}, ["GROUP_RANK=2", "GROUP_WORLD_SIZE=2", "0..1"]),
        ({"GROUP_WORLD_SIZE": "5"}, ["GROUP_WORLD_SIZE=5", "WORLD_SIZE=4"]),
        ({"GROUP_WORLD_SIZE": "4"}, ["GROUP_WORLD_SIZE=4", "LOCAL_WORLD_SIZE=2", "WORLD_SIZE=4"]),
        ({"GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"}, ["GROUP_WORLD_SIZE=1", "LOCAL_WORLD_SIZE=2", "WORLD_SIZE=4"]),
        ({"GROUP_RANK": "3"}, ["GROUP_RANK=3", "LOCAL_WORLD_SIZE=2", "WORLD_SIZE=4"]),
        ({"RANK": "-1"}, ["RANK='-1'"]),
        ({"RANK": ""}, ["RANK=''"]),
        ({"RANK": "1.0"}, ["RANK='1.0'"]),
        ({"WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE='9999", "too large"]),
    ],
)
def test_contradiction_is_an_error_that_names_variables_and_values(changed: dict[str, str], words: list[str]) -> None:
    with pytest.raises(LaunchError) as raised:
        Identity.resolve(ENVIRON | changed)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert len(str(raised.value)) < 300


def test_hostname_is_given_or_from_the_environment_or_assumed() -> None:
    given_one = Identity.resolve({"HOSTNAME": "a"}, hostname="b")
    assert (given_one.hostname, given_one.sources["hostname"]) == ("b", "given")
    from_environ, unknown = Identity.resolve({"HOSTNAME": "a"}), Identity.resolve({"HOSTNAME": ""})
    assert (from_environ.hostname, from_environ.sources["hostname"]) == ("a", "HOSTNAME")
    assert (unknown.hostname, unknown.sources["hostname"]) == ("localhost", "assumed")


def test_slurms_name_of_the_node_comes_first_in_a_slurm_job_only() -> None:
    environ = {"SLURMD_NODENAME": "n1"}
    assert Identity.resolve(environ, hostname="machine").hostname == "machine"
    in_job = Identity.resolve(environ | {"SLURM_JOB_ID": "7"}, hostname="machine")
    assert (in_job.hostname, in_job.sources["hostname"]) == ("n1", "SLURMD_NODENAME")


def test_job_id_is_the_innermost_real_one() -> None:
    slurm = {"SLURM_JOB_ID": "7", "PBS_JOBID": ""}
    torchrun = ENVIRON | NODES | {"TORCHELASTIC_RUN_ID": "none"}
    found = [Identity.resolve(environ) for environ in (torchrun, torchrun | slurm, slurm, {"LSB_JOBID": "8"})]
    assert [(each.job_id, each.sources["job_id"]) for each in found] == [
        (None, "none"),
        ("7", "SLURM_JOB_ID"),
        ("7", "SLURM_JOB_ID"),
        ("8", "LSB_JOBID"),
    ]


def test_identity_is_frozen_hashable_and_pickles() -> None:
    identity = Identity.resolve(ENVIRON)
    with pytest.raises(dataclasses.FrozenInstanceError):
        identity.rank = 1  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(identity)) == identity
    assert hash(identity) == hash(Identity.resolve(ENVIRON))


def test_every_field_names_its_source() -> None:
    identity = Identity.resolve(ENVIRON)
    fields = {field.name for field in dataclasses.fields(identity)} - {"sources"}
    assert set(identity.sources) == fields


def test_resolving_imports_no_torch_and_costs_little() -> None:
    # Its own time, and the least of a few runs: what others do on this machine does not count.
    program = (
        "import sys, time; start = time.process_time(); import rankwise; rankwise.Identity.resolve({}); "
        "seconds = time.process_time() - start; assert 'torch' not in sys.modules; print(seconds)"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(4)]
    assert [run.stderr for run in runs] == [""] * 4
    assert min(float(run.stdout) for run in runs) < 0.05


def known_variables() -> list[str]:
    """Every variable that the code reads, found in its source, with the prefixes of the MPIs."""
    modules = (identity_module, launchers, rendezvous)
    code = "".join(Path(str(module.__file__)).read_text() for module in modules)
    names = set(re.findall(r'"([A-Z][A-Z0-9_]+[A-Z0-9])"', code))
    prefixes = set(re.findall(r'"([A-Z][A-Z0-9_]+_)"', code))
    groups = {"SLURM_JOB_NODELIST_HET_GROUP_0", "SLURM_JOB_NODELIST_PACK_GROUP_1"}
    return sorted(names | groups | {p + n for p in prefixes for n in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")})


VARIABLES = known_variables()
RECORDED = [
    launch["every_process"] | process
    for path in sorted((Path(__file__).parent / "environments").glob("*.json"))
    for launch in [json.loads(path.read_text())]
    for process in launch["processes"]
]
NASTY = ["", " ", "-1", "01", "1.5", "\u0663", "\u00b2", "\x00", "\udcff", "9" * 9, "9" * 10, "9" * 5000, "4294967290"]
NASTY += ["2(x3),1", "2(x99999999999)", "1(x999999999)", "1(x2", "0(x2)", ",", "0,1", "n[1-999999999]", "n[2-1]", "n["]
NASTY += ["a[1-2]b[3-4]", "n1", "none", "arbitrary", "BATCH", '["a", "b"]', '[""]', "%s{}", "65536"]
VALUES = st.one_of(st.integers(0, 5).map(str), st.sampled_from(NASTY), st.text(max_size=6))
CHANGES = st.dictionaries(st.one_of(st.sampled_from(VARIABLES), st.text(max_size=6)), VALUES, max_size=8)
BASES = st.one_of(st.just({}), st.sampled_from(RECORDED))


def test_property_test_knows_the_variables_of_every_launcher() -> None:
    wanted = {"RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "SM_HOSTS", "MASTER_PORT", "PALS_RANKID"}
    assert wanted <= set(VARIABLES)
    assert len(VARIABLES) > 80


@settings(max_examples=300, deadline=None)
@given(BASES, CHANGES, st.lists(st.sampled_from(VARIABLES), max_size=3))
def test_any_mapping_gives_an_identity_and_a_meeting_point_or_our_error(
    base: dict[str, str], changes: dict[str, str], removed: list[str]
) -> None:
    environ = {name: value for name, value in (base | changes).items() if name not in removed}
    with contextlib.suppress(LaunchError):
        identity = Identity.resolve(environ)
        check_identity(identity, environ)
        check_meeting_point(find_meeting_point(identity, environ))


def check_identity(identity: Identity, environ: dict[str, str]) -> None:
    assert 0 <= identity.rank < identity.world_size
    assert 0 <= identity.local_rank < identity.local_world_size <= identity.world_size
    assert 0 <= identity.node_rank < identity.num_nodes <= identity.world_size
    assert (identity.num_nodes == 1) == (identity.local_world_size == identity.world_size)
    assert identity.hostname
    assert identity.launcher in launchers.LAUNCHERS
    sources = dict(identity.sources)
    assert (sources.pop("job_id") == "none") == (identity.job_id is None)
    assert all(source in environ or source == "assumed" for source in sources.values())


def check_meeting_point(point: MeetingPoint) -> None:
    assert point.address
    assert point.port is None or 1 <= point.port <= 65535
    assert point.token is None or re.fullmatch(r"[A-Za-z0-9._-]{1,100}", point.token)
