"""What N ranks have saved comes back on M ranks to the bit, however it is distributed here and there."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import rankwise
from rankwise import CheckpointManager, PerRank
from rankwise.checkpoint import folder, loading
from rankwise.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, CheckpointNotFoundError
from rankwise.testing import on_ranks, run_on_ranks

WORLD_SIZES = (1, 2, 3, 4)
SHAPES = {"even": (12, 4), "uneven": (7, 5), "few": (2, 3), "one": (1,), "none": (0, 3), "wide": (3, 9)}


class Net(torch.nn.Module):
    """Some of its parameters split unevenly, or leave ranks without a part; two of its layers are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(7, 160)
        self.middle = torch.nn.Linear(160, 160)  # large enough to be shared out where it is replicated
        self.norm = torch.nn.BatchNorm1d(160)
        self.last = torch.nn.Linear(160, 3)
        self.again = torch.nn.Linear(160, 3)
        self.again.weight = self.last.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.norm(self.middle(self.first(x)))
        return self.last(hidden) + self.again(hidden)


def build(kind: str, seed: int, num_steps: int) -> dict[str, Any]:
    """A net and its optimizer, replicated or sharded ("fsdp", over nodes and within them "hsdp"), trained a little."""
    torch.manual_seed(seed)
    net = Net()
    if kind == "fsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    elif kind == "hsdp":
        inner = 2 if dist.get_world_size() % 2 == 0 else 1
        mesh = init_device_mesh("cpu", (dist.get_world_size() // inner, inner), mesh_dim_names=("nodes", "node"))
        fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1 + seed)
    for _ in range(num_steps):
        net(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"net": net, "g": optimizer}


def build_sharded(fill: bool) -> dict[str, torch.Tensor]:
    """Tensors of several shapes, in every way over one mesh of one axis and, where it can be, of two."""
    world_size = dist.get_world_size()
    meshes = {"line": (init_device_mesh("cpu", (world_size,)), [(Shard(0),), (Shard(1),), (Replicate(),)])}
    if world_size == 4:
        square = [(Replicate(), Shard(0)), (Shard(0), Shard(1)), (Shard(1), Shard(1)), (Shard(0), Replicate())]
        meshes["square"] = (init_device_mesh("cpu", (2, 2)), square)
    found: dict[str, torch.Tensor] = {}
    # The names tell nothing of the mesh, so that each is loaded into another distribution.
    ways = [(mesh, placements) for mesh, many in meshes.values() for placements in many]
    for name, shape in SHAPES.items():
        for number in range(4):
            mesh, placements = ways[(number + len(name)) % len(ways)]
            if len(shape) == 1:
                placements = tuple(Shard(0) if placement.is_shard() else placement for placement in placements)
            torch.manual_seed(number)
            whole = torch.randn(shape, dtype=torch.float64)
            where: dict[str, Any] = {"device_mesh": mesh, "placements": placements}
            found[f"{name}-{number}"] = (
                distribute_tensor(whole, **where) if fill else zeros(shape, dtype=torch.float64, **where)
            )
    return found


def share_out(saved: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """Deal what the old ranks had to the new ones, one after the other."""
    return {"place": torch.cat([each["place"] for each in saved])[rank::world_size]}


class Place:
    def __init__(self, place: torch.Tensor) -> None:
        self.place = place

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def whole(value: Any) -> Any:
    """State with all that is distributed put together."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, (list, tuple)) else value


def states_of(state: dict[str, Any]) -> dict[str, Any]:
    return whole({name: item.state_dict() if hasattr(item, "state_dict") else item for name, item in state.items()})


def require_equal(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            require_equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            require_equal(one, other, f"{where}.{number}")
    else:
        assert found == expected, where


def save_all(folder: Path) -> None:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for kind in ("ddp", "fsdp", "hsdp"):
        state = build(kind, seed=3, num_steps=2)
        expected = states_of(state)
        with CheckpointManager(folder / f"{kind}-{world_size}") as manager:
            manager.save(1, state)
        if rank == 0:
            torch.save(expected, folder / f"{kind}-{world_size}.pt")
    numbers = torch.arange(rank * 100, rank * 100 + 5)
    with CheckpointManager(folder / f"tensors-{world_size}") as manager:
        manager.save(1, {**build_sharded(fill=True), "own": PerRank(Place(numbers))})


def load_all(folder: Path, num_savers: int) -> None:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for saved, here in (("ddp", "ddp"), ("fsdp", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp"), ("hsdp", "fsdp")):
        expected = torch.load(folder / f"{saved}-{num_savers}.pt", weights_only=True)
        # A fresh optimizer has no state yet that tells how it is distributed; a used one has.
        state = build(here, seed=5, num_steps=(num_savers + world_size) % 2)
        assert CheckpointManager(folder / f"{saved}-{num_savers}").load(state) == 1
        require_equal(states_of(state), whole(expected), f"{saved} on {num_savers} to {here} on {world_size}")
        for parameter, entry in state["g"].state.items():
            assert type(entry["exp_avg"]) is type(parameter.data)
            assert here == "ddp" or entry["exp_avg"].placements == parameter.placements
        state["net"](torch.randn(4, 7)).sum().backward()
        state["g"].step()
    blank, place = build_sharded(fill=False), Place(torch.empty(0))
    target = {**blank, "own": PerRank(place, share_out)}
    assert CheckpointManager(folder / f"tensors-{num_savers}").load(target) == 1
    for (name, found), reference in zip(blank.items(), build_sharded(fill=True).values(), strict=True):
        assert torch.equal(whole(found), whole(reference)), name
    numbers = [number for old in range(num_savers) for number in range(old * 100, old * 100 + 5)]
    dealt = numbers[rank::world_size] if num_savers != world_size else numbers[rank * 5 : rank * 5 + 5]
    assert place.place.tolist() == dealt


@pytest.fixture(scope="module")
def saved_by_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for num_savers in WORLD_SIZES:
        run_on_ranks(save_all, num_savers, kwargs={"folder": folder})
    return folder


@pytest.mark.parametrize("num_loaders", WORLD_SIZES)
def test_state_of_any_number_of_ranks_comes_back_to_the_bit(saved_by_all: Path, num_loaders: int) -> None:
    run_on_ranks(load_all_of_all, num_loaders, kwargs={"folder": saved_by_all})


def load_all_of_all(folder: Path) -> None:
    for num_savers in WORLD_SIZES:
        load_all(folder, num_savers)


@on_ranks(4)
def test_state_that_is_sharded_twice_along_one_axis_comes_back(tmp_path: Path) -> None:
    """FSDP2 over tensor parallel: the first splits what the second has split already."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for width in (8, 5):
        torch.manual_seed(width)
        net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 4))
        expected = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(net, mesh=mesh["data"])
        manager = CheckpointManager(tmp_path / str(width))
        manager.save(1, {"net": net})
        require_equal(manager.read("net"), expected)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        assert manager.load({"net": net}) == 1
        require_equal(whole(net.state_dict()), expected)
        rankwise.barrier()


