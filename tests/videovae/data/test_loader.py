import dataclasses
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from videovae.data.clips import ClipDataset, ClipsConfig
from videovae.data.index_builder import build_index
from videovae.data.loader import Batch, ClipLoader, ClipOrder, build_loader
from videovae.errors import DataError

MakeVideo = Callable[..., Path]
CONFIG = ClipsConfig(num_frames=5, height=16, width=16)


@pytest.fixture
def dataset(make_video: MakeVideo, tmp_path: Path) -> ClipDataset:
    """Five clips per epoch."""
    for name in "abcde":
        make_video(f"data/{name}.mp4", num_frames=12, height=16, width=24)
    entries = build_index(tmp_path / "data", tmp_path / "videos.json").entries
    return ClipDataset(entries, CONFIG, seed=7)


def loader_of(dataset: ClipDataset, rank: int = 0, world_size: int = 1, **settings: int) -> ClipLoader:
    return build_loader(dataset, rank=rank, world_size=world_size, **{"batch_size": 2, **settings})


def take(loader: ClipLoader, num_steps: int) -> list[Batch]:
    return [next(loader) for _ in range(num_steps)]


def pixels(batches: list[Batch]) -> list[Tensor]:
    return [batch.video for batch in batches]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_order_visits_each_clip_once_per_epoch_and_shuffles_anew() -> None:
    order = ClipOrder(10, seed=0)
    epochs = [[order[10 * epoch + place] for place in range(10)] for epoch in range(3)]
    assert [sorted(keys) for keys in epochs] == [[(epoch, i) for i in range(10)] for epoch in range(3)]
    shuffles = {tuple(index for _, index in keys) for keys in epochs}
    assert len(shuffles) == 3
    assert [ClipOrder(10, seed=0)[p] for p in (25, 3)] == [order[25], order[3]]
    assert [ClipOrder(10, seed=1)[p] for p in range(10)] != epochs[0]


