"""`assert_exact_resume` passes loops that carry everything over a stop, and names what others lose."""

import functools
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import rankwise
from rankwise import CheckpointManager, PerRank
from rankwise.testing import assert_exact_resume, on_ranks, run_on_ranks

Train = Callable[[Path, int], object]

NUM_CLIPS = 5


class Data:
    """This rank's samples, in an order that starts anew every few steps."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.position = 0

    def take(self) -> torch.Tensor:
        epoch, place = divmod(self.position, NUM_CLIPS)
        order = np.random.default_rng((epoch, self.rank)).permutation(NUM_CLIPS)
        self.position += 1
        return torch.linspace(-1, 1, 3) * (float(order[place]) + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


class Loses:
    """Stands where an item stands, and takes nothing back."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def train_toy(
    run_dir: Path,
    num_steps: int,
    *,
    loses: str = "",
    losing_ranks: tuple[int, ...] = (0, 1),
    loses_at: tuple[int, ...] = (),
    seed: int | None = 0,
    save_every: int = 100,
    async_save: bool = False,
) -> None:
    """A few numbers, with everything that real loops carry: noise, momentum, a schedule, a place in the data."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if seed is not None:
        torch.manual_seed(seed + rank)
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    data, rng = Data(rank), rankwise.RngState(torch.device("cpu"))
    items = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "data": PerRank(data),
        "rng": PerRank(rng),
        "run_dir": str(run_dir),
    }
    with CheckpointManager(run_dir / "checkpoints", async_save=async_save) as checkpoints:
        step = checkpoints.latest() or 0
        taken = dict(items)
        if loses and rank in losing_ranks and (not loses_at or step in loses_at):
            taken[loses] = PerRank(Loses()) if loses in ("data", "rng") else Loses()
        checkpoints.load(taken)
        while step < num_steps:
            optimizer.zero_grad()
            loss = (model(data.take() + torch.rand(3) + random.random() + np.random.rand())).square().mean()
            loss.backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                if world_size > 1:
                    dist.all_reduce(parameter.grad)
            optimizer.step()
            scheduler.step()
            step += 1
            if step % save_every == 0 or step == num_steps:
                checkpoints.save(step, items)


def passes(train: Train, folder: Path, **options: Any) -> None:
    settings = {"num_steps": 8, "stops": [3, 6], "ignore": ["run_dir"]} | options
    assert_exact_resume(train, folder, **settings)


def failure(train: Train, folder: Path, **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        passes(train, folder, **options)
    return str(caught.value)


def seeded_toy(run_dir: Path, num_steps: int, **options: Any) -> None:
    random.seed(1)
    np.random.seed(1)
    train_toy(run_dir, num_steps, **options)


def test_a_loop_that_carries_everything_passes(tmp_path: Path) -> None:
    passes(functools.partial(seeded_toy, async_save=True, save_every=5), tmp_path / "runs", crashes=[5])
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert runs == ["crashed-5", "stopped", "straight"]
    assert CheckpointManager(tmp_path / "runs" / "stopped" / "checkpoints").steps() == [3, 5, 6, 8]
    assert CheckpointManager(tmp_path / "runs" / "crashed-5" / "checkpoints").steps() == [5, 8]


@on_ranks(2)
def test_a_loop_on_two_ranks_that_carries_everything_passes(tmp_path: Path) -> None:
    passes(seeded_toy, tmp_path)


def on_two_fresh_ranks(run_dir: Path, num_steps: int) -> None:
    run_on_ranks(seeded_toy, 2, args=[run_dir, num_steps])


def test_a_loop_that_starts_its_ranks_itself_is_compared_too(tmp_path: Path) -> None:
    passes(on_two_fresh_ranks, tmp_path, stops=[2], num_steps=3)


@pytest.mark.parametrize(
    ("loses", "named"),
    [
        ("rng", r"'rng' of rank 0: .* tensors differ, most: \S+ in \d+ of \d+ values, by "),
        ("optimizer", r"'optimizer': 2 tensors differ, most: state\.\d\.momentum_buffer in \d of \d values, by "),
        ("data", r"'data' of rank 0: value position is 8 without a stop, and 4 with it"),
        ("scheduler", r"'scheduler': value last_epoch is 8 without a stop, and 4 with it"),
        ("model", r"'model': 2 tensors differ, most: (weight|bias) in \d of \d values, by "),
    ],
)
def test_what_a_loop_loses_is_named(loses: str, named: str, tmp_path: Path) -> None:
    told = failure(functools.partial(seeded_toy, loses=loses), tmp_path, stops=[4])
    assert told.startswith("seeded_toy does not resume exactly. Stopped at step 4 and started again, ")
    assert re.search(named, told), told
    assert "'model': " in told
    assert "run_dir" not in told


@on_ranks(2)
def test_what_one_rank_alone_loses_is_named_on_every_rank(tmp_path: Path) -> None:
    told = failure(functools.partial(seeded_toy, loses="data", losing_ranks=(1,)), tmp_path, stops=[4])
    assert "'data' of rank 1: value position is 8 without a stop, and 4 with it" in told
    assert "'data' of rank 0" not in told
    assert set(rankwise.gather_objects(told)) == {told}


def test_random_states_that_nobody_restores_are_missed_though_the_process_is_the_same(tmp_path: Path) -> None:
    # Nothing is seeded within, so that in a process that simply goes on nothing would be missed.
    passes(functools.partial(train_toy, seed=None), tmp_path / "kept")
    assert "'rng' of rank 0" in failure(functools.partial(train_toy, seed=None, loses="rng"), tmp_path / "lost")


def test_the_stop_that_does_it_is_named(tmp_path: Path) -> None:
    told = failure(functools.partial(seeded_toy, loses="data", loses_at=(6,)), tmp_path, stops=[3, 6])
    assert "Stopped at step 6 and started again" in told


def test_what_only_a_crash_loses_is_named(tmp_path: Path) -> None:
    train = functools.partial(seeded_toy, loses="data", loses_at=(5,), save_every=5)
    told = failure(train, tmp_path, stops=[3], crashes=[5])
    assert "Started again from its checkpoint of step 5, as after a crash, it is not at step 8 what" in told


def test_what_holds_the_name_of_its_folder_has_to_be_ignored(tmp_path: Path) -> None:
    told = failure(seeded_toy, tmp_path, stops=[4], ignore=["model", "run"])
    assert "give as `ignore` what depends on the clock or on where the run folder lies" in told
    assert told.splitlines()[1].startswith("  'run_dir': value is '")
    assert len(told.splitlines()) == 2


def test_a_loop_that_differs_by_itself_is_not_blamed_on_its_stops(tmp_path: Path) -> None:
    told = failure(train_toy_with_chance, tmp_path, stops=[4])
    assert "train_toy_with_chance is not reproducible: two runs without any stop differ at step 8" in told
    assert "'model': " in told


def train_toy_with_chance(run_dir: Path, num_steps: int) -> None:
    random.seed()
    train_toy(run_dir, num_steps, loses="rng")


def train_from_the_start(run_dir: Path, num_steps: int) -> None:
    torch.manual_seed(0)
    with CheckpointManager(run_dir / "checkpoints") as checkpoints:
        checkpoints.save(num_steps, {"model": torch.rand(3)})


def test_a_loop_that_starts_afresh_each_time_does_not_pass(tmp_path: Path) -> None:
    told = failure(train_from_the_start, tmp_path)
    assert "train_from_the_start(run_dir, 6) did not load step 3" in told


def test_a_loop_that_leaves_no_checkpoint_is_told_so(tmp_path: Path) -> None:
    told = failure(lambda run_dir, num_steps: seeded_toy(run_dir, num_steps - 1), tmp_path)
    assert "(run_dir, 8) left no checkpoint of step 8" in told
    assert "(there is: 7)" in told


def test_a_crash_where_nothing_is_saved_is_refused(tmp_path: Path) -> None:
    told = failure(seeded_toy, tmp_path, stops=[], crashes=[5])
    assert "the run without a stop left no checkpoint of step 5 (there is: 8)" in told


def test_a_folder_with_earlier_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    assert "is not empty, there is straight" in failure(seeded_toy, tmp_path)


@pytest.mark.parametrize("steps", [{"stops": [8]}, {"stops": [0]}, {"stops": [5, 3]}, {"stops": [], "crashes": [9]}])
def test_steps_out_of_order_are_refused(steps: dict[str, list[int]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be steps between 0 and num_steps"):
        passes(seeded_toy, tmp_path, **steps)


def test_nothing_to_stop_at_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no stops and no crashes"):
        passes(seeded_toy, tmp_path, stops=[])


def test_the_generators_of_the_caller_go_on_where_they_were(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    passes(seeded_toy, tmp_path, stops=[2], num_steps=3)
    assert torch.equal(torch.rand(3), expected)
