"""A checkpoint is whole and loads, or was never there; whatever happens to whichever rank."""

import errno
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import rankwise
from rankwise import CheckpointManager, PerRank
from rankwise.checkpoint import commit
from rankwise.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from rankwise.files import fsync_file
from rankwise.testing import RankProcesses, on_ranks


def make_state(value: float = 0.0, hidden: int = 4) -> dict[str, Any]:
    net = torch.nn.Sequential(torch.nn.Linear(2, hidden), torch.nn.BatchNorm1d(hidden))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1 + value)
    net(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    return {
        "net": net,
        "optimizers": {"g": optimizer},
        "ema": net.state_dict(),
        "step": int(value),
        "rng": PerRank(rankwise.RngState(torch.device("cpu"))),
    }


def fingerprint(state: dict[str, Any]) -> list[Any]:
    tensors = [*state["net"].state_dict().values(), *state["ema"].values()]
    moments = [entry["exp_avg"] for entry in state["optimizers"]["g"].state_dict()["state"].values()]
    return [tensor.tolist() for tensor in (*tensors, *moments)]


def test_state_comes_back_on_one_process_without_a_group(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "checkpoints")
    assert manager.load(make_state()) is None
    assert (manager.latest(), manager.steps()) == (None, [])
    saved = make_state(3.0)
    manager.save(3, saved)
    drawn = torch.rand(2).tolist()
    manager.save(20, make_state(20.0))
    assert (manager.latest(), manager.steps()) == (20, [3, 20])
    fresh = make_state()
    assert manager.load(fresh, 3) == 3
    assert fingerprint(fresh) == fingerprint(saved)
    assert fresh["optimizers"]["g"].param_groups[0]["lr"] == 3.1
    assert fresh["optimizers"]["g"].param_groups[0]["betas"] == (0.9, 0.999)
    assert torch.rand(2).tolist() == drawn
    assert manager.load(make_state()) == 20


def test_one_item_is_read_without_touching_the_others(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    state = make_state(3.0)
    manager.save(3, state)
    (manager.path(3) / "net.safetensors").write_bytes(b"broken")
    assert manager.read("step") == 3
    assert manager.read("ema", 3)["0.weight"].tolist() == state["ema"]["0.weight"].tolist()
    assert set(manager.read("rng", rank=0)) == {"python", "numpy", "torch", "accelerator"}
    with pytest.raises(CheckpointCorruptError, match=r"net.safetensors is damaged"):
        manager.read("net")
    with pytest.raises(CheckpointNotFoundError, match=r"no item 'vae'. It holds net, optimizers, ema, step; for each"):
        manager.read("vae")
    with pytest.raises(CheckpointNotFoundError, match="no item 'rng' of rank 1"):
        manager.read("rng", rank=1)
    with pytest.raises(CheckpointNotFoundError, match="no item 'rng'"):
        manager.read("rng")


def test_missing_steps_are_named_with_those_that_exist(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint in"):
        manager.read("net")
    manager.save(10, {"step": 10})
    with pytest.raises(CheckpointNotFoundError, match=r"there is no step 7 in .* There is: 10"):
        manager.load({"step": 0}, 7)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    CheckpointManager(tmp_path).save(1, make_state())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_states_in_lists_come_back(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    nets = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)]
    manager.save(1, {"nets": nets, "moments": PerRank((torch.ones(2), [torch.ones(3)]))})
    fresh = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)]
    first, second = torch.zeros(2), torch.zeros(3)
    assert manager.load({"nets": fresh, "moments": PerRank((first, [second]))}) == 1
    assert [net.weight.tolist() for net in fresh] == [net.weight.tolist() for net in nets]
    assert (first.tolist(), second.tolist()) == ([1.0] * 2, [1.0] * 3)


def test_saving_a_whole_step_again_changes_nothing_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"value": "first"})
    before = (manager.path(1) / "manifest.json").stat()
    assert caplog.messages == []
    manager.save(1, {"value": "second"})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages == [f"{manager.path(1)} is there and whole, so step 1 was not saved again"]
    assert manager.read("value") == "first"
    assert (manager.path(1) / "manifest.json").stat() == before


