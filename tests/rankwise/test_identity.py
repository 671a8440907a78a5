"""An identity is a plain value that any environment gives, at no cost."""

import dataclasses
import pickle
import subprocess
import sys

import pytest

from rankwise.identity import Identity

ENVIRON = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def test_main_process_is_one_of_the_job_and_one_of_each_node() -> None:
    identities = [Identity.resolve(ENVIRON | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}) for rank in range(4)]
    assert [identity.is_main_process for identity in identities] == [True, False, False, False]
    assert [identity.is_local_main_process for identity in identities] == [True, False, True, False]
    assert [identity.node_rank for identity in identities] == [0, 0, 1, 1]


def test_hostname_is_given_or_from_the_environment_or_assumed() -> None:
    assert Identity.resolve({"HOSTNAME": "a"}, hostname="b").hostname == "b"
    from_environ, unknown = Identity.resolve({"HOSTNAME": "a"}), Identity.resolve({"HOSTNAME": ""})
    assert (from_environ.hostname, from_environ.sources["hostname"]) == ("a", "HOSTNAME")
    assert (unknown.hostname, unknown.sources["hostname"]) == ("localhost", "assumed")


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
    # The least of a few runs: the others wait for the machine, not for us.
    program = (
        "import sys, time; start = time.perf_counter(); import rankwise; rankwise.Identity.resolve({}); "
        "seconds = time.perf_counter() - start; assert 'torch' not in sys.modules; print(seconds)"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(4)]
    assert [run.stderr for run in runs] == [""] * 4
    assert min(float(run.stdout) for run in runs) < 0.05
