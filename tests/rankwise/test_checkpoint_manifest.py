"""What a step says of itself is believed only where it can be true."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.checkpoint import manifest as manifest_module
from rankwise.checkpoint.manifest import (
    MANIFEST,
    Chunk,
    FileRecord,
    Manifest,
    TensorRecord,
    as_bytes,
    checksum,
    decode_tensors,
    encode_manifest,
    encode_tensors,
    read_manifest,
)
from rankwise.errors import CheckpointCorruptError

SOUND = Manifest(
    step=10,
    epoch=3,
    nonce="abc",
    world_size=2,
    shared_items=("net", "step"),
    per_rank_items=("rng",),
    files={"values.json": FileRecord(7, "12"), "__0_0.distcp": FileRecord(900, "34")},
    config_digest="56",
)
FILES = {"__0_0.distcp": FileRecord(100, ""), "__1_0.distcp": FileRecord(100, "")}
RECORDS = {
    "net.weight": TensorRecord(
        torch.float32,
        (4, 2),
        (Chunk((0, 0), (3, 2), "__0_0.distcp", 64, 24, "1"), Chunk((3, 0), (1, 2), "__1_0.distcp", 0, 8, "2")),
    ),
    "net.scale": TensorRecord(torch.bfloat16, (), (Chunk((), (), "__0_0.distcp", 4, 2, "3"),)),
    "net.none": TensorRecord(torch.int64, (0, 5), ()),
}


def write(directory: Path, manifest: Manifest = SOUND) -> Path:
    (directory / MANIFEST).write_bytes(encode_manifest(manifest))
    return directory / MANIFEST


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what stands in a manifest, with a checksum that fits."""
    body = json.loads(path.read_text())
    del body["xxh3"]
    change(body)
    path.write_text(json.dumps({**body, "xxh3": manifest_module._body_checksum(body)}))


def test_manifest_comes_back_with_the_versions_and_the_time_beside_it(tmp_path: Path) -> None:
    write(tmp_path)
    found = read_manifest(tmp_path)
    assert dataclasses.replace(found, saved="", versions=None) == SOUND
    assert found.versions is not None
    assert set(found.versions) == {"rankwise", "torch"}
    assert found.saved.endswith("+00:00")


def test_every_change_of_a_byte_is_found(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole, sound = path.read_bytes(), read_manifest(tmp_path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 7]) + whole[place + 1 :])
        try:
            # White space may change without harm.
            assert read_manifest(tmp_path) == sound
        except CheckpointCorruptError as error:
            assert str(path) in str(error)  # noqa: PT017


def test_missing_manifest_and_one_that_lacks_something_are_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointCorruptError, match=r"manifest.json cannot be read: No such file or directory\.$"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": 2}')
    with pytest.raises(CheckpointCorruptError, match=r"manifest.json cannot be read: it lacks 'xxh3'\.$"):
        read_manifest(tmp_path)


def test_manifest_of_another_format_is_refused_with_both(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(CheckpointCorruptError, match="has format 3, this rankwise reads 2"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"null", b'{"format": 2, "xxh3": 1}', b"\xff\xfe", b"[" * 100_000]
)
def test_what_is_no_manifest_is_told_as_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=r"manifest.json (cannot be read|is damaged)"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *(
            lambda body, name=name: body["files"].update({name: {"bytes": 1, "xxh3": ""}})
            for name in ("../outside", "/dev/zero", "a/b", "..", ".", "")
        ),
        lambda body: body.update(step="10"),
        lambda body: body.update(epoch=None),
        lambda body: body.update(epoch=-1),
        lambda body: body.update(world_size=True),
        lambda body: body.update(files=[1]),
        lambda body: body.update(files={"values.json": [7, "12"]}),
        lambda body: body.update(files={"values.json": {"bytes": "7", "xxh3": "12"}}),
        lambda body: body.update(shared_items=[["net"]]),
        lambda body: body.update(unknown=1),
        lambda body: body.pop("nonce"),
    ],
)
def test_manifest_that_somebody_made_to_mislead_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    forge(write(tmp_path), change)
    with pytest.raises(CheckpointCorruptError, match=r"manifest.json cannot be read"):
        read_manifest(tmp_path)


def test_records_of_tensors_come_back() -> None:
    assert decode_tensors(encode_tensors(RECORDS), FILES) == RECORDS


def changed(**fields: object) -> bytes:
    body = json.loads(encode_tensors({"a": RECORDS["net.weight"]}))
    body["a"].update({name: value for name, value in fields.items() if name in ("dtype", "shape", "chunks")})
    if "chunks" not in fields:
        body["a"]["chunks"][0].update({name: value for name, value in fields.items() if name not in body["a"]})
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(file="../../etc/passwd"), "has no bytes"),
        (changed(file="/dev/zero"), "has no bytes"),
        (changed(file=["__0_0.distcp"]), "where a text is needed"),
        (changed(start=90), "has no bytes 90 to 114"),
        (changed(start=-1), "where a count is needed"),
        (changed(start=0.5), "where a count is needed"),
        (changed(sizes=[10**9, 10**9], num_bytes=4 * 10**18), "lies outside of the shape"),
        (changed(sizes=[3, 2, 1]), "zip"),
        (changed(sizes=[-3, -2]), "where a count is needed"),
        (changed(num_bytes=25), "cannot have 25 bytes"),
        (changed(shape=[10**12, 2]), "do not make up its shape"),
        (changed(shape=[1, 2]), "lies outside of the shape"),
        (changed(shape=[True, 2]), "where a count is needed"),
        (changed(chunks=[]), "do not make up its shape"),
        (changed(dtype="float128"), "float128"),
        (changed(offsets=None), "not iterable"),
        (b"[]", "attribute"),
        (b'{"a": 3}', "subscriptable"),
        (b"{", "Expecting"),
        (json.dumps({n: json.loads(changed())["a"] for n in "ab"}).encode(), "two tensors lie in the same bytes"),
    ],
)
def test_records_that_lead_outside_or_to_absurd_sizes_are_refused(content: bytes, message: str) -> None:
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError), match=message):
        decode_tensors(content, FILES)


def test_bytes_of_a_tensor_are_its_memory_whatever_its_type() -> None:
    for dtype in (torch.bool, torch.bfloat16, torch.complex64, torch.float8_e5m2, torch.uint32):
        tensor = torch.randint(0, 2, (2, 3)).to(dtype)
        assert len(as_bytes(tensor)) == tensor.nbytes
    scalar = torch.tensor(0.0)
    as_bytes(scalar)[3] = 0x40
    assert scalar.item() == 2.0
    assert len(as_bytes(torch.empty(0, 3))) == 0
    assert checksum(as_bytes(scalar)) == checksum(b"\0\0\0\x40")