@pytest.mark.parametrize("damage", ["manifest.json", "value.json", "all"])
def test_broken_step_is_moved_aside_and_saved_anew(tmp_path: Path, damage: str) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"value": "first"})
    for path in manager.path(1).iterdir():
        if damage in (path.name, "all"):
            path.unlink()
    manager.save(1, {"value": "second"})
    assert manager.read("value") == "second"
    assert len(list(tmp_path.glob(".broken-step-00000001-*"))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("ema"), "it has items 'ema' unknown to this run"),
        (lambda state: state.update(extra=1), "it lacks items 'extra'"),
        (lambda state: state.update(rng=state["rng"].item), "it lacks items 'rng'"),
        (lambda state: state["optimizers"].pop("g"), "item 'optimizers' .* has keys 'g' unknown to this run"),
        (lambda state: state["optimizers"].update(d=state["optimizers"]["g"]), "lacks keys 'd'"),
        (lambda state: state.update(net=torch.nn.Linear(2, 4)), "item 'net' .* lacks keys 'weight', 'bias'"),
        (lambda state: state.update(net=make_state(hidden=5)["net"]), r"\['0.weight'\] has shape \(4, 2\)"),
        (lambda state: state["optimizers"]["g"].add_param_group({"params": [torch.ones(1)]}), "fit .* AdamW"),
    ],
)
def test_state_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, make_state(1.0))
    state = make_state()
    change(state)
    before = torch.nn.utils.parameters_to_vector(state["net"].parameters()).tolist()
    with pytest.raises(CheckpointMismatchError, match=message):
        manager.load(state)
    if "AdamW" not in message:
        assert torch.nn.utils.parameters_to_vector(state["net"].parameters()).tolist() == before


@pytest.mark.parametrize("step", [-1, 1.0, "7", True])
def test_step_that_is_no_count_is_refused(tmp_path: Path, step: Any) -> None:
    with pytest.raises(CheckpointError, match="a step is a whole number"):
        CheckpointManager(tmp_path).save(step, {})


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_gets_the_shared_state_and_its_own(tmp_path: Path, world_size: int) -> None:
    on_ranks(world_size)(save_and_load)(tmp_path=tmp_path)


def save_and_load(tmp_path: Path) -> None:
    rank = dist.get_rank()
    manager = CheckpointManager(tmp_path)
    net = torch.nn.Linear(2, 2)
    with rankwise.same_on_every_rank(1):
        net.reset_parameters()
    weight = net.weight.tolist()
    place = torch.tensor([rank])
    manager.save(5, {"net": net, "place": PerRank(place)})
    assert manager.latest() == 5
    with torch.no_grad():
        net.weight.zero_()
    place.fill_(-1)
    assert manager.load({"net": net, "place": PerRank(place)}) == 5
    assert net.weight.tolist() == weight
    assert place.item() == rank
    assert {entry.name for entry in manager.path(5).iterdir()} == {
        "manifest.json",
        "net.json",
        "net.safetensors",
        *(f"rank-{r:05d}" for r in range(dist.get_world_size())),
    }


@on_ranks(2)
def test_shared_state_is_asked_of_the_main_process_alone(tmp_path: Path) -> None:
    asked = mock.Mock(return_value={"a": 1})
    item = mock.Mock(spec=["state_dict", "load_state_dict"], state_dict=asked)
    CheckpointManager(tmp_path).save(1, {"item": item})
    assert asked.call_count == (1 if dist.get_rank() == 0 else 0)


