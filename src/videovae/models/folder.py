"""A model's folder in diffusers' layout: `config.json` beside `diffusion_pytorch_model.safetensors`.

Knows files only, no model.
"""

import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from videovae.errors import WeightsError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
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


def read_config(directory: str | PathLike[str]) -> dict[str, object]:
    """The contents of a model folder's `config.json`.

    Raises:
        WeightsError: there is no such file, or it holds something else than one JSON object.
    """
    path = Path(directory) / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise WeightsError(
            f"cannot read {path}: {error.strerror or error}. A model folder holds {CONFIG_NAME} and {WEIGHTS_NAME}."
        ) from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} holds a {type(config).__name__}; a JSON object of settings was expected.")
    return config


def read_weights(directory: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a model folder, by name.

    Raises:
        WeightsError: there is no weights file, or it is broken.
    """
    path = Path(directory) / WEIGHTS_NAME
    try:
        return safetensors.torch.load_file(path)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise WeightsError(f"{path} is cut off or no safetensors file: {error}") from error


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
