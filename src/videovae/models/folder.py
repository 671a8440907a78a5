"""A model's folder in diffusers' layout: `config.json` beside `diffusion_pytorch_model.safetensors`.

Large models come in several such files, and an index that says which tensor is in which. Knows files only, no model.
"""

import json
import os
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from videovae.errors import WeightsError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
# The release whose file format this is; published folders carry it.
DIFFUSERS_VERSION = "0.30.3"


def write_folder(
    directory: str | PathLike[str],
    class_name: str,
    settings: Mapping[str, object],
    weights: Mapping[str, Tensor],
) -> None:
    """Write a model into a new or empty folder; `config.json` comes last: where it is, the weights are whole.

    Raises:
        WeightsError: the folder holds something, or cannot be written.
    Ranks: main process only.
    """
    folder = Path(directory)
    config = {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION, **settings}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise WeightsError(f"{folder} is not empty. Give a new or an empty folder.")
        # As bytes, because `save_file` makes a file that only its owner may read.
        weights_file = safetensors.torch.save(tensors, metadata={"format": "pt"})
        config_file = (json.dumps(config, indent=2) + "\n").encode()
        _write_files(folder, {WEIGHTS_NAME: weights_file, CONFIG_NAME: config_file})
    except OSError as error:
        raise WeightsError(f"cannot write the model to {folder}: {error.strerror or error}") from error


def holds_weights(directory: str | PathLike[str]) -> bool:
    """Whether a folder holds safetensors files that `read_weights` finds."""
    return any((Path(directory) / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME))


def read_config(directory: str | PathLike[str]) -> dict[str, object]:
    """The contents of a model folder's `config.json`.

    Raises:
        WeightsError: there is no such file, or it holds something else than one JSON object.
    """
    return read_json_object(
        Path(directory) / CONFIG_NAME, hint=f" A model folder holds {CONFIG_NAME} and {WEIGHTS_NAME}."
    )


def read_json_object(path: Path, *, hint: str = "") -> dict[str, object]:
    """The JSON object in a file.

    Raises:
        WeightsError: there is no such file, or it holds something else; `hint` follows where there is none.
    """
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}.{hint}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds a {type(values).__name__}; a JSON object was expected.")
    return values


def read_weights(directory: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a model folder, by name, of one file or of several with an index.

    Raises:
        WeightsError: there is no weights file, or it is broken, or the index does not fit the files.
    """
    folder = Path(directory)
    if (folder / WEIGHTS_NAME).exists() or not (folder / INDEX_NAME).exists():
        return read_safetensors(folder / WEIGHTS_NAME)
    return read_shards(folder / INDEX_NAME, read_safetensors)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by name.

    Raises:
        WeightsError: it is missing or broken.
    """
    try:
        return safetensors.torch.load_file(path)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError) as error:  # KeyError: a type of numbers that torch lacks
        raise WeightsError(f"{path} is cut off or no safetensors file: {error}") from error


def read_shards(index: Path, read_file: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all files that an index names.

    Args:
        index: JSON with a `weight_map` from each tensor's name to the file beside the index that holds it.
        read_file: reads one of them.
    Raises:
        WeightsError: the index is broken, a file is, or a tensor is not where the index says.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no weight_map from the names of tensors to files.")
    weights: dict[str, Tensor] = {}
    for file_name in sorted({str(file_name) for file_name in weight_map.values()}):
        if file_name in ("", ".", "..") or Path(file_name).name != file_name or "\0" in file_name:
            raise WeightsError(f"{index} names the file {file_name!r}; all files have to be in its own folder.")
        shard = read_file(index.parent / file_name)
        wanted = {name for name, home in weight_map.items() if home == file_name}
        if odd := sorted(wanted ^ shard.keys()):
            where = "is not in it" if odd[0] in wanted else "is in it"
            raise WeightsError(
                f"{index.parent / file_name} differs from {index.name} in {len(odd)} tensors: {odd[0]} {where}."
            )
        weights |= shard
    return weights


def _write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files that get their names, in this order, when all of them are whole on the disk."""
    partials = {folder / f"{name}.partial": content for name, content in contents.items()}
    try:
        for path, content in partials.items():
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in partials:
            path.rename(path.with_suffix(""))
    except BaseException:
        for path in partials:
            path.unlink(missing_ok=True)
        raise
    _sync(folder)


def _sync(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