@on_ranks(2)
def test_per_rank_state_of_another_number_of_ranks_is_refused_with_both_numbers(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(5, {"place": PerRank(torch.tensor(1)), "step": 5})
    path = manager.path(5) / "manifest.json"
    if dist.get_rank() == 0:
        manifest = commit.read_manifest(path.parent)
        path.unlink()
        staging = path.parent.rename(tmp_path / ".staging-again")
        commit.commit(staging, commit.Manifest(**{**vars(manifest), "world_size": 4}))
    rankwise.barrier()
    with pytest.raises(CheckpointMismatchError, match="saved by 4 ranks and is loaded by 2, and place") as raised:
        manager.load({"place": PerRank(torch.tensor(1)), "step": 0})
    assert raised.value.on_every_rank


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_full_disk_on_one_rank_fails_the_save_on_all_and_keeps_what_was_there(
    tmp_path: Path, failing_rank: int
) -> None:
    on_ranks(2)(fail_to_save)(tmp_path=tmp_path, failing_rank=failing_rank)


def fail_to_save(tmp_path: Path, failing_rank: int) -> None:
    rank = dist.get_rank()
    manager = CheckpointManager(tmp_path)
    own = PerRank({"rank": rank})
    manager.save(1, {"own": own, "value": "first"})
    refuse = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with mock.patch.object(commit, "fsync_file", refuse if rank == failing_rank else fsync_file):  # noqa: SIM117
        with pytest.raises(CheckpointError, match=f"step 2 was not saved, because of rank {failing_rank} ") as raised:
            manager.save(2, {"own": own, "value": "second"})
    assert "OSError: [Errno 28] No space left on device" in str(raised.value)
    assert raised.value.on_every_rank
    rankwise.barrier()
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert manager.read("value") == "first"
    rankwise.barrier()
    manager.save(2, {"own": own, "value": "second"})
    assert manager.read("value") == "second"


@pytest.mark.parametrize("call", ["mkdir", "rename", "fsync_directory", "write_atomic"])
def test_full_disk_at_the_commit_fails_the_save_on_all(tmp_path: Path, call: str) -> None:
    on_ranks(2)(fail_to_commit)(tmp_path=tmp_path, call=call)


def fail_to_commit(tmp_path: Path, call: str) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"value": "first"})
    refuse = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    place: Any = {"mkdir": Path, "rename": os}.get(call, commit)
    with mock.patch.object(place, call, refuse):  # noqa: SIM117
        with pytest.raises(CheckpointError, match="No space left on device") as raised:
            manager.save(2, {"value": "second"})
    assert raised.value.on_every_rank
    # Once renamed a step stays, and the message says that it is there.
    assert manager.steps() == ([1, 2] if call == "fsync_directory" else [1])
    assert ("step-00000002 is there and whole" in str(raised.value)) == (call == "fsync_directory")
    assert manager.load({"value": ""}, 1) == 1
    assert not list(tmp_path.glob(".staging-*"))


