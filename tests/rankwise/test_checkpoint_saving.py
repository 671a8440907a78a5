"""A step appears when every rank has done its part, and otherwise there is none and every rank hears why."""

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import rankwise
from rankwise import CheckpointManager, PerRank
from rankwise.checkpoint import folder, saving
from rankwise.checkpoint.manifest import read_manifest
from rankwise.errors import CheckpointCorruptError, CheckpointError, RankFailedError
from rankwise.testing import RankProcesses, on_ranks

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def leftovers(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith(("step-", "lease-")))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_gets_the_shared_state_and_its_own(tmp_path: Path, world_size: int) -> None:
    on_ranks(world_size)(save_and_load)(tmp_path=tmp_path)


def save_and_load(tmp_path: Path) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    manager = CheckpointManager(tmp_path)
    net = torch.nn.Linear(200, 200)
    with rankwise.same_on_every_rank(1):
        net.reset_parameters()
    expected = net.weight.detach().clone()
    place = torch.tensor([rank])
    manager.save(5, {"net": net, "place": PerRank({"at": place, "of": [rank]})})
    assert manager.latest() == 5
    with torch.no_grad():
        net.weight.zero_()
    place.fill_(-1)
    assert manager.load({"net": net, "place": PerRank({"at": place, "of": []})}) == 5
    assert torch.equal(net.weight, expected)
    assert place.item() == rank
    for other in range(world_size):
        assert manager.read("place", rank=other) == {"at": torch.tensor([other]), "of": [other]}
    files = {entry.name for entry in manager.path(5).iterdir()}
    own = {name for r in range(world_size) for name in (f"rank-{r:05d}.json", f"__{r}_0.distcp")}
    assert files == {"manifest.json", "tensors.json", "values.json", ".metadata", *own}
    assert set(read_manifest(manager.path(5)).files) == files - {"manifest.json"}
    total = sum((manager.path(5) / f"__{r}_0.distcp").stat().st_size for r in range(world_size))
    assert total < 200 * 200 * 4 * 1.2  # what all have was written once
    rankwise.barrier()


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
    broken = mock.Mock(side_effect=NO_SPACE) if rank == failing_rank else saving.write_shard
    with mock.patch.object(saving, "write_shard", broken):  # noqa: SIM117
        with pytest.raises(CheckpointError, match=f"step 2 was not saved, because of rank {failing_rank} ") as raised:
            manager.save(2, {"own": own, "value": "second"})
    assert "OSError: [Errno 28] No space left on device" in str(raised.value)
    assert raised.value.on_every_rank
    rankwise.barrier()
    assert (manager.steps(), leftovers(tmp_path)) == ([1], [])
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
    place: Any = {"mkdir": Path, "rename": os}.get(call, folder)
    with mock.patch.object(place, call, mock.Mock(side_effect=NO_SPACE)):  # noqa: SIM117
        with pytest.raises(CheckpointError, match="No space left on device") as raised:
            manager.save(2, {"value": "second"})
    assert raised.value.on_every_rank
    rankwise.barrier()
    # Once renamed a step stays, and the message says that it is there.
    assert manager.steps() == ([1, 2] if call == "fsync_directory" else [1])
    assert ("step-00000002 is there and whole" in str(raised.value)) == (call == "fsync_directory")
    assert manager.load({"value": ""}, 1) == 1
    assert leftovers(tmp_path) == []
    rankwise.barrier()
    manager.save(2, {"value": "second"})  # confirms it, where it is there
    assert manager.read("value") == "second"


