"""A save in the background disturbs nothing and nobody, fails loudly, and is waited for."""

import contextlib
import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, load

import rankwise
from rankwise import CheckpointManager, PerRank
from rankwise.checkpoint import manager as manager_module
from rankwise.checkpoint import saving
from rankwise.errors import CheckpointError, RankFailedError
from rankwise.testing import on_ranks

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@contextlib.contextmanager
def held_disk() -> Iterator[threading.Event]:
    """Whoever writes a shard waits until the event is set, as it is at the end."""
    write, go = saving.write_shard, threading.Event()

    def wait_and_write(*arguments: Any) -> Any:
        assert go.wait(50)
        return write(*arguments)

    with mock.patch.object(saving, "write_shard", wait_and_write):
        try:
            yield go
        finally:
            go.set()


def test_what_is_saved_is_what_the_state_was_at_the_call(tmp_path: Path) -> None:
    net, numbers = torch.nn.Linear(200, 200), torch.arange(5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    history, moments = [1, 2], [torch.ones(3), [torch.ones(2)]]
    state = {"net": net, "g": optimizer, "own": PerRank({"numbers": numbers}), "history": history, "moments": moments}
    weight = net.weight.detach().clone()
    manager = CheckpointManager(tmp_path, async_save=True)
    with held_disk():
        manager.save(1, state)
        with torch.no_grad():
            net.weight.zero_()
        optimizer.param_groups[0]["lr"] = 0.0
        numbers.zero_()
        history.append(3)
        moments[0].zero_()
        moments[1].append(torch.zeros(1))
        assert manager.steps() == []
    manager.close()
    assert torch.equal(manager.read("net")["weight"], weight)
    assert manager.read("g")["param_groups"][0]["lr"] == 0.5
    assert manager.read("own", rank=0)["numbers"].tolist() == [0, 1, 2, 3, 4]
    assert manager.read("history") == [1, 2]
    assert [str(each) for each in manager.read("moments")] == [str(torch.ones(3)), str([torch.ones(2)])]
    plain: dict[str, Any] = {"history": [], "g": {"param_groups": [{"lr": 0.0}]}}
    with pytest.warns(UserWarning, match=r"torch.distributed is disabled"):
        load(plain, storage_reader=FileSystemReader(str(manager.path(1))))
    assert plain == {"history": [1, 2], "g": {"param_groups": [{"lr": 0.5}]}}


@pytest.mark.parametrize("max_pending", [1, 2])
def test_there_are_never_more_copies_than_configured_however_slow_the_disk(tmp_path: Path, max_pending: int) -> None:
    arenas: list[Any] = []
    arena_class = manager_module.Arena

    def make_arena() -> Any:
        arenas.append(arena_class())
        return arenas[-1]

    manager = CheckpointManager(tmp_path, async_save=True, max_pending=max_pending)
    with mock.patch.object(manager_module, "Arena", make_arena), held_disk() as go:
        for step in range(max_pending):
            manager.save(step, {"w": torch.full((1000,), float(step))})
        last = threading.Thread(target=manager.save, args=(max_pending, {"w": torch.full((1000,), -1.0)}))
        last.start()
        last.join(0.3)
        assert last.is_alive()  # it waits for the disk, and has made no copy yet
        assert len(arenas) == max_pending
        go.set()
        last.join(50)
        manager.wait()
    assert len(arenas) == max_pending
    assert manager.steps() == list(range(max_pending + 1))
    assert [manager.read("w", step)[0].item() for step in manager.steps()] == [*range(max_pending), -1.0]
    manager.close()


@pytest.mark.parametrize("call", ["save", "wait", "close"])
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_error_in_the_background_is_raised_at_the_next_call_on_every_rank(
    tmp_path: Path, call: str, failing_rank: int
) -> None:
    on_ranks(2)(fail_in_the_background)(tmp_path=tmp_path, call=call, failing_rank=failing_rank)


def fail_in_the_background(tmp_path: Path, call: str, failing_rank: int) -> None:
    manager, state = CheckpointManager(tmp_path, async_save=True), {"own": PerRank(torch.ones(2))}
    broken = mock.Mock(side_effect=NO_SPACE) if dist.get_rank() == failing_rank else saving.write_shard
    with mock.patch.object(saving, "write_shard", broken):
        manager.save(1, state)
        match = rf"step 1 was not saved, because of rank {failing_rank} .*No space left on device"
        with pytest.raises(CheckpointError, match=match) as raised:
            manager.save(2, state) if call == "save" else getattr(manager, call)()
    assert raised.value.on_every_rank
    manager.wait()  # told once
    manager.save(3, state)
    manager.close()
    assert manager.steps() == [3]


@on_ranks(2)
def test_training_goes_on_after_a_failure_where_a_warning_is_enough(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, async_save=True, on_failure="warn")
    state = {"own": PerRank(torch.ones(2))}
    broken = mock.Mock(side_effect=NO_SPACE) if dist.get_rank() == 1 else saving.write_shard
    with mock.patch.object(manager_module._logger, "error") as told:
        with mock.patch.object(saving, "write_shard", broken):
            manager.save(1, state)
            manager.wait()
        manager.save(2, state)
        manager.close()
    ((template, error), options) = told.call_args
    assert template == "%s Training goes on."
    assert "because of rank 1" in str(error)
    assert options == {"ranks": "main"}
    assert manager.steps() == [2]


@on_ranks(3)
def test_collectives_of_training_in_any_order_do_not_mix_with_those_of_saves(tmp_path: Path) -> None:
    rank = dist.get_rank()
    manager = CheckpointManager(tmp_path, async_save=True, max_pending=2)
    pause = random.Random(rank)
    write = saving.write_shard

    def write_later(*arguments: Any) -> Any:
        time.sleep(pause.uniform(0.0, 0.05))
        return write(*arguments)

    with mock.patch.object(saving, "write_shard", write_later):
        for step in range(8):
            manager.save(step, {"w": torch.full((30_000,), float(step)), "own": PerRank(torch.tensor(rank + step))})
            for number in range(6):
                time.sleep(pause.uniform(0.0, 0.004))
                total = torch.tensor([float(rank + number)])
                dist.all_reduce(total)
                assert total.item() == 3 + 3 * number
                assert rankwise.gather_objects(rank) == [0, 1, 2]
                assert rankwise.agree(rank == number) == (number < 3)
        manager.close()
    assert manager.steps() == list(range(8))
    for step in range(8):
        assert manager.read("w", step).eq(step).all()
        assert manager.read("own", step, rank=rank).item() == rank + step


@on_ranks(2)
def test_two_managers_of_one_directory_do_not_disturb_each_other(tmp_path: Path) -> None:
    slow, quick = CheckpointManager(tmp_path, async_save=True), CheckpointManager(tmp_path)
    for manager in (slow, quick):
        manager.acquire()
    with held_disk():
        slow.save(1, {"w": torch.ones(3)})
        while not list(tmp_path.glob(".staging-*")):
            time.sleep(0.01)
        rankwise.barrier()
        saver = quick._saver
        assert saver is not None
        staging = saver._assembly.on_main("test", lambda: saver._begin(saving.Snapshot(2)))[0]
        assert staging is not None
        assert len(list(tmp_path.glob(".staging-*"))) == 2
        rankwise.barrier()
    slow.close()
    quick.save(2, {"w": torch.ones(3)})
    quick.close()
    assert slow.steps() == [1, 2]


def save_and_forget(directory: Path) -> weakref.ref[CheckpointManager]:
    manager = CheckpointManager(directory, async_save=True)
    manager.save(1, {"w": torch.ones(3)})
    return weakref.ref(manager)


def test_clean_end_of_a_session_waits_for_the_last_save_of_a_manager_that_nobody_holds(tmp_path: Path) -> None:
    with held_disk() as go, rankwise.init(device_type="cpu"):
        dropped = save_and_forget(tmp_path)
        gc.collect()
        threading.Timer(0.2, go.set).start()
    assert CheckpointManager(tmp_path).steps() == [1]
    with CheckpointManager(tmp_path) as other:
        other.save(2, {"w": 1})  # the lease was given back
    gc.collect()
    assert dropped() is None


@pytest.mark.parametrize("code", [0, None])
def test_program_that_ends_itself_without_an_error_waits_for_the_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    monkeypatch.setattr(manager_module, "FAILED_END_SECONDS", 0.0)
    with held_disk() as go:
        with pytest.raises(SystemExit), rankwise.init(device_type="cpu"):  # noqa: PT012
            save_and_forget(tmp_path / "session")
            threading.Timer(0.2, go.set).start()
            sys.exit(code)
        go.clear()
        with pytest.raises(SystemExit), CheckpointManager(tmp_path / "with", async_save=True) as manager:  # noqa: PT012
            manager.save(1, {"w": torch.ones(3)})
            threading.Timer(0.2, go.set).start()
            sys.exit(code)
    assert CheckpointManager(tmp_path / "session").steps() == [1]
    assert CheckpointManager(tmp_path / "with").steps() == [1]


def test_save_whose_wait_was_interrupted_is_not_lost(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, async_save=True)
    with held_disk() as go:
        manager.save(1, {"w": torch.ones(3)})
        interrupted = mock.patch.object(manager_module, "wait_with_others", side_effect=KeyboardInterrupt)
        with interrupted, pytest.raises(KeyboardInterrupt):
            manager.wait()
        threading.Timer(0.2, go.set).start()
        manager.close()
    assert manager.steps() == [1]


def test_save_without_a_copy_that_was_interrupted_commits_nothing_that_has_changed_since(tmp_path: Path) -> None:
    manager, tensor = CheckpointManager(tmp_path), torch.ones(3)
    with held_disk() as go:
        interrupted = mock.patch.object(manager_module, "wait_with_others", side_effect=KeyboardInterrupt)
        with interrupted, pytest.raises(KeyboardInterrupt):
            manager.save(1, {"w": tensor})
        tensor.zero_()
        go.set()
        with pytest.raises(CheckpointError, match=r"step 1 was not saved: .*interrupted"):
            manager.wait()
    assert manager.steps() == []
    manager.save(1, {"w": tensor})
    manager.close()
    assert manager.read("w").tolist() == [0.0] * 3


def test_failure_of_one_save_does_not_lose_the_one_behind_it(tmp_path: Path) -> None:
    write, saves = saving.write_shard, iter([NO_SPACE, None])

    def write_or_fail(*arguments: Any) -> Any:
        time.sleep(0.2)
        if error := next(saves):
            raise error
        return write(*arguments)

    with (  # noqa: PT012
        mock.patch.object(saving, "write_shard", write_or_fail),
        pytest.raises(CheckpointError, match="step 1 was"),
        rankwise.init(device_type="cpu"),
    ):
        manager = CheckpointManager(tmp_path, async_save=True, max_pending=2)
        manager.save(1, {"w": torch.ones(3)})
        manager.save(2, {"w": torch.ones(3)})
    assert CheckpointManager(tmp_path).steps() == [2]


def test_save_that_ends_just_when_the_wait_for_it_does_is_no_failure(tmp_path: Path) -> None:
    class Late(Future[None]):
        """Done right after a wait for it was given up."""

        def result(self, timeout: float | None = None) -> None:
            try:
                return super().result(timeout)
            except TimeoutError:
                self.set_result(None)
                raise

    late = Late()
    threading.Timer(0.5, lambda: late.done() or late.set_result(None)).start()
    manager_module.wait_with_others(late)


@on_ranks(2)
def test_load_waits_for_the_save_that_is_under_way(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, async_save=True) as manager, held_disk() as go:
        go.set()
        manager.save(1, {"step": torch.ones(2)})
        manager.wait()
        go.clear()
        manager.save(2, {"step": torch.ones(2) * 2})
        threading.Timer(0.3, go.set).start()
        tensor = torch.zeros(2)
        assert manager.load({"step": tensor}) == 2
        assert tensor.tolist() == [2.0, 2.0]


@on_ranks(2)
def test_managers_that_end_with_an_error_leave_no_threads_and_no_descriptors(tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # a new one: it keeps the frames that it went through

    def end_with_error(step: int) -> tuple[int, int]:
        with pytest.raises(ValueError, match="of training"), CheckpointManager(tmp_path, async_save=True) as manager:  # noqa: PT012
            manager.save(step, {"w": torch.ones(3)})
            raise ValueError("of training")
        with mock.patch.object(saving, "write_shard", refuse):
            other = CheckpointManager(tmp_path, async_save=True)
            other.save(step + 100, {"w": torch.ones(3)})
            with pytest.raises(CheckpointError, match="No space"):
                other.close()
        rankwise.barrier()
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    counts = [end_with_error(step) for step in range(6)]
    assert max(threads for threads, _ in counts[1:]) <= counts[0][0] + 2, counts
    assert max(descriptors for _, descriptors in counts[1:]) <= counts[0][1] + 3, counts


def test_fork_that_ends_leaves_the_saves_of_its_parent_alone(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, async_save=True)
    with held_disk() as go:
        manager.save(1, {"w": torch.ones(3)})
        if (child := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                manager._end(failed=False)
                os._exit(0)
            os._exit(1)
        deadline = time.monotonic() + 30
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.05)
        if not ended[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended == (child, 0)
        go.set()
        manager.close()
    assert manager.steps() == [1]


def test_error_of_the_last_save_is_that_of_the_session(tmp_path: Path) -> None:
    broken = mock.Mock(side_effect=NO_SPACE)
    with (
        mock.patch.object(saving, "write_shard", broken),
        pytest.raises(CheckpointError, match=r"step 1 was not saved: OSError: .*No space"),
        rankwise.init(device_type="cpu"),
    ):
        save_and_forget(tmp_path)


def test_failing_end_waits_briefly_and_what_comes_later_is_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager_module, "FAILED_END_SECONDS", 0.2)
    with held_disk() as go:
        begin = time.monotonic()
        with pytest.raises(ValueError, match="of training"), rankwise.init(device_type="cpu"):  # noqa: PT012
            manager = CheckpointManager(tmp_path, async_save=True)
            manager.save(1, {"w": torch.ones(3)})
            worker = manager._worker
            assert worker is not None
            raise ValueError("of training")
        assert time.monotonic() - begin < 10
        go.set()
        worker._thread.join(50)
    # The lease is given back: another job may write there now.
    assert manager.steps() == []


def test_failing_end_waits_for_a_save_that_is_nearly_done(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, async_save=True)
    with held_disk() as go, pytest.raises(ValueError, match="of training"), manager:  # noqa: PT012
        manager.save(1, {"w": torch.ones(3)})
        threading.Timer(0.2, go.set).start()
        raise ValueError("of training")
    assert manager.steps() == [1]


@on_ranks(2)
def test_rank_that_fails_in_training_while_a_save_runs_is_the_cause_that_all_hear(tmp_path: Path) -> None:
    manager_module.FAILED_END_SECONDS = 0.5
    rank = dist.get_rank()
    expected, match = (ValueError, "of training") if rank == 1 else (RankFailedError, "rank 1 .* failed first: ValueE")
    with held_disk(), pytest.raises(expected, match=match), rankwise.init():  # noqa: PT012
        manager = CheckpointManager(tmp_path, async_save=True)
        manager.save(1, {"own": PerRank(torch.ones(2))})
        if rank == 1:
            raise ValueError("of training")
        manager.wait()


PROGRAM = """
import os, sys, time
import torch
from rankwise import CheckpointManager
from rankwise.checkpoint import manager as manager_module, saving

write = saving.write_shard
def write_slowly(*arguments):
    time.sleep(0.5 if kind == "clean" else 90)
    return write(*arguments)
saving.write_shard = write_slowly
manager_module.FAILED_END_SECONDS = 0.2

def train():
    manager = CheckpointManager(os.path.join(sys.argv[1], kind), async_save=True)
    manager.save(1, {"w": torch.ones(3)})

kind = "clean"
child = os.fork()  # one import of torch for both
if child:
    print("clean:", os.waitpid(child, 0)[1], flush=True)
    kind = "failed"
train()
if kind == "failed":
    raise ValueError("of training")
"""


def test_end_of_a_program_without_session_waits_for_the_last_save_unless_it_fails(tmp_path: Path) -> None:
    begin = time.monotonic()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert (done.stdout, done.returncode) == ("clean: 0\n", 1), done.stderr
    assert "ValueError: of training" in done.stderr
    assert time.monotonic() - begin < 85
    assert CheckpointManager(tmp_path / "clean").steps() == [1]
    assert CheckpointManager(tmp_path / "failed").steps() == []


@on_ranks(2)
def test_going_back_within_a_job_saves_newer_steps_anew(tmp_path: Path) -> None:
    with rankwise.CheckpointManager(tmp_path) as manager:
        for step in (10, 20, 30):
            manager.save(step, {"value": f"first {step}"})
        assert manager.load({"value": ""}, 10) == 10
        manager.save(20, {"value": "second 20"})
        rankwise.barrier()
        assert (manager.latest(), manager.read("value")) == (20, "second 20")
    assert len(list(tmp_path.glob(".stale-step-00000020-*"))) == 1
