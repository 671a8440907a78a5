"""Files of `torch.save`, whole, damaged and hostile."""

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from videovae.errors import WeightsError
from videovae.models.pickled import plain_tensors, read_pickled

SAVED = {"weight": torch.arange(6.0).reshape(2, 3), "step": 7}


class Hostile:
    """Makes a pickle that runs a shell command when it is loaded in the ordinary way."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved.ckpt"
    torch.save(SAVED, path)
    return path


def repack(path: Path, compression: int = zipfile.ZIP_STORED, **changes: bytes) -> None:
    """Write the archive anew, with other contents for the entries that end so."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, changes.get(name.rpartition("/")[2].replace(".", "_"), content))


def test_what_was_saved_is_read(saved: Path) -> None:
    read = read_pickled(saved)
    assert isinstance(read, dict)
    assert torch.equal(read["weight"], SAVED["weight"])
    assert read["step"] == 7


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(SAVED, tmp_path / "saved.ckpt")
    finally:
        torch.serialization.set_crc32_options(before)
    read = read_pickled(tmp_path / "saved.ckpt")
    assert isinstance(read, dict)
    assert torch.equal(read["weight"], SAVED["weight"])


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "was-run", tmp_path / "hostile.ckpt"
    torch.save({"state_dict": {}, "extra": Hostile(f"touch {mark}")}, path)
    with pytest.raises(WeightsError, match=r"hostile.ckpt asks for (posix|os).system.* nothing of it was run"):
        read_pickled(path)
    assert not mark.exists()
    # The file is what it is said to be: loaded in the ordinary way, it does run.
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_no_variable_of_the_environment_lets_code_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "was-run", tmp_path / "hostile.ckpt"
    torch.save({"extra": Hostile(f"touch {mark}")}, path)
    script = "import pathlib, sys, videovae.models.pickled as it; it.read_pickled(pathlib.Path(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        env=os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert "nothing of it was run" in result.stderr
    assert not mark.exists()


def test_a_bare_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "was-run", tmp_path / "hostile.ckpt"
    path.write_bytes(pickle.dumps(Hostile(f"touch {mark}")))
    with pytest.raises(WeightsError, match=r"is no file that torch\.save wrote since PyTorch 1\.6"):
        read_pickled(path)
    assert not mark.exists()


def test_a_file_of_an_old_torch_is_refused(tmp_path: Path) -> None:
    torch.save(SAVED, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"is no file that torch\.save wrote since PyTorch 1\.6"):
        read_pickled(tmp_path / "old.ckpt")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_told(share: float, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    torch.save({"weight": torch.randn(1000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsError, match=r"saved\.ckpt is cut off or damaged"):
        read_pickled(path)


def test_a_flipped_bit_in_a_weight_is_told(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    torch.save({"weight": torch.full((1000,), 1.5)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((9,), 1.5).numpy().tobytes()) + 400] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"is cut off or damaged \(Bad CRC-32"):
        read_pickled(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not weights at all", "is no file that torch.save wrote"),
        (b"PK\x03\x04 and no more", "is cut off or damaged"),
    ],
)
def test_what_is_no_checkpoint_is_told(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.ckpt").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_pickled(tmp_path / "file.ckpt")


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.ckpt", tmp_path):
        with pytest.raises(WeightsError, match=f"cannot read {path}"):
            read_pickled(path)


def test_a_zip_archive_of_something_else_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match=r"is a zip archive, but none of torch\.save"):
        read_pickled(tmp_path / "file.ckpt")


def test_a_torchscript_program_is_refused(saved: Path) -> None:
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("saved/constants.pkl", b"")
    with pytest.raises(WeightsError, match="is a TorchScript program"):
        read_pickled(saved)


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(saved: Path) -> None:
    repack(saved, zipfile.ZIP_DEFLATED, data_pkl=bytes(10_000_000))
    assert saved.stat().st_size < 100_000
    with pytest.raises(WeightsError, match=r"is compressed, which torch\.save never does"):
        read_pickled(saved)


def test_an_archive_that_claims_more_than_the_file_holds_is_refused(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # the last one in the table of contents
    for offset in (20, 24):  # compressed and whole size
        content[entry + offset : entry + offset + 4] = (2**31).to_bytes(4, "little")
    saved.write_bytes(content)
    with pytest.raises(WeightsError, match=r"claims to hold 2147\d+"):
        read_pickled(saved)


def test_a_weight_of_a_petabyte_in_a_small_file_is_refused(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        program = archive.read("saved/data.pkl")
    # Where the sizes of the storage (6) and of the tensor (2, 3) stand as small numbers, 2**50 comes for 6 and 2.
    petabyte = b"\x8a\x07" + (2**50).to_bytes(7, "little")
    assert program.count(b"K\x06") == program.count(b"K\x02K\x03") == 1
    shape = program.replace(b"K\x02K\x03", petabyte + b"K\x03")
    both = shape.replace(b"K\x06", petabyte)
    for hostile in (shape, both):
        repack(saved, data_pkl=hostile)
        with pytest.raises(WeightsError, match="is damaged, or no checkpoint: RuntimeError"):
            read_pickled(saved)


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02h\x07.",
        b"garbage",
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x07" + (2**50).to_bytes(7, "little") + b"\x85R.",
    ],
)
def test_a_broken_program_is_told(program: bytes, saved: Path) -> None:
    repack(saved, data_pkl=program)
    with pytest.raises(WeightsError, match=r"saved\.ckpt is damaged, or no checkpoint: [^\n]+$"):
        read_pickled(saved)


def test_plain_tensors_are_passed_on() -> None:
    values = {"a": torch.ones(2), "b": nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
    tensors = plain_tensors(values, origin="x.ckpt")
    assert tensors.keys() == values.keys()
    assert not tensors["b"].requires_grad


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "x.ckpt holds a: int; names and tensors alone"),
        (torch.arange(3), "a is of torch.int64"),
        (torch.ones(2, dtype=torch.complex64), "a is of torch.complex64"),
        (torch.eye(3).to_sparse(), "a is sparse or quantized"),
        (torch.empty(10**6, 10**6, device="meta"), "a is on the device meta"),
        (torch.ones(1).expand(10**9, 10**6), r"a is said to be \(1000000000, 1000000\), but the file holds fewer"),
    ],
)
def test_what_no_weight_is_like_is_refused(value: object, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        plain_tensors({"a": value}, origin="x.ckpt")


def test_a_name_that_is_no_string_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"x\.ckpt holds 3: Tensor"):
        plain_tensors({3: torch.ones(1)}, origin="x.ckpt")
