"""Tensors come back by their place, to the bit, whole or in parts; nothing else in the folder is believed."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from rankwise import CheckpointManager
from rankwise.checkpoint import manifest as manifest_module
from rankwise.checkpoint.folder import file_record
from rankwise.checkpoint.manifest import Chunk, TensorRecord, read_manifest
from rankwise.checkpoint.plan import Piece
from rankwise.checkpoint.reader import read_records, read_tensors
from rankwise.checkpoint.tree import DTYPES
from rankwise.checkpoint.writer import write_shard
from rankwise.errors import CheckpointCorruptError

WHOLE = torch.arange(60.0).reshape(5, 4, 3)


def write_boxes(directory: Path, boxes: list[tuple[tuple[int, int, int], tuple[int, int, int]]]) -> TensorRecord:
    """The tensor `WHOLE` in boxes (offsets, sizes), each in a file of its own."""
    chunks: list[Chunk] = []
    for number, (offsets, sizes) in enumerate(boxes):
        part = WHOLE[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].clone()
        shard = write_shard(directory / f"__{number}_0.distcp", [Piece("w", (5, 4, 3), offsets, part)], {})
        chunks += [chunk for _, chunk in shard.chunks]
    return TensorRecord(torch.float32, (5, 4, 3), tuple(chunks))


BOXES = [((0, 0, 0), (2, 4, 3)), ((2, 0, 0), (3, 1, 3)), ((2, 1, 0), (3, 3, 2)), ((2, 1, 2), (3, 3, 1))]


def test_tensors_of_every_type_and_shape_come_back_to_the_bit(tmp_path: Path) -> None:
    tensors = {
        f"{name}-{len(shape)}": torch.randint(0, 2, shape).to(dtype)
        for name, dtype in DTYPES.items()
        for shape in ((), (2, 3))
    }
    tensors["nan"] = torch.tensor([0x7FC00001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    pieces = [Piece(name, tuple(t.shape), (0,) * t.dim(), t) for name, t in tensors.items()]
    shard = write_shard(tmp_path / "__0_0.distcp", pieces, {})
    records = {n: TensorRecord(tensors[n].dtype, tuple(tensors[n].shape), (chunk,)) for n, chunk in shard.chunks}
    records["empty"] = TensorRecord(torch.int8, (0, 3), ())
    found = read_tensors(tmp_path, records, records)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(found[name].untyped_storage()) == bytes(tensor.untyped_storage())
    assert (found["empty"].dtype, found["empty"].shape) == (torch.int8, (0, 3))


def test_whole_is_put_together_from_its_parts(tmp_path: Path) -> None:
    record = write_boxes(tmp_path, BOXES)
    assert torch.equal(read_tensors(tmp_path, {"w": record}, ["w"])["w"], WHOLE)


def test_tensor_that_lacks_a_part_is_not_there_in_full(tmp_path: Path) -> None:
    record = write_boxes(tmp_path, BOXES[1:])
    with pytest.raises(CheckpointCorruptError, match=r"has 36 of the 60 values of 'w'"):
        read_tensors(tmp_path, {"w": record}, ["w"])
    with pytest.raises(CheckpointCorruptError, match=r"lacks the tensor 'v'"):
        read_tensors(tmp_path, {"w": record}, ["v"])


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "pipe"])
def test_damage_of_what_is_read_is_found_and_named(tmp_path: Path, damage: str) -> None:
    record = write_boxes(tmp_path, BOXES)
    path, chunk = tmp_path / "__2_0.distcp", record.chunks[2]
    content = bytearray(path.read_bytes())
    content[chunk.start + chunk.num_bytes - 1] ^= 1
    if damage in ("remove", "pipe"):
        path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    if damage in ("flip", "truncate"):
        path.write_bytes(content if damage == "flip" else content[: chunk.start + 5])
    with pytest.raises(CheckpointCorruptError, match=r"__2_0.distcp (is damaged|cannot be read)"):
        read_tensors(tmp_path, {"w": record}, ["w"])


def make_step(directory: Path) -> Path:
    manager = CheckpointManager(directory)
    manager.save(1, {"net": {"w": torch.arange(4.0)}, "step": 1})
    manager.close()
    return manager.path(1)


def forge(step: Path, name: str, content: bytes) -> None:
    """Put another file into a step, with checksums that fit."""
    (step / name).write_bytes(content)
    body = json.loads((step / "manifest.json").read_text())
    record = file_record(step / name)
    body["files"][name] = {"bytes": record.num_bytes, "xxh3": record.xxh3}
    del body["xxh3"]
    (step / "manifest.json").write_text(json.dumps({**body, "xxh3": manifest_module._body_checksum(body)}))


class RunsCode:
    """What a pickle can do to whoever loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o700)


