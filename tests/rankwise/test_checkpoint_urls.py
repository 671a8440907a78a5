"""A manager of a URL does what one of a directory does: on one rank and two, killed, cut off, and with damage."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import rankwise
from rankwise import CheckpointManager, PerRank
from rankwise.checkpoint import objects
from rankwise.checkpoint.objects import Objects
from rankwise.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointLeaseError,
    CheckpointNotFoundError,
    RankFailedError,
)
from rankwise.testing import RankProcesses, run_on_ranks


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/run"
    if request.param == "file":
        return f"file://{tmp_path}/run"
    return f"{request.getfixturevalue('bucket')}/run"


def state(value: float) -> dict[str, Any]:
    return {"weight": torch.full((300,), value), "numbers": {"step": value}, "own": PerRank({"rank": torch.ones(2)})}


def test_manager_of_a_url_does_what_one_of_a_directory_does(url: str) -> None:
    with CheckpointManager(url, keep_last=2, config={"a": 1}) as manager:
        assert manager.load(state(0.0)) is None
        for step in (1, 2, 3):
            manager.save(step, state(float(step)))
        assert manager.steps() == [2, 3]
        assert manager.latest() == manager.latest(verified=True) == 3
        loaded = state(0.0)
        assert manager.load(loaded) == 3
        assert loaded["weight"].tolist() == [3.0] * 300
        assert manager.load(loaded, step=2) == 2
        assert loaded["weight"].tolist() == [2.0] * 300
        assert manager.read("numbers") == {"step": 3.0}
        assert torch.equal(manager.read("own", rank=0)["rank"], torch.ones(2))
        manager.verify(2)
        with pytest.raises(
            CheckpointNotFoundError, match=f"there is no step 9 in .*{url.partition('://')[2]}. There is: 2, 3"
        ):
            manager.load(loaded, step=9)
    with CheckpointManager(url) as again:
        again.save(4, state(4.0))
        assert again.steps() == [2, 3, 4]


def test_two_ranks_save_and_three_load(bucket: str, tmp_path: Path) -> None:
    run_on_ranks(save_asynchronously, 2, kwargs={"url": f"{bucket}/run", "cache_dir": str(tmp_path)})
    assert not list(tmp_path.rglob("*.distcp"))  # what is behind the URL is not kept here too
    run_on_ranks(load_elsewhere, 3, kwargs={"url": f"{bucket}/run", "cache_dir": str(tmp_path)})


def save_asynchronously(url: str, cache_dir: str) -> None:
    manager = CheckpointManager(url, async_save=True, keep_last=2, cache_dir=cache_dir)
    for step in (1, 2, 3):
        manager.save(step, {"weight": torch.full((300, 300), float(step)), "own": PerRank(dist.get_rank())})
    manager.close()
    assert manager.steps() == [2, 3]


def load_elsewhere(url: str, cache_dir: str) -> None:
    manager = CheckpointManager(url, cache_dir=cache_dir)
    weight = torch.zeros(300, 300)
    own = PerRank(0, redistribute=lambda saved, rank, world_size: sum(saved))
    assert manager.load({"weight": weight, "own": own}) == 3
    assert weight.unique().tolist() == [3.0]
    assert manager.read("own", rank=1) == 1


def test_ranks_that_share_a_cache_fetch_each_file_once(s3: Any, bucket: str, tmp_path: Path) -> None:
    run_on_ranks(save_asynchronously, 2, kwargs={"url": bucket, "cache_dir": str(tmp_path)})
    fetched: list[str] = []

    def note(method: str, path: str, proceed: object) -> None:
        if method == "GET" and "/step-" in path and not path.endswith("/manifest.json"):
            fetched.append(path)

    s3.meddle = note
    run_on_ranks(load_elsewhere, 2, kwargs={"url": bucket, "cache_dir": str(tmp_path)})
    assert len(fetched) == len(set(fetched)) >= 4


@pytest.mark.parametrize(
    ("num_puts", "arrives"),
    [
        *(pytest.param(num_puts, False, marks=pytest.mark.slow) for num_puts in range(1, 8)),
        (4, True),
        (8, False),
        (8, True),
    ],
)
def test_job_that_is_killed_while_it_uploads_leaves_the_last_step_and_the_next_goes_on(
    s3: Any, bucket: str, num_puts: int, arrives: bool, tmp_path: Path
) -> None:
    seen: list[str] = []
    ranks = RankProcesses(save_two_steps, 2, kwargs={"url": bucket})

    def kill(method: str, path: str, proceed: Callable[[], list[bytes]]) -> list[bytes] | int | None:
        if method != "PUT" or "/step-00000002" not in path:
            return None
        seen.append(path)
        if len(seen) < num_puts:
            return None
        for process in ranks.processes:
            os.kill(process.pid or 0, signal.SIGKILL)
        # What is on its way when the sender dies may still arrive.
        return proceed() if arrives else 500

    with ranks:
        s3.meddle = kill
        assert set(ranks.join(60.0)) == {0, 1}
    s3.meddle = None
    # The eighth is the manifest, after two shards, two files of own values, values, tensors and metadata.
    assert seen[-1].endswith("/manifest.json") == (num_puts == 8)
    newest = 2 if num_puts == 8 and arrives else 1
    manager = CheckpointManager(bucket, cache_dir=tmp_path / "cache")
    assert manager.steps()[-1] == newest
    weight = torch.zeros(300, 300)
    assert manager.load({"weight": weight, "own": PerRank(0, redistribute=lambda *_: 0)}) == newest
    assert weight.unique().tolist() == [float(newest)]
    manager.save(3, {"weight": weight, "own": PerRank(0)})  # a dead job of this host is not waited for
    assert manager.latest(verified=True) == 3
    manager.close()


def save_two_steps(url: str) -> None:
    manager = CheckpointManager(url)
    for step in (1, 2):
        manager.save(step, {"weight": torch.full((300, 300), float(step)), "own": PerRank(dist.get_rank())})


def test_store_that_is_away_for_seconds_is_waited_for(s3: Any, bucket: str, tmp_path: Path) -> None:
    with RankProcesses(save_two_steps_at_a_sign, 2, kwargs={"url": bucket, "folder": str(tmp_path)}) as ranks:
        wait_for(tmp_path / "first-0", tmp_path / "first-1")
        s3.stop()
        try:
            (tmp_path / "go").touch()
            time.sleep(2.0)
        finally:
            s3.start()
        assert not ranks.join(60.0), ranks.output()
    assert CheckpointManager(bucket).latest(verified=True) == 2


def test_store_that_is_away_for_good_fails_the_save_on_every_rank(s3: Any, bucket: str, tmp_path: Path) -> None:
    kwargs = {"url": bucket, "folder": str(tmp_path), "give_up_seconds": 0.0}
    with RankProcesses(save_two_steps_at_a_sign, 2, kwargs=kwargs) as ranks:
        wait_for(tmp_path / "first-0", tmp_path / "first-1")
        s3.stop()
        try:
            (tmp_path / "go").touch()
            assert not ranks.join(60.0), ranks.output()
        finally:
            s3.start()
    for rank in (0, 1):
        told = (tmp_path / f"failed-{rank}").read_text()
        assert told.startswith("True step 2 was not saved: cannot list the objects in ")
        assert "EndpointConnectionError" in told
    assert CheckpointManager(bucket).steps() == [1]


def save_two_steps_at_a_sign(url: str, folder: str, give_up_seconds: float = 60.0) -> None:
    objects.GIVE_UP_SECONDS = give_up_seconds
    manager = CheckpointManager(url)
    manager.save(1, state(1.0))
    rank = dist.get_rank()
    Path(folder, f"first-{rank}").touch()
    wait_for(Path(folder, "go"))
    try:
        manager.save(2, state(2.0))
    except CheckpointError as error:
        Path(folder, f"failed-{rank}").write_text(f"{error.on_every_rank} {error}")
        os._exit(0)  # the lease cannot be given back


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60.0
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("failing_rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_store_that_refuses_one_rank_fails_the_save_on_all_and_the_next_works(
    s3: Any, bucket: str, failing_rank: int
) -> None:
    s3.meddle = lambda method, path, proceed: (
        403 if method == "PUT" and "/step-00000002" in path and f"/__{failing_rank}_0" in path else None
    )
    run_on_ranks(fail_to_save, 2, kwargs={"url": bucket, "failing_rank": failing_rank})


def fail_to_save(url: str, failing_rank: int) -> None:
    manager = CheckpointManager(url)
    mine = {"weight": PerRank(torch.ones(300))}
    manager.save(1, mine)
    with pytest.raises(CheckpointError, match=f"step 2 was not saved, because of rank {failing_rank} ") as raised:
        manager.save(2, mine)
    assert "PermissionError" in str(raised.value)
    assert raised.value.on_every_rank
    manager.save(3, mine)
    assert manager.steps() == [1, 3]
    rankwise.barrier()
    if dist.get_rank() == 0:
        assert not Objects(url).sizes("step-00000002")
    manager.close()


def test_rank_that_is_killed_while_it_uploads_is_named_to_the_other(s3: Any, bucket: str, tmp_path: Path) -> None:
    ranks = RankProcesses(hear_of_the_other, 2, kwargs={"url": bucket, "heard": str(tmp_path / "heard")})

    def kill(method: str, path: str, proceed: Callable[[], list[bytes]]) -> None:
        if method == "PUT" and "/step-00000002" in path and "/__1_0" in path:
            os.kill(ranks.processes[1].pid or 0, signal.SIGKILL)

    with ranks:
        s3.meddle = kill
        assert ranks.join(60.0) == {1: "killed by SIGKILL"}, ranks.output()
    s3.meddle = None
    assert (tmp_path / "heard").exists()
    assert CheckpointManager(bucket).steps() == [1]


def hear_of_the_other(url: str, heard: str) -> None:
    with rankwise.init(timeout_seconds=50):
        try:
            save_two_steps(url)
        except RankFailedError as error:
            if (error.failures[0].rank, error.failures[0].is_loss) == (1, True):
                Path(heard).touch()
            os._exit(0)


def test_load_goes_on_to_the_newest_whole_step(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    url = f"{bucket}/run"
    manager = CheckpointManager(url)
    for step in (1, 2, 3, 4):
        manager.save(step, state(float(step)))
    stored = Objects(url)
    names = sorted(stored.sizes("step-"))

    def find(step: int, file: str) -> str:
        return next(name for name in names if name.startswith(f"step-{step:08d}") and name.endswith(file))

    shard = find(4, ".distcp")
    stored.write(shard, stored.read(shard)[:-1] + b"?")
    stored.remove([find(3, "/values.json")])
    stored.write(find(2, "/manifest.json"), b"{}")
    loaded = state(0.0)
    assert manager.load(loaded) == 1
    assert loaded["weight"].tolist() == [1.0] * 300
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 3
    for error, name, what in zip(
        errors,
        (shard, find(3, "/values.json"), find(2, "/manifest.json")),
        ("its checksum is", "is not there any more", "cannot be read"),
        strict=True,
    ):
        assert f"{url}/{name}" in error
        assert what in error
        assert "Going on to an older step" in error
    assert manager.latest() == 4
    assert manager.latest(verified=True) == 1
    for step in (4, 3, 2):
        with pytest.raises(CheckpointCorruptError, match=f"{url}/step-0000000{step}"):
            manager.load(loaded, step=step)
    with pytest.raises(CheckpointCorruptError, match=shard):
        manager.verify(4)
    manager.save(4, state(5.0))  # the broken one is set aside
    assert manager.load(loaded) == 4
    assert loaded["weight"].tolist() == [5.0] * 300
    manager.close()


def test_bytes_that_come_damaged_are_fetched_once_more(s3: Any, bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    manager = CheckpointManager(bucket)
    manager.save(1, state(1.0))
    manager.save(2, state(2.0))
    damaged: list[str] = []

    def damage(method: str, path: str, proceed: Callable[[], list[bytes]]) -> list[bytes] | None:
        if method != "GET" or not path.endswith(".distcp") or damaged:
            return None
        damaged.append(path)
        content = b"".join(proceed())
        return [bytes([content[0] ^ 1]) + content[1:]]

    s3.meddle = damage
    assert manager.load(state(0.0)) == 2
    assert damaged
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    manager.close()


def test_second_job_is_refused_and_takes_over_when_the_first_is_killed(s3: Any, bucket: str, tmp_path: Path) -> None:
    with RankProcesses(save_and_wait, 1, kwargs={"url": bucket, "ready": str(tmp_path / "ready")}) as first:
        wait_for(tmp_path / "ready")
        second = CheckpointManager(bucket)
        with pytest.raises(CheckpointLeaseError, match=f"{bucket} is written by another job: pid "):
            second.save(2, state(2.0))
        first.kill()
    second.save(2, state(2.0))
    assert second.steps() == [1, 2]
    second.close()


def save_and_wait(url: str, ready: str) -> None:
    manager = CheckpointManager(url)
    manager.save(1, state(1.0))
    Path(ready).touch()
    threading.Event().wait(60.0)


def test_stalled_job_commits_nothing_more_and_the_later_job_s_step_is_the_newest(bucket: str) -> None:
    stalled = CheckpointManager(bucket)
    stalled.save(5, state(5.0))
    lease = stalled._lease
    assert lease is not None
    Objects(bucket).write("lease-00000009.json", b"what another job wrote")
    with pytest.raises(CheckpointLeaseError, match="was lost to an unknown holder"):
        stalled.save(6, state(6.0))
    assert stalled.steps() == [5]
    stalled.close()


def test_memory_of_each_rank_s_own_is_told() -> None:
    run_on_ranks(save_in_memory, 2)


def save_in_memory() -> None:
    with pytest.raises(
        CheckpointError, match=r"memory://run does not have step-\S+/\S+, of which a rank has put"
    ) as raised:
        CheckpointManager("memory://run").save(1, state(1.0))
    assert "Have all ranks write to one store" in str(raised.value)


# As if the name of the server had been looked up long ago: to look again takes a thread, and late in its end Python
# starts none any more.
SCRIPT = """
import sys, aiohttp.connector, torch
from rankwise import CheckpointManager
aiohttp.connector._DNSCacheTable.expired = lambda *_: True
manager = CheckpointManager(sys.argv[1], async_save=True)
manager.save(1, {"weight": torch.ones(300)})
"""


def test_clean_end_of_a_program_waits_for_the_save_and_gives_the_lease_back(s3: Any, bucket: str) -> None:
    environ = os.environ | {
        "AWS_ENDPOINT_URL": f"http://localhost:{s3.port}",
        "PYTHONPATH": str(Path(rankwise.__file__).parents[1]),
    }
    s3.meddle = lambda method, path, proceed: time.sleep(0.2) if method == "PUT" else None
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, bucket], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    s3.meddle = None
    manager = CheckpointManager(bucket)
    assert manager.latest(verified=True) == 1
    assert b'"released": true' in Objects(bucket).read("lease-00000001.json")
