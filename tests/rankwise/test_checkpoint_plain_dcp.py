"""A directory of `torch.distributed.checkpoint` is read whole, and nothing that stands in it is run."""

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import rankwise
from rankwise.checkpoint.plain_dcp import read_plain
from rankwise.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError


def save_plain(state: dict[str, Any], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path, no_dist=True)


class Harmful:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def write_metadata(path: Path, **changes: Any) -> None:
    """A directory with one tensor of two values, and metadata with some of it changed."""
    path.mkdir()
    with open(path / "__0_0.distcp", "wb") as file:
        torch.save(torch.ones(2), file)
    chunk = ChunkStorageMetadata(torch.Size(changes.pop("offsets", [0])), torch.Size(changes.pop("sizes", [2])))
    size = torch.Size(changes.pop("shape", [2]))
    properties = TensorProperties(dtype=changes.pop("dtype", torch.float32))
    length = (path / "__0_0.distcp").stat().st_size
    info = _StorageInfo(changes.pop("file", "__0_0.distcp"), changes.pop("start", 0), changes.pop("length", length))
    info.transform_descriptors = changes.pop("transforms", None)
    metadata = Metadata(
        state_dict_metadata={"x": TensorStorageMetadata(properties, size, [chunk])},
        storage_data={MetadataIndex("x", torch.Size([0])): info},
    )
    for name, value in changes.items():
        setattr(metadata, name, value)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def test_what_dcp_saves_comes_back(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "b": torch.ones(2).bfloat16()}
    save_plain(state, tmp_path / "plain")
    plain = read_plain(tmp_path / "plain")
    assert plain.items() == ["model", "optimizer", "b", "step"] or set(plain.items()) == set(state)
    assert plain.forms["model.weight"] == (torch.float32, (2, 3))
    found = plain.tree()
    assert torch.equal(found["model"]["weight"], model.weight)
    assert torch.equal(found["optimizer"]["state"]["0"]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    [group] = found["optimizer"]["param_groups"]
    assert (group["lr"], group["betas"], group["params"]) == (0.5, (0.9, 0.999), [0, 1])
    assert (found["step"], found["b"].dtype) == (7, torch.bfloat16)
    assert plain.tree("step") == 7


def test_our_own_steps_are_read_as_plain_dcp_without_their_manifest(tmp_path: Path) -> None:
    tied = torch.rand(3)
    with rankwise.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"net": {"a": tied, "b": tied, "list": [torch.ones(2), {"n": 1}]}, "step": 1})
        (manager.path(1) / "manifest.json").unlink()
        found = read_plain(manager.path(1)).tree()
    assert torch.equal(found["net"]["a"], tied)
    assert torch.equal(found["net"]["b"], tied)
    assert found["net"]["list"][0].tolist() == [1.0, 1.0]
    assert (found["net"]["list"][1], found["step"]) == ({"n": 1}, 1)


def test_a_tensor_in_several_parts_is_put_together(tmp_path: Path) -> None:
    parts = {0: torch.tensor([[0.0, 1.0], [2.0, 3.0]]), 2: torch.tensor([[4.0, 5.0]])}
    boxes, storage, start = [], {}, 0
    with open(tmp_path / "__0_0.distcp", "wb") as file:
        for row, part in parts.items():
            torch.save(part, file)
            boxes.append(ChunkStorageMetadata(torch.Size([row, 0]), part.shape))
            storage[MetadataIndex("x", torch.Size([row, 0]))] = _StorageInfo(
                file.name[-12:], start, file.tell() - start
            )
            start = file.tell()
    kind = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([3, 2]), boxes)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"x": kind}, storage_data=storage)))
    assert read_plain(tmp_path).tree() == {"x": pytest.approx(torch.arange(6.0).reshape(3, 2))}