@on_ranks(2)
def test_what_one_rank_cannot_store_fails_on_all(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    value = {1, 2} if dist.get_rank() == 1 else 3
    with pytest.raises(CheckpointError, match=r"because of rank 1 .*: state\['own'\] is a builtins.set"):
        manager.save(1, {"own": PerRank(value)})
    assert manager.steps() == []


@on_ranks(2)
def test_damage_that_one_rank_finds_fails_the_load_on_all(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    own = torch.tensor([dist.get_rank()])
    manager.save(1, {"own": PerRank(own)})
    if dist.get_rank() == 0:
        path = manager.path(1) / "rank-00001" / "own.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    rankwise.barrier()
    with pytest.raises(CheckpointCorruptError, match=r"because of rank 1 .*rank-00001/own.safetensors is damaged"):
        manager.load({"own": PerRank(own)})
    with pytest.raises(CheckpointNotFoundError, match="no step 9") as raised:
        manager.load({"own": PerRank(own)}, 9)
    assert raised.value.on_every_rank


class Judge:
    """Counts how often it was loaded, or refuses."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.num_loads = 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.error is not None:
            raise self.error
        self.num_loads += 1


@on_ranks(2)
def test_no_rank_changes_anything_before_all_have_read_and_compared(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    judge, own = Judge(), torch.ones(2)
    manager.save(1, {"judge": judge, "own": PerRank(own)})
    target = torch.zeros(2 if dist.get_rank() == 0 else 3)
    with pytest.raises(CheckpointMismatchError, match=r"step 1 was not loaded, because of rank 1 .* has shape \(2,\)"):
        manager.load({"judge": judge, "own": PerRank(target)})
    assert judge.num_loads == 0
    assert target.tolist() == [0.0] * len(target)


@on_ranks(2)
def test_object_that_refuses_on_one_rank_fails_the_load_on_all_and_tells_what_is_left(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"judge": PerRank(Judge())})
    judge = Judge(ValueError("not mine") if dist.get_rank() == 1 else None)
    with pytest.raises(CheckpointMismatchError, match=r"step 1 was loaded in part at most, .* of rank 1 .* not mine"):
        manager.load({"judge": PerRank(judge)})


@on_ranks(2, timeout_seconds=30.0)
def test_error_whose_class_cannot_travel_reaches_all_ranks(tmp_path: Path) -> None:
    class HomeMadeError(Exception):
        pass

    class HomeMadeMismatchError(CheckpointMismatchError):
        pass

    manager = CheckpointManager(tmp_path)
    manager.save(1, {"judge": PerRank(Judge())})
    for error, expected in (
        (HomeMadeError("own"), CheckpointError),
        (HomeMadeMismatchError("own"), CheckpointMismatchError),
    ):
        judge = Judge(error if dist.get_rank() == 1 else None)
        with pytest.raises(CheckpointError, match=r"because of rank 1 .*own") as raised:
            manager.load({"judge": PerRank(judge)})
        assert type(raised.value) is expected
        assert raised.value.on_every_rank


@pytest.mark.parametrize("existing", [False, True])
def test_ranks_that_save_different_things_are_told(tmp_path: Path, existing: bool) -> None:
    on_ranks(2)(save_different_things)(tmp_path=tmp_path, existing=existing)


def save_different_things(tmp_path: Path, existing: bool) -> None:
    manager = CheckpointManager(tmp_path)
    other = dist.get_rank() == 1
    if existing:
        manager.save(1, {"a": 1})
    calls: list[tuple[int, dict[str, Any], str]] = [
        (2 if other else 1, {"a": 1}, "rank 1 saves step 2, rank 0 step 1"),
        (1, {"a": 1, "b": 2} if other else {"a": 1}, r"rank 1 and rank 0 save different items \(b\)"),
        (1, {"a": PerRank(1) if other else 1}, r"different items \(a\). .* in `PerRank` on all of them or on none"),
        (1, {"a": 1, "../b": 2} if other else {"a": 1}, r"because of rank 1 .* cannot be named '../b'"),
    ]
    for step, state, message in calls:
        with pytest.raises(CheckpointError, match=message) as raised:
            manager.save(step, state)
        assert raised.value.on_every_rank
        rankwise.barrier()
        assert manager.steps() == ([1] if existing else [])
        assert not list(tmp_path.glob(".staging-*"))
        rankwise.barrier()
    manager.save(3, {"b": 1, "a": 2} if other else {"a": 2, "b": 1})  # the order is no difference
    assert manager.latest() == 3


def test_load_from_a_directory_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    refuse = mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
    with mock.patch.object(commit, "find_steps", refuse), pytest.raises(CheckpointError) as raised:
        manager.load({})
    assert str(raised.value).startswith("no step was loaded, because the disk refused on the main process: [Errno 13]")


NUM_VALUES = 20_000


def state_of(step: int, rank: int) -> dict[str, Any]:
    tensor = torch.full((NUM_VALUES,), float(step))
    return {"net": {"weight": tensor}, "step": step, "own": PerRank({"weight": tensor + rank, "step": step})}


def save_for_ever(directory: Path) -> None:
    manager = CheckpointManager(directory)
    step = rankwise.broadcast_object((manager.latest() or 0) + 1)
    while True:
        manager.save(step, state_of(step, dist.get_rank()))
        step += 1


def test_killed_at_any_moment_the_newest_step_loads_and_none_is_lost(tmp_path: Path) -> None:
    rng = random.Random(0)
    manager = CheckpointManager(tmp_path)
    committed: list[int] = []
    for _ in range(15):
        with RankProcesses(save_for_ever, 2, kwargs={"directory": tmp_path}) as ranks:
            first = len(committed)
            deadline = time.monotonic() + 30
            while len(manager.steps()) <= first:
                assert time.monotonic() < deadline, ranks.output()
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.03))
            ranks.kill()
        assert manager.steps()[:first] == committed
        committed = manager.steps()
        assert committed == list(range(1, len(committed) + 1))
        for step in committed[first:]:
            commit.verify(manager.path(step))
        newest = committed[-1]
        assert manager.read("net")["weight"].unique().tolist() == [newest]
        for rank in range(2):
            own = manager.read("own", rank=rank)
            assert (own["step"], own["weight"].unique().tolist()) == (newest, [newest + rank])
    assert len(list(tmp_path.glob(".staging-*"))) <= 1