@on_ranks(2)
def test_only_this_rank_s_part_of_what_is_sharded_is_read_for_it(tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"w": distribute_tensor(torch.arange(100_000.0), mesh, [Shard(0)])})
    largest: list[int] = []
    empty = torch.empty

    def note(*sizes: Any, **options: Any) -> torch.Tensor:
        made = empty(*sizes, **options)
        largest.append(made.nbytes)
        return made

    blank = zeros(100_000, device_mesh=mesh, placements=[Shard(0)])
    torch.empty = note
    manager.load({"w": blank})
    torch.empty = empty
    assert max(largest) == 200_000
    assert blank.full_tensor().sum().item() == torch.arange(100_000.0).sum().item()


@on_ranks(2)
def test_per_rank_state_of_another_number_of_ranks_is_refused_with_both_numbers(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(5, {"place": PerRank(torch.tensor(1)), "step": 5})
    rank, world_size = dist.get_rank(), dist.get_world_size()
    loading.rank_and_world_size = lambda: (rank, world_size + 1)
    with pytest.raises(CheckpointMismatchError, match="saved by 2 ranks and is loaded by 3, and place") as raised:
        manager.load({"place": PerRank(torch.tensor(1)), "step": 0})
    assert raised.value.on_every_rank


@on_ranks(2)
def test_redistribution_that_fails_on_one_rank_fails_on_all_and_changes_nothing(tmp_path: Path) -> None:
    manager, tensor = CheckpointManager(tmp_path), torch.tensor(1)
    manager.save(5, {"place": PerRank(tensor)})
    rank = dist.get_rank()
    loading.rank_and_world_size = lambda: (rank, 3)

    def refuse(saved: list[Any], rank: int, world_size: int) -> Any:
        assert [each.item() for each in saved] == [1, 1]
        return saved[0] + 5 if rank == 0 else saved[7]

    with pytest.raises(CheckpointError, match=r"because of rank 1 .*IndexError: list index"):
        manager.load({"place": PerRank(tensor, refuse)})
    assert tensor.item() == 1


@on_ranks(2)
def test_damage_that_one_rank_finds_fails_the_load_on_all(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    own = torch.tensor([dist.get_rank()])
    manager.save(1, {"own": PerRank(own)})
    if dist.get_rank() == 0:
        path = manager.path(1) / "__1_0.distcp"
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    rankwise.barrier()
    with pytest.raises(CheckpointCorruptError, match=r"step 1 was not loaded, because of rank . .*__1_0.distcp is dam"):
        manager.load({"own": PerRank(own)})
    with pytest.raises(CheckpointNotFoundError, match="no step 9") as raised:
        manager.load({"own": PerRank(own)}, 9)
    assert raised.value.on_every_rank


@on_ranks(2)
def test_folder_that_one_rank_does_not_see_is_told_as_such_and_not_as_damage(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"a": 1})
    folder.VISIBLE_SECONDS = 0.1
    elsewhere = manager if dist.get_rank() == 0 else CheckpointManager(tmp_path / "of-another-host")
    with pytest.raises(CheckpointError, match=r"rank 1 .*step-00000001 is not seen here after 0\.1 s.*folder that all"):
        elsewhere.load({"a": 1})
