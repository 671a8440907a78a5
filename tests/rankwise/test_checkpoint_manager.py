"""A training state is saved and loaded through one object, whole or not at all."""

import dataclasses
import errno
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
from rankwise.checkpoint import folder
from rankwise.checkpoint import manager as manager_module
from rankwise.checkpoint.holder import encode, lease_name
from rankwise.checkpoint.lease import read_holder
from rankwise.checkpoint.local import LocalFolder
from rankwise.checkpoint.manifest import Manifest, read_manifest
from rankwise.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointLeaseError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
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
    assert manager.read("step") == 3
    assert manager.read("ema", 3)["0.weight"].tolist() == state["ema"]["0.weight"].tolist()
    assert set(manager.read("rng", rank=0)) == {"python", "numpy", "torch", "accelerator"}
    with pytest.raises(CheckpointNotFoundError, match=r"no item 'vae'. It holds net, optimizers, ema, step; for each"):
        manager.read("vae")
    with pytest.raises(CheckpointNotFoundError, match="no item 'rng' of rank 1"):
        manager.read("rng", rank=1)
    with pytest.raises(CheckpointNotFoundError, match="no item 'rng'"):
        manager.read("rng")
    (manager.path(3) / "rank-00000.json").write_bytes(b"broken")
    assert manager.read("step") == 3
    with pytest.raises(CheckpointCorruptError, match=r"rank-00000.json is damaged"):
        manager.read("rng", rank=0)