def test_pickle_in_a_step_is_never_loaded(tmp_path: Path) -> None:
    step, trap = make_step(tmp_path / "checkpoints"), tmp_path / "trap"
    bomb = pickle.dumps(RunsCode(trap))
    forge(step, ".metadata", bomb)
    for name in ("bomb.pt", "__9_0.distcp"):
        forge(step, name, bomb)
    manager, state = CheckpointManager(tmp_path / "checkpoints"), {"net": {"w": torch.zeros(4)}, "step": 0}
    refuse = mock.Mock(side_effect=AssertionError("unpickled"))
    with mock.patch.object(torch, "load", refuse), mock.patch.object(pickle, "Unpickler", refuse):
        manager.verify()
        assert manager.load(state) == 1
        assert manager.read("net")["w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert not trap.exists()
    pickle.loads(bomb)
    assert trap.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["net.w"]["chunks"][0].update(file="../../../../etc/passwd"),
        lambda body: body["net.w"].update(shape=[1 << 60]),
        lambda body: body["net.w"]["chunks"][0].update(sizes=[1 << 60], num_bytes=1 << 62),
        lambda body: body["net.w"]["chunks"][0].update(start=-5),
        lambda body: body["net.w"].update(dtype="float64"),
        lambda body: body.pop("net.w"),
        lambda body: body.update({"net.w": None}),
    ],
)
def test_records_that_mislead_are_damage_for_who_loads_and_change_nothing(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    step = make_step(tmp_path)
    body = json.loads((step / "tensors.json").read_text())
    change(body)
    forge(step, "tensors.json", json.dumps(body).encode())
    tensor = torch.full((4,), -1.0)
    with pytest.raises(CheckpointCorruptError):
        CheckpointManager(tmp_path).load({"net": {"w": tensor}, "step": 0})
    with pytest.raises(CheckpointCorruptError):
        CheckpointManager(tmp_path).read("net")
    assert tensor.tolist() == [-1.0] * 4


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b'{"net": {"w": {"$tensor": "other"}}, "step": 1}',
        b'{"net": {"w": {"$tensor": ["net.w"]}}, "step": 1}',
        b'{"net": {"$dict": [[{"$tensor": "net.w"}, 1]]}, "step": 1}',
        b'{"net": {"$dict": [[[1], 1]]}, "step": 1}',
        b'{"net": {"$dict": 3}, "step": 1}',
        b'{"net": {"$float": "one"}, "step": 1}',
        b'{"net": {"$float": [1]}, "step": 1}',
        b'{"net": {"$tuple": 3}, "step": 1}',
        b'{"step": 1}',
        b'{"net": ' + b"[" * 100_000,
        b'{"net": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
    ],
)
def test_values_that_mislead_are_damage(tmp_path: Path, content: bytes) -> None:
    step = make_step(tmp_path)
    forge(step, "values.json", content)
    with pytest.raises(CheckpointCorruptError):
        CheckpointManager(tmp_path).read("net")
    with pytest.raises(CheckpointCorruptError):
        CheckpointManager(tmp_path).load({"net": {"w": torch.zeros(4)}, "step": 0})


def test_records_are_read_with_their_own_checksum(tmp_path: Path) -> None:
    step = make_step(tmp_path)
    manifest = read_manifest(step)
    assert set(read_records(step, manifest)) == {"net.w"}
    (step / "tensors.json").write_bytes((step / "tensors.json").read_bytes().replace(b"4", b"5", 1))
    with pytest.raises(CheckpointCorruptError, match=r"tensors.json is damaged: its checksum"):
        read_records(step, manifest)
