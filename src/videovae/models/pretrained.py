"""Models from folders in diffusers' layout, and back."""

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from videovae.errors import ConfigError, WeightsError
from videovae.models.folder import read_config, read_weights
from videovae.models.wfvae import WFVAEModel

MODELS = {"WFVAEModel": WFVAEModel}


def load(directory: str | PathLike[str]) -> WFVAEModel:
    """The model in a folder, in float32 on the CPU, in evaluation mode.

    Args:
        directory: holds `config.json`, whose `_class_name` says which model, and
            `diffusion_pytorch_model.safetensors`.
    Raises:
        WeightsError: a file is missing or broken, or the weights are not the ones that the config needs.
    Ranks: local.
    """
    config = read_config(directory)
    model_class = MODELS.get(str(config.get("_class_name")))
    if model_class is None:
        found = config.get("_class_name")
        hint = "" if found else " A run folder has to be exported first: `videovae export`."
        raise WeightsError(f"{Path(directory)} holds a {found!r}; known models are {sorted(MODELS)}.{hint}")
    try:
        with torch.device("meta"):  # no time and no random numbers for weights that are replaced at once
            model = model_class.from_config(config)
    except ConfigError as error:
        raise WeightsError(f"{Path(directory)}: {error}") from error
    weights = read_weights(directory)
    check_weights(weights, model.state_dict(), origin=str(directory))
    model.to_empty(device="cpu").load_state_dict(weights)
    return model.eval()


def check_weights(weights: dict[str, Tensor], needed: dict[str, Tensor], *, origin: str) -> None:
    """Check that names and shapes are the ones needed.

    Raises:
        WeightsError: they are not; it names the first few.
    """
    missing = sorted(needed.keys() - weights.keys())
    extra = sorted(weights.keys() - needed.keys())
    other_shape = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in needed.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    faults = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        for kind, names in (("missing", missing), ("unknown", extra), ("of another shape", other_shape))
        if names
    ]
    if faults:
        raise WeightsError(f"the weights in {origin} are not those of its config: {'; '.join(faults)}.")


def save_pretrained(model: WFVAEModel, directory: str | PathLike[str]) -> None:
    """Write a model as `load` reads it; see `WFVAEModel.save_pretrained`.

    Ranks: main process only.
    """
    model.save_pretrained(directory)
