"""A shard is what torch.save writes, its bytes lie where the manifest says, and plain DCP reads it."""

import dataclasses
import errno
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, zeros

import rankwise
from rankwise import CheckpointManager, PerRank
from rankwise.checkpoint import writer
from rankwise.checkpoint.folder import file_record
from rankwise.checkpoint.manifest import FileRecord, TensorRecord, as_bytes, checksum
from rankwise.checkpoint.plan import Piece
from rankwise.checkpoint.tree import DTYPES
from rankwise.checkpoint.writer import encode_metadata, write_shard
from rankwise.errors import CheckpointError
from rankwise.testing import on_ranks


def as_pieces(tensors: dict[str, torch.Tensor]) -> list[Piece]:
    return [Piece(name, tuple(t.shape), (0,) * t.dim(), t) for name, t in tensors.items()]


def every_kind() -> dict[str, torch.Tensor]:
    kinds = {name: torch.randint(0, 2, (2, 3)).to(dtype) for name, dtype in DTYPES.items()}
    return kinds | {"scalar": torch.tensor(1.5), "large": torch.randn(300_000)}


def test_bytes_of_every_tensor_lie_where_it_is_said(tmp_path: Path) -> None:
    tensors = every_kind()
    shard = write_shard(tmp_path / "__0_0.distcp", as_pieces(tensors), {"step": 3})
    content = (tmp_path / "__0_0.distcp").read_bytes()
    assert shard.file == file_record(tmp_path / "__0_0.distcp")
    assert [name for name, _ in shard.chunks] == list(tensors)
    for name, chunk in shard.chunks:
        raw = content[chunk.start : chunk.start + chunk.num_bytes]
        assert raw == bytes(as_bytes(tensors[name]))
        assert (chunk.xxh3, chunk.sizes) == (checksum(raw), tuple(tensors[name].shape))


def test_every_blob_is_a_file_that_torch_loads(tmp_path: Path) -> None:
    path = tmp_path / "__0_0.distcp"
    shard = write_shard(path, as_pieces({"a": torch.arange(5)}), {"betas": (0.9, 0.999)})
    content = path.read_bytes()
    blobs = {**{name: blob for (name, _), blob in shard.tensor_blobs.items()}, **shard.leaf_blobs}
    found = {}
    for name, (file, start, num_bytes) in blobs.items():
        assert file == path.name
        (tmp_path / "blob").write_bytes(content[start : start + num_bytes])
        assert zipfile.is_zipfile(tmp_path / "blob")
        found[name] = torch.load(tmp_path / "blob", weights_only=True)
    assert found["a"].tolist() == [0, 1, 2, 3, 4]
    assert found["betas"] == (0.9, 0.999)


def test_shard_that_comes_back_otherwise_from_the_disk_is_refused(tmp_path: Path) -> None:
    other = mock.Mock(return_value=FileRecord(1, "0"))
    with (
        mock.patch.object(writer, "file_record", other),
        pytest.raises(CheckpointError, match=r"__0_0.distcp does not come back from the disk as it was written"),
    ):
        write_shard(tmp_path / "__0_0.distcp", as_pieces({"a": torch.ones(2)}), {})


@pytest.mark.parametrize("room", [0, 1500, 300_000])
def test_disk_that_is_full_in_the_middle_is_told_as_that(tmp_path: Path, room: int) -> None:
    class FullDisk(io.FileIO):
        def write(self, content: Any) -> int:
            if self.tell() + len(content) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content) or 0

    def make(path: Path, mode: str, buffering: int) -> FullDisk:
        return FullDisk(path, mode)

    pieces = as_pieces({"a": torch.ones(50_000), "b": torch.ones(50_000)})
    with (
        mock.patch.object(writer, "open", make, create=True),
        pytest.raises(OSError, match="No space left on device"),
    ):
        write_shard(tmp_path / "__0_0.distcp", pieces, {"step": 1})