@pytest.mark.parametrize("place", ["whole", "planner_data", "storage_meta", "key"])
def test_code_in_the_metadata_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    harm = Harmful(tmp_path / "harm")
    if place in ("planner_data", "storage_meta"):
        write_metadata(tmp_path / "plain", **{place: harm})
    elif place == "key":
        write_metadata(tmp_path / "plain", state_dict_metadata={harm: BytesStorageMetadata()})
    else:
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / ".metadata").write_bytes(pickle.dumps(harm))
    with pytest.raises(
        CheckpointError, match=r"\.metadata asks for posix.mkdir, .* refused, and nothing of it was run"
    ):
        read_plain(tmp_path / "plain")
    assert not harm.path.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("builtins.eval", "builtins.getattr", "torch.load", "torch.hub.load", "torch.serialization.load"),
        *("torch.distributed.checkpoint.metadata.os.system", "torch.distributed.checkpoint.filesystem.os"),
        *(
            "functools.partial",
            "operator.attrgetter",
            "torch.distributed.checkpoint.metadata.dataclass",
            "pathlib.Path",
        ),
    ],
)
def test_names_beside_those_of_the_records_are_refused(tmp_path: Path, name: str) -> None:
    module, _, member = name.rpartition(".")
    if "os.system" in name:  # the name may have a dot of its own
        module, member = "torch.distributed.checkpoint.metadata", "os.system"
    content = b"\x80\x04" + b"".join(bytes([0x8C, len(text)]) + text.encode() for text in (module, member)) + b"\x93."
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"asks for {module}.{member}"):
        read_plain(tmp_path)


def test_code_in_a_value_is_refused_and_not_run(tmp_path: Path) -> None:
    harm = Harmful(tmp_path / "harm")
    (tmp_path / "plain").mkdir()
    with open(tmp_path / "plain" / "__0_0.distcp", "wb") as file:
        torch.save(harm, file)
        end = file.tell()
    storage = {MetadataIndex("x"): _StorageInfo("__0_0.distcp", 0, end)}
    metadata = Metadata({"x": BytesStorageMetadata()}, storage_data=storage)
    (tmp_path / "plain" / ".metadata").write_bytes(pickle.dumps(metadata))
    plain = read_plain(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"distcp asks for posix.mkdir, .* refused"):
        plain.tree()
    assert not harm.path.exists()


def test_what_a_pickle_does_to_a_record_ends_with_it(tmp_path: Path) -> None:
    # BUILD on the class itself, with a state for its attributes: what plain pickle would let it overwrite.
    text = "torch.distributed.checkpoint.metadata", "Metadata"
    names = b"".join(bytes([0x8C, len(each)]) + each.encode() for each in text) + b"\x93"
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + names + b"N}\x8c\x03fooK\x01s\x86b.")
    with pytest.raises(CheckpointCorruptError, match="cannot be read"):
        read_plain(tmp_path)
    assert not hasattr(Metadata, "foo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "../outside"}, "no name of a file in this directory"),
        ({"file": "/etc/hostname"}, "no name of a file in this directory"),
        ({"file": "gone.distcp"}, "No such file"),
        ({"start": 10**6}, "is too short"),
        ({"start": -1}, "stands where counts are needed"),
        ({"length": 10**9}, "is too short"),
        ({"shape": [3]}, "do not make up its shape"),
        ({"sizes": [1 << 50], "shape": [1 << 50]}, "do not make up its shape"),
        ({"sizes": [-2], "shape": [-2]}, "stands where counts are needed"),
        ({"dtype": "float32"}, "stands where the type of a tensor is needed"),
        ({"state_dict_metadata": {"x": 1}}, "BytesStorageMetadata is needed|int stands where"),
        ({"storage_data": {}}, "it lacks"),
        ({"storage_data": None}, "NoneType"),
        ({"planner_data": {"x": [("a",)]}}, "stands where a key is needed"),
    ],
)
def test_metadata_that_cannot_be_right_is_damaged(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_metadata(tmp_path / "plain", **changes)
    with pytest.raises(CheckpointCorruptError, match=message):
        read_plain(tmp_path / "plain")


@pytest.mark.parametrize("changes", [{"dtype": torch.int32}, {"start": 3}, {"length": 700}])
def test_a_file_that_holds_something_else_is_damaged(tmp_path: Path, changes: dict[str, Any]) -> None:
    if "start" in changes:
        changes = {**changes, "length": 800}
    write_metadata(tmp_path / "plain", **changes)
    with pytest.raises(CheckpointCorruptError, match=r"__0_0\.distcp (holds something else|cannot be read)"):
        read_plain(tmp_path / "plain").tensor("x")


def test_transformed_files_are_refused(tmp_path: Path) -> None:
    write_metadata(tmp_path / "plain", transforms=["zstd"])
    with pytest.raises(CheckpointError, match="is compressed, or otherwise transformed"):
        read_plain(tmp_path / "plain")


@pytest.mark.parametrize("content", [b"", b"x", b"\x80\x04.", b"\x80\x04N.", b"\x80\x05]" * 100, b"(" * 10000])
def test_bytes_that_are_no_metadata_are_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=r"\.metadata cannot be read"):
        read_plain(tmp_path)


def test_a_folder_without_metadata_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"has no \.metadata"):
        read_plain(tmp_path)
