"""What `torch.save` wrote, read so that nothing in it is executed.

Such a file is a program for the pickle machine, written by whoever made the file. `torch.load(weights_only=True)` runs
the part of the language that builds containers and tensors, and refuses all else. What is checked here first is the zip
archive around it.
"""

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from videovae.errors import WeightsError

ZIP_START = b"PK\x03\x04"
CHUNK_BYTES = 2**22


def read_pickled(path: Path) -> object:
    """The object in a file of `torch.save`, on the CPU; its tensors are read from the disk when they are used.

    Raises:
        WeightsError: the file cannot be read, is cut off or damaged, holds code, or is no file of `torch.save`.
    Ranks: local.
    """
    try:
        _check_archive(path)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd files torch warns in paragraphs; they fail, or they are whole
            return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise WeightsError(_refusal(path, str(error))) from None
    except Exception as error:  # the bytes decide what fails in there: any of a dozen types
        raise WeightsError(
            f"{path} is damaged, or no checkpoint: {type(error).__name__}: {_first_line(str(error))}"
        ) from error


def plain_tensors(values: Mapping[object, object], *, origin: str) -> dict[str, Tensor]:
    """The same as names and dense real tensors, and a refusal where something else is among them.

    Raises:
        WeightsError: a name is no string; a value is no tensor, or not one that weights are.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{origin} holds {_shown(name)}: {type(value).__name__}; names and tensors alone were expected."
            )
        if fault := _fault(value):
            raise WeightsError(f"{origin}: {_shown(name)} is {fault}; weights are dense real numbers.")
        tensors[name] = value.detach()
    return tensors


def _fault(tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "sparse or quantized"
    if tensor.device.type != "cpu":
        return f"on the device {tensor.device}, without values"
    if not tensor.is_floating_point():
        return f"of {tensor.dtype}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"said to be {tuple(tensor.shape)}, but the file holds fewer values"
    return None


def _check_archive(path: Path) -> None:
    """Refuse what is no whole zip archive of `torch.save`.

    Archives carry a checksum of every entry, which `torch.load` does not compare.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(ZIP_START))
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if fault := _archive_fault(entries, num_bytes):
                raise WeightsError(f"{path} {fault}")
            for entry in entries:
                # torch writes 0 where its checksums are switched off.
                if entry.CRC:
                    _check_entry(archive, entry)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if num_bytes == 0:
            fault = "is empty."
        elif start == ZIP_START:
            fault = f"is cut off or damaged ({_first_line(str(error))}). Copy it again."
        else:
            fault = (
                "is no file that torch.save wrote since PyTorch 1.6. Give a checkpoint; one that is older has to be "
                "loaded and saved once by a newer PyTorch."
            )
        raise WeightsError(f"{path} {fault}") from error


def _archive_fault(entries: list[zipfile.ZipInfo], num_bytes: int) -> str | None:
    names = [entry.filename.partition("/")[2] for entry in entries]
    if "constants.pkl" in names:
        return "is a TorchScript program. Give a checkpoint or a state dict."
    if "data.pkl" not in names:
        return "is a zip archive, but none of torch.save. Give a checkpoint or a state dict."
    # Few compressed bytes can unpack to more than fits into memory.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "is compressed, which torch.save never does. Save it anew with torch.save."
    claimed = sum(entry.file_size for entry in entries)
    if claimed > num_bytes:
        return f"has {num_bytes} bytes and claims to hold {claimed}. It is damaged or made to do harm."
    return None


def _check_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    with archive.open(entry) as file:
        while file.read(CHUNK_BYTES):
            pass  # the last read raises BadZipFile where the checksum is another


def _refusal(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL (\S+) (?:was not|whose module)", message)
    if found is None:
        return f"{path} is damaged, or no checkpoint: {_first_line(message.rpartition('error: ')[2])}"
    return (
        f"{path} asks for {found[1]}, which weights do not need: it may run code, so it is refused, and "
        "nothing of it was run. If you trust it, save its state dict alone with torch.save, and give that."
    )


def _shown(name: object) -> str:
    text = str(name)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _first_line(text: str) -> str:
    lines = text.strip().splitlines() or ["no reason given"]
    return _shown(lines[0])