def test_shard_is_synced_and_never_written_over(tmp_path: Path) -> None:
    with mock.patch.object(os, "fsync", wraps=os.fsync) as fsync:
        write_shard(tmp_path / "__0_0.distcp", [], {"a": 1})
    assert fsync.call_count == 1
    with pytest.raises(FileExistsError):
        write_shard(tmp_path / "__0_0.distcp", [], {"a": 1})


def test_torch_that_writes_tensors_otherwise_is_refused_and_not_believed(tmp_path: Path) -> None:
    save = torch.save

    def copy_and_save(tensor: torch.Tensor, stream: Any) -> None:
        save(tensor.clone(), stream)

    with mock.patch.object(torch, "save", copy_and_save), pytest.raises(CheckpointError, match="in a way unknown"):
        write_shard(tmp_path / "__0_0.distcp", as_pieces({"a": torch.ones(2)}), {})


def test_metadata_names_every_tensor_leaf_and_alias(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "__0_0.distcp", as_pieces({"net.a": torch.ones(2)}), {"net.lr": 0.1})
    shard.paths = {"net.a": ("net", "a"), "net.b": ("net", "b"), "net.lr": ("net", "lr")}
    records = {"net.a": TensorRecord(torch.float32, (2,), tuple(chunk for _, chunk in shard.chunks))}
    metadata = pickle.loads(encode_metadata([shard], records, {"net.b": "net.a"}, "nonce"))
    assert set(metadata.state_dict_metadata) == set(metadata.planner_data) == {"net.a", "net.b", "net.lr"}
    blobs = {index.fqn: dataclasses.astuple(blob)[:3] for index, blob in metadata.storage_data.items()}
    assert blobs["net.b"] == blobs["net.a"]
    assert metadata.storage_meta.save_id == "nonce"


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = torch.nn.Linear(8, 8)
        self.write = torch.nn.Linear(8, 8)
        self.write.weight = self.read.weight
        self.wide = torch.nn.Linear(300, 300)


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    net = Tied()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.25, betas=(0.5, 0.75))
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("world_size", [1, 2])
def test_plain_dcp_reads_what_is_written(tmp_path: Path, world_size: int) -> None:
    on_ranks(world_size)(read_by_dcp)(tmp_path=tmp_path)


def read_by_dcp(tmp_path: Path) -> None:
    net, optimizer = trained()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(15.0).reshape(5, 3)
    state = {"net": net, "g": optimizer, "sharded": distribute_tensor(whole, mesh, [Shard(0)]), "step": 7}
    manager = CheckpointManager(tmp_path)
    manager.save(7, {**state, "names": ["a", ("b", 1)], "own": PerRank({"place": torch.tensor([rank]), "epoch": 2})})
    path = str(manager.path(7))

    blank = Tied()
    other = torch.optim.AdamW(blank.parameters(), lr=0.0)
    for parameter in blank.parameters():
        parameter.grad = torch.zeros(parameter.shape)
    other.step()
    columns = zeros(5, 3, device_mesh=mesh, placements=[Shard(1) if world_size > 1 else Replicate()])
    found: dict[str, Any] = {"net": blank.state_dict(), "g": other.state_dict(), "sharded": columns, "step": 0}
    load(found, storage_reader=FileSystemReader(path))
    blank.load_state_dict(found["net"])
    for name, tensor in net.state_dict().items():
        assert torch.equal(blank.state_dict()[name], tensor), name
    assert str(found["g"]) == str(optimizer.state_dict())
    assert torch.equal(found["sharded"].full_tensor(), whole)
    assert found["step"] == 7

    if rank == 0:
        dcp_to_torch_save(path, str(tmp_path / "whole.pt"))
        everything = torch.load(tmp_path / "whole.pt", weights_only=True)
        assert everything["names"] == ["a", ("b", 1)]
        assert torch.equal(everything["net"]["write.weight"], net.read.weight)
        assert everything["g"]["param_groups"][0]["betas"] == (0.5, 0.75)
        assert torch.equal(everything["sharded"], whole)
        places = [everything["own"][f"rank-{old:05d}"]["place"].item() for old in range(world_size)]
        assert places == list(range(world_size))
    rankwise.barrier()