class Failing:
    """An item whose state cannot be had on one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == self.rank:
            raise ValueError("no state here")
        return {"a": torch.ones(2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("never saved")


@on_ranks(3)
def test_what_one_rank_cannot_give_or_store_fails_on_all_and_the_next_save_works(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for rank in range(3):
        value = {1, 2} if dist.get_rank() == rank else 3
        for state, message in (
            ({"own": PerRank(value)}, rf"because of rank {rank} .*: state\['own'\]\['rank-0000.'\] is a builtins.set"),
            ({"item": Failing(rank)}, rf"because of rank {rank} .*ValueError: no state here"),
        ):
            with pytest.raises(CheckpointError, match=message) as raised:
                manager.save(1, state)
            assert raised.value.on_every_rank
    assert (manager.steps(), leftovers(tmp_path)) == ([], [])
    rankwise.barrier()
    manager.save(1, {"own": PerRank(dist.get_rank())})
    assert manager.steps() == [1]


@pytest.mark.parametrize("existing", [False, True])
def test_ranks_that_save_different_things_are_told(tmp_path: Path, existing: bool) -> None:
    on_ranks(2)(save_different_things)(tmp_path=tmp_path, existing=existing)


def save_different_things(tmp_path: Path, existing: bool) -> None:
    manager = CheckpointManager(tmp_path)
    other = dist.get_rank() == 1
    if existing:
        manager.save(1, {"a": 1})
    tensor = torch.zeros(3 if other else 2)
    calls: list[tuple[int, dict[str, Any], str]] = [
        (2 if other else 1, {"a": 1}, "rank 1 saves step 2, rank 0 step 1"),
        (1, {"a": 1, "b": 2} if other else {"a": 1}, r"rank 1 and rank 0 save different items \(b\)"),
        (1, {"a": PerRank(1) if other else 1}, r"different items \(a\). .* in `PerRank` on all of them or on none"),
        (1, {"a": 1, "../b": 2} if other else {"a": 1}, r"because of rank 1 .* cannot be named '../b'"),
        (1, {"a": {"w": tensor}}, r"rank 1 and rank 0 save different tensors \(a.w\)\. Save equal ones"),
        (1, {"a": {"w": tensor.int() if other else tensor[:2]}}, r"different tensors \(a.w\)"),
        (-1, {"a": 1}, r"^step -1 was not saved: a step is a whole number from 0 on, not -1"),
    ]
    for step, state, message in calls:
        with pytest.raises(CheckpointError, match=message) as raised:
            manager.save(step, state)
        assert raised.value.on_every_rank
        rankwise.barrier()
        assert manager.steps() == ([1] if existing else [])
        assert leftovers(tmp_path) == []
        rankwise.barrier()
    manager.save(3, {"b": 1, "a": 2} if other else {"a": 2, "b": 1})  # the order is no difference
    assert manager.latest() == 3


@on_ranks(2)
def test_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    folder.VISIBLE_SECONDS = 0.1
    manager = CheckpointManager(tmp_path)
    manager.acquire()
    exists = Path.exists

    def see(path: Path) -> bool:
        return exists(path) and (dist.get_rank() == 0 or ".staging" not in str(path))

    with mock.patch.object(Path, "exists", see):  # noqa: SIM117
        with pytest.raises(CheckpointError, match=r"because of rank 1 .*not seen here after 0\.1 s.* all hosts share"):
            manager.save(1, {"a": 1})
    assert (manager.steps(), leftovers(tmp_path)) == ([], [])


def die_while_writing(folder: Path) -> None:
    write = saving.write_shard

    def die(*arguments: Any) -> Any:
        if dist.get_rank() == 1 and (folder / "step-00000001").exists():
            (folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)

    saving.write_shard = die
    with rankwise.init(timeout_seconds=50):
        manager = CheckpointManager(folder)
        own = PerRank(torch.full((5,), float(dist.get_rank())))
        manager.save(1, {"own": own})
        try:
            manager.save(2, {"own": own})
        except RankFailedError as error:
            failure = error.failures[0]
            assert (failure.rank, failure.is_loss) == (1, True)
            (folder / f"heard-{dist.get_rank()}").write_text(str(time.time()))
            os._exit(0)


def test_rank_killed_while_it_writes_is_named_to_the_others_within_seconds_and_what_was_there_loads(
    tmp_path: Path,
) -> None:
    with RankProcesses(die_while_writing, 3, kwargs={"folder": tmp_path}) as ranks:
        assert ranks.join(50) == {1: "killed by SIGKILL"}, ranks.output()
    for rank in (0, 2):
        seconds = float((tmp_path / f"heard-{rank}").read_text()) - float((tmp_path / "killed").read_text())
        assert seconds < 15
    manager = CheckpointManager(tmp_path)
    assert manager.steps() == [1]
    assert manager.read("own", rank=1).tolist() == [1.0] * 5
    # What the killed save left goes with the next, and the lease of the dead job is taken at once.
    manager.save(3, {"a": 1})
    manager.close()
    assert (manager.steps(), leftovers(tmp_path)) == ([1, 3], ["heard-0", "heard-2", "killed"])


def test_saving_a_whole_step_again_changes_nothing_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"value": "first"})
    before = (manager.path(1) / "manifest.json").stat()
    manager.save(1, {"value": "second"})
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"{manager.path(1)} is there and whole, so step 1 was not saved again"
    ]
    assert manager.read("value") == "first"
    assert (manager.path(1) / "manifest.json").stat() == before


@pytest.mark.parametrize("damage", ["manifest.json", "values.json", "all"])
def test_broken_step_is_moved_aside_and_saved_anew(tmp_path: Path, damage: str) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"value": "first"})
    for path in manager.path(1).iterdir():
        if damage in (path.name, "all"):
            path.unlink()
    manager.save(1, {"value": "second"})
    assert manager.read("value") == "second"
    assert len(list(tmp_path.glob(".broken-step-00000001-*"))) == 1


def save_as_a_job(directory: Path, step: int, value: str, loaded: int | None = None) -> None:
    with CheckpointManager(directory) as manager:
        if loaded is not None:
            manager.load({"value": ""}, loaded)
        manager.save(step, {"value": value})


def test_job_that_went_on_from_an_older_step_moves_newer_ones_of_the_last_job_aside(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_as_a_job(tmp_path, step, "old")
    save_as_a_job(tmp_path, 30, "again", loaded=30)  # nothing new: it would be the same
    assert CheckpointManager(tmp_path).read("value") == "old"
    save_as_a_job(tmp_path, 30, "new", loaded=10)
    manager = CheckpointManager(tmp_path)
    assert manager.read("value") == "new"
    (aside,) = tmp_path.glob(".stale-step-00000030-*")
    folder.verify(aside)
    save_as_a_job(tmp_path, 20, "newer", loaded=10)
    assert (manager.steps(), manager.read("value")) == ([10, 30, 20], "newer")


def kept(manager: CheckpointManager, steps: range) -> Iterator[list[int]]:
    for step in steps:
        manager.save(step, {"a": step})
        yield manager.steps()


def test_newest_steps_and_multiples_are_kept(tmp_path: Path) -> None:
    found = list(kept(CheckpointManager(tmp_path, keep_last=2, keep_every=30), range(10, 80, 10)))
    assert found[-1] == [30, 60, 70]
    assert found[:3] == [[10], [10, 20], [20, 30]]
    assert leftovers(tmp_path) == []


def test_nothing_is_deleted_before_its_successor_is_durable(tmp_path: Path) -> None:
    events: list[str] = []
    commit, remove = folder.commit, folder.remove_steps

    def record_commit(*arguments: Any) -> Path:
        path = commit(*arguments)
        folder.verify(path)
        events.append(f"commit {read_manifest(path).step}")
        return path

    def record_remove(directory: Path, steps: list[int]) -> None:
        events.append(f"remove {steps}")
        remove(directory, steps)

    manager = CheckpointManager(tmp_path, keep_last=1)
    with mock.patch.multiple(folder, commit=record_commit, remove_steps=record_remove):
        manager.save(1, {"a": 1})
        manager.save(2, {"a": 2})
        with mock.patch.object(saving, "write_shard", side_effect=NO_SPACE), pytest.raises(CheckpointError):
            manager.save(3, {"a": 3})
    assert events == ["commit 1", "remove []", "commit 2", "remove [1]"]
    assert manager.steps() == [2]


@pytest.mark.parametrize("damage", ["manifest.json", "__0_0.distcp", ".metadata"])
def test_damaged_and_unfinished_steps_do_not_count_as_kept_and_are_not_deleted(tmp_path: Path, damage: str) -> None:
    manager = CheckpointManager(tmp_path, keep_last=2)
    for step in (1, 2):
        manager.save(step, {"a": torch.ones(9)})
    path = manager.path(2) / damage
    path.write_bytes(path.read_bytes()[:-2])
    (tmp_path / "step-00000009").mkdir()
    manager.save(3, {"a": torch.ones(9)})
    assert manager.steps() == [1, 2, 3]
    manager.save(4, {"a": torch.ones(9)})
    assert manager.steps() == [2, 3, 4]
    with pytest.raises(CheckpointCorruptError):
        manager.verify(2)


def test_older_step_that_cannot_be_removed_is_no_failure_of_the_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = CheckpointManager(tmp_path, keep_last=1)
    manager.save(1, {"a": 1})
    with mock.patch.object(folder, "remove_steps", side_effect=PermissionError(errno.EACCES, "Permission denied")):
        manager.save(2, {"a": 2})
    assert "step 2 is saved, but older ones could not be removed: [Errno 13] Permission denied" in caplog.messages
    assert manager.steps() == [1, 2]


def test_step_that_a_shard_is_missing_of_is_not_saved(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    with (
        mock.patch.object(saving, "plan_pieces", return_value=[]),
        pytest.raises(CheckpointError, match=r"the ranks hold 0 of the 9 values of the tensor 'a' together"),
    ):
        manager.save(1, {"a": torch.ones(9)})
    assert (manager.steps(), leftovers(tmp_path)) == ([], [])