@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_a_step_has_the_same_clips_on_any_number_of_ranks(dataset: ClipDataset, world_size: int) -> None:
    whole = take(loader_of(dataset, batch_size=12), 2)
    shares = [take(loader_of(dataset, rank, world_size, batch_size=12 // world_size), 2) for rank in range(world_size)]
    for step in range(2):
        dealt = [shares[rank][step].video[i] for i in range(12 // world_size) for rank in range(world_size)]
        assert torch.equal(torch.stack(dealt), whole[step].video)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_give_what_the_process_itself_gives(dataset: ClipDataset, num_workers: int) -> None:
    alone = loader_of(dataset)
    with loader_of(dataset, num_workers=num_workers) as helped:
        for _ in range(7):
            ours, theirs = next(alone), next(helped)
            assert torch.equal(ours.video, theirs.video)
            assert ours.specs == theirs.specs
            assert alone.position == helped.position
            assert alone.state_dict() == helped.state_dict()


def test_position_counts_the_clips_that_all_ranks_consumed(dataset: ClipDataset) -> None:
    with loader_of(dataset, rank=1, world_size=3, num_workers=2) as loader:
        assert loader.position == 0
        take(loader, 4)
        assert loader.position == 24
        assert loader.state_dict()["position"] == 24


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 1), (1, 2)])
def test_a_resumed_loader_goes_on_as_if_never_stopped(dataset: ClipDataset, before: int, after: int) -> None:
    whole = pixels(take(loader_of(dataset), 8))
    with loader_of(dataset, num_workers=before) as first:
        assert equal(pixels(take(first, 3)), whole[:3])
        state = first.state_dict()
    with loader_of(dataset, num_workers=after) as second:
        next(second)  # even one that ran already
        second.load_state_dict(state)
        assert equal(pixels(take(second, 5)), whole[3:])
    assert torch.equal(next(loader_of(dataset, start_position=6)).video, whole[3])


def test_a_resumed_loader_knows_whether_the_videos_are_the_same(dataset: ClipDataset) -> None:
    state = loader_of(dataset).state_dict()
    same, other = loader_of(dataset), loader_of(ClipDataset(dataset.videos[:4], CONFIG, seed=7))
    for loader in (same, other):
        assert not loader.videos_changed
        loader.load_state_dict(state)
    assert (same.videos_changed, other.videos_changed) == (False, True)


def test_a_resumed_loader_remembers_failures_of_the_videos_that_are_still_there(dataset: ClipDataset) -> None:
    dataset.videos[2].path.write_bytes(b"no video")
    first = loader_of(dataset)
    take(first, 5)
    state = first.state_dict()
    assert list(state["failures"]) == ["c.mp4"]
    second = loader_of(dataset)
    second.load_state_dict(state)
    assert second.failures == first.failures
    without = loader_of(ClipDataset([v for v in dataset.videos if v.name != "c.mp4"], CONFIG, seed=7))
    without.load_state_dict(state)
    assert without.failures == {}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_video_that_fails_is_counted_once_and_travels_with_the_batch(dataset: ClipDataset, num_workers: int) -> None:
    dataset.videos[2].path.write_bytes(b"no video")
    with loader_of(dataset, num_workers=num_workers) as loader:
        batches = take(loader, 10)
        assert list(loader.failures) == ["c.mp4"]
    named = [name for batch in batches for name, _ in batch.failures]
    assert set(named) == {"c.mp4"}
    assert len(named) >= 3
    assert all(batch.video.shape == (2, 3, 5, 16, 16) for batch in batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_failures_of_most_videos_are_counted_and_only_those_of_all_are_an_error(
    dataset: ClipDataset, num_workers: int
) -> None:
    for video in dataset.videos[1:]:
        video.path.unlink()
    with loader_of(dataset, num_workers=num_workers) as loader:
        batches = take(loader, 10)
        assert sorted(loader.failures) == ["b.mp4", "c.mp4", "d.mp4", "e.mp4"]
        assert {spec.video.name for batch in batches for spec in batch.specs} == {"a.mp4"}
    dataset.videos[0].path.unlink()
    with (
        loader_of(dataset, num_workers=num_workers) as loader,
        pytest.raises(DataError, match=r"all of 5 videos that were tried failed \(.*\.mp4: .*decoded"),
    ):
        next(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unexpected_error_arrives_as_ours(dataset: ClipDataset, num_workers: int) -> None:
    broken = [dataclasses.replace(video, stop_frame=3) for video in dataset.videos]
    with (
        loader_of(ClipDataset(broken, CONFIG, seed=0), num_workers=num_workers) as loader,
        pytest.raises(DataError, match=r"clips \[\(0, \d\).* cannot be read \(ValueError"),
    ):
        next(loader)


def workers_of_this_process() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "videovae.data.worker" in " ".join(p.cmdline())]


def test_closing_ends_the_workers_and_the_loader_may_go_on(dataset: ClipDataset) -> None:
    whole = pixels(take(loader_of(dataset), 4))
    loader = loader_of(dataset, num_workers=2)
    first = pixels(take(loader, 2))
    assert len(workers_of_this_process()) == 2
    loader.close()
    loader.close()
    assert workers_of_this_process() == []
    assert equal(first + pixels(take(loader, 2)), whole)
    del loader
    assert workers_of_this_process() == []


def test_workers_take_no_notice_of_signals_that_stop_a_job(dataset: ClipDataset) -> None:
    whole = pixels(take(loader_of(dataset), 6))
    with loader_of(dataset, num_workers=2) as loader:
        first = pixels(take(loader, 1))
        for worker in workers_of_this_process():
            for number in (signal.SIGTERM, signal.SIGINT):
                worker.send_signal(number)
        assert equal(first + pixels(take(loader, 5)), whole)


def test_a_worker_that_is_killed_is_an_error_and_not_a_hang(dataset: ClipDataset) -> None:
    with loader_of(dataset, num_workers=2) as loader:
        next(loader)
        for worker in workers_of_this_process():
            worker.kill()
        with pytest.raises(DataError, match=r"loader worker \d \(pid \d+\) ended with status -9"):
            take(loader, 4)
    assert workers_of_this_process() == []


PARENT = """
import pickle, sys
from pathlib import Path
from videovae.data.loader import build_loader
loader = build_loader(pickle.loads(Path(sys.argv[1]).read_bytes()), rank=0, world_size=1, batch_size=2, num_workers=2)
next(loader)
print(*[process.pid for process, _ in loader._pool._workers], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kill", [True, False])
def test_workers_end_with_their_parent(dataset: ClipDataset, tmp_path: Path, kill: bool) -> None:
    (tmp_path / "dataset").write_bytes(pickle.dumps(dataset))
    command = [sys.executable, "-W", "error", "-c", PARENT, str(tmp_path / "dataset")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stderr is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        if kill:
            parent.kill()
        parent.stdin.close()
        assert parent.stderr.read() == b""
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE] == []


def test_workers_start_without_torch() -> None:
    program = "import sys, videovae.data.worker; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"