def test_missing_steps_are_named_with_those_that_exist(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint in"):
        manager.read("net")
    manager.save(10, {"step": 10})
    with pytest.raises(CheckpointNotFoundError, match=r"there is no step 7 in .* There is: 10"):
        manager.load({"step": 0}, 7)


def test_states_in_lists_come_back(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    nets = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)]
    manager.save(1, {"nets": nets, "moments": PerRank((torch.ones(2), [torch.ones(3)]))})
    fresh = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)]
    first, second = torch.zeros(2), torch.zeros(3)
    assert manager.load({"nets": fresh, "moments": PerRank((first, [second]))}) == 1
    assert [net.weight.tolist() for net in fresh] == [net.weight.tolist() for net in nets]
    assert (first.tolist(), second.tolist()) == ([1.0] * 2, [1.0] * 3)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_last": 0}, "keep_last is a whole number from 1 on, not 0"),
        ({"keep_every": 1.5}, r"keep_every is a whole number from 1 on, not 1\.5"),
        ({"max_pending": True}, "max_pending is a whole number from 1 on, not True"),
        ({"on_failure": "ignore"}, "on_failure is 'raise' or 'warn', not 'ignore'"),
        ({"lease_timeout_seconds": 1}, "lease_timeout_seconds is 10 or more, not 1"),
        ({"lease_timeout_seconds": float("nan")}, "lease_timeout_seconds is 10 or more, not nan"),
        ({"config": {"a": {1}}}, "config is not JSON: .*set"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CheckpointManager(tmp_path, **arguments)


def test_directory_stays_the_same_when_the_program_changes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with CheckpointManager("checkpoints") as manager:
        manager.save(1, {"a": 1})
        monkeypatch.chdir(tmp_path / "elsewhere")
        manager.save(2, {"a": 2})
    assert CheckpointManager(tmp_path / "checkpoints").steps() == [1, 2]


def damage(manager: CheckpointManager, step: int) -> None:
    path = manager.path(step) / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_latest_passes_over_damaged_steps_and_says_so_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager, tensor = CheckpointManager(tmp_path), torch.zeros(50)
    for step in (1, 2, 3):
        manager.save(step, {"w": torch.full((50,), float(step))})
    damage(manager, 3)
    (manager.path(2) / "manifest.json").write_text("{")
    caplog.clear()
    assert manager.load({"w": tensor}) == 1
    assert tensor.tolist() == [1.0] * 50
    told = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert [message.partition(" is ")[0].partition(" cannot ")[0] for message in told] == [
        f"step 3 was not loaded: {manager.path(3)}/__0_0.distcp",
        f"step 2 was not loaded: {manager.path(2)}/manifest.json",
    ]
    assert all("Going on to an older step: what came after it is lost." in message for message in told)
    assert (manager.latest(), manager.latest(verified=True)) == (3, 1)


def test_step_that_has_lost_its_manifest_is_named_and_never_taken_for_no_step_at_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager, tensor = CheckpointManager(tmp_path), torch.zeros(3)
    for step in (1, 2):
        manager.save(step, {"w": torch.full((3,), float(step))})
    (manager.path(2) / "manifest.json").unlink()
    caplog.clear()
    assert manager.load({"w": tensor}) == 1
    (told,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert f"{manager.path(2)}/manifest.json is missing" in told
    for load in (lambda: manager.load({"w": tensor}, 2), lambda: manager.verify(2), lambda: manager.read("w", 2)):
        with pytest.raises(CheckpointCorruptError, match=r"step-00000002/manifest\.json is missing"):
            load()
    (manager.path(1) / "manifest.json").unlink()
    with pytest.raises(CheckpointCorruptError, match="is missing"):
        manager.load({"w": tensor})
    manager.save(2, {"w": torch.full((3,), 5.0)})
    assert manager.load({"w": tensor}) == 2
    assert tensor.tolist() == [5.0] * 3


def test_damaged_step_that_was_asked_for_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    manager, tensor = CheckpointManager(tmp_path), torch.zeros(50)
    for step in (1, 2):
        manager.save(step, {"w": torch.ones(50)})
        damage(manager, step)
    for step in (2, 1, "latest"):
        with pytest.raises(CheckpointCorruptError, match=r"__0_0.distcp is damaged"):
            manager.load({"w": tensor}, step)  # type: ignore[arg-type]
        with pytest.raises(CheckpointCorruptError, match=r"__0_0.distcp is damaged"):
            manager.verify(step)  # type: ignore[arg-type]
    with pytest.raises(CheckpointCorruptError):
        manager.latest(verified=True)
    assert tensor.tolist() == [0.0] * 50


@on_ranks(2)
def test_ranks_pass_over_a_damaged_step_together(tmp_path: Path) -> None:
    manager, own = CheckpointManager(tmp_path), torch.tensor([0])
    for step in (1, 2):
        manager.save(step, {"own": PerRank(torch.tensor([step]))})
    if dist.get_rank() == 0:
        damage(manager, 2)
    rankwise.barrier()
    assert manager.load({"own": PerRank(own)}) == 1
    assert own.item() == 1


def test_step_of_another_config_is_loaded_and_told(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, config={"lr": 0.1, "layers": [1, 2]}) as manager:
        manager.save(1, {"a": 1})
    for config, is_told in (
        ({"layers": [1, 2], "lr": 0.1}, False),  # the order is no difference
        ({"lr": 0.2, "layers": [1, 2]}, True),
        (None, False),
    ):
        with mock.patch.object(manager_module._logger, "info") as told:
            assert CheckpointManager(tmp_path, config=config).load({"a": 0}) == 1
        said = [call.args[0] % call.args[1:] for call in told.call_args_list]
        assert (f"{manager.path(1)} was saved with another config" in said) == is_told


def test_manager_that_was_closed_begins_anew_under_the_next_epoch(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (5, 3):
        manager.save(step, {"a": step})
        manager.close()
        manager.close()
    assert [read_manifest(manager.path(step)).epoch for step in (5, 3)] == [1, 2]
    assert manager.steps() == [5, 3]
    assert manager.read("a") == 3


def test_two_managers_of_one_job_share_the_lease_until_the_last_is_closed(tmp_path: Path) -> None:
    one, two = CheckpointManager(tmp_path), CheckpointManager(tmp_path / "." / "x" / "..")
    one.save(1, {"a": 1})
    (tmp_path / "x").mkdir()
    two.save(2, {"a": 2})
    one.close()
    two.save(3, {"a": 3})
    two.close()
    assert [read_manifest(one.path(step)).epoch for step in one.steps()] == [1, 1, 1]
    holder = read_holder(tmp_path)
    assert holder is not None
    assert holder.released


def try_to_save(directory: Path, refused: bool) -> None:
    manager = CheckpointManager(directory)
    assert manager.load({"a": 0}) is not None  # reading needs no lease
    if not refused:
        manager.save(15, {"a": 15})
        manager.close()
        return
    with pytest.raises(CheckpointLeaseError, match=r"is written by another job: ") as raised:
        manager.save(15, {"a": 15})
    assert raised.value.on_every_rank
    with pytest.raises(CheckpointLeaseError):
        manager.acquire()


def test_second_job_is_refused_while_the_first_writes_and_its_steps_are_newer_afterwards(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(10, {"a": 10})
    manager.save(20, {"a": 20})
    on_ranks(2)(try_to_save)(directory=tmp_path, refused=True)
    assert manager.steps() == [10, 20]
    manager.close()
    on_ranks(2)(try_to_save)(directory=tmp_path, refused=False)
    assert manager.steps() == [10, 20, 15]
    assert manager.read("a") == 15


def take_over(directory: Path) -> None:
    """Leave the lease of another job, as one of another host does that thinks this one dead."""
    current = read_holder(directory)
    assert current is not None
    other = dataclasses.replace(current, epoch=current.epoch + 1, nonce="of another job", host="other-host", pid=1)
    (directory / lease_name(other.epoch)).write_bytes(encode(other, 0))


def test_job_that_has_lost_its_lease_commits_nothing_and_replaces_nothing(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(10, {"a": "mine"})
    commit = folder.commit

    def commit_late(staging: Path, manifest: Manifest, check_lease: Callable[[], None]) -> Path:
        """Meanwhile another job has taken over, and saved the same step."""
        take_over(tmp_path)
        other = folder.make_staging(tmp_path / "of-the-other", 20)
        commit(other, dataclasses.replace(manifest, files={}, epoch=2), lambda: None).rename(manager.path(20))
        return commit(staging, manifest, check_lease)

    with (
        mock.patch.object(folder, "commit", commit_late),
        pytest.raises(CheckpointLeaseError, match=r"step 20 was not saved: The lease .* was lost to .*other-host"),
    ):
        manager.save(20, {"a": "stale"})
    assert read_manifest(manager.path(20)).epoch == 2
    with pytest.raises(CheckpointLeaseError, match="was lost to"):
        manager.save(30, {"a": "stale"})
    assert manager.steps() == [10, 20]
    assert not list(tmp_path.glob(".staging-*"))
    manager.close()


@on_ranks(2)
def test_lost_lease_is_told_to_all_ranks_and_ends_removals_too(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last=1)
    manager.save(1, {"a": 1})
    if dist.get_rank() == 0:
        take_over(tmp_path)
    rankwise.barrier()
    with pytest.raises(CheckpointLeaseError, match="was lost to") as raised:
        manager.save(2, {"a": 2})
    assert raised.value.on_every_rank
    assert manager.steps() == [1]


def test_load_from_a_directory_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    refuse = mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
    with mock.patch.object(folder, "find_steps", refuse), pytest.raises(CheckpointError) as raised:
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
            folder.verify(manager.path(step))
        newest = committed[-1]
        assert manager.read("net")["weight"].unique().tolist() == [newest]
        for rank in range(2):
            own = manager.read("own", rank=rank)
            assert (own["step"], own["weight"].unique().tolist()) == (newest, [newest + rank])
    assert len(list(tmp_path.glob(".staging-*"))) <= 1


def test_folder_that_cannot_be_read_is_told_in_our_words(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"w": torch.ones(3)})
    refuse = mock.Mock(side_effect=OSError(errno.EIO, "Input/output error", str(tmp_path)))
    told = rf"{tmp_path} cannot be read, because the disk refused: .*Input/output error"
    with mock.patch.object(LocalFolder, "find", refuse):
        for ask in (manager.steps, manager.latest, lambda: manager.read("w"), lambda: manager.verify(1)):
            with pytest.raises(CheckpointError, match=told):
                ask()
    assert manager.read("w").tolist() == [1.0, 1.0, 1.0]
    manager.close()
