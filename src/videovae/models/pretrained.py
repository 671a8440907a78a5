"""Models from folders in diffusers' layout, and back."""

from collections.abc import Mapping
from os import PathLike

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
            `diffusion_pytorch_model.safetensors`, or several such files and their index.
    Raises:
        WeightsError: a file is missing or broken, or the weights are not the ones that the config needs.
    Ranks: local.
    """
    config = read_config(directory)
    check_class(config, origin=str(directory))
    return assemble(config, read_weights(directory), origin=str(directory))


def check_class(config: Mapping[str, object], *, origin: str) -> type[WFVAEModel]:
    """The class that a published config is of.

    Raises:
        WeightsError: it is none that is known.
    """
    name = config.get("_class_name")
    model_class = MODELS.get(str(name))
    if model_class is None:
        hint = "" if name else " A run folder has to be exported first: `videovae export`."
        raise WeightsError(f"{origin} holds a {name!r}; known models are {sorted(MODELS)}.{hint}")
    return model_class


def assemble(config: Mapping[str, object], weights: dict[str, Tensor], *, origin: str) -> WFVAEModel:
    """The model of a published config with these weights, in float32 on the CPU, in evaluation mode.

    Raises:
        WeightsError: the config is not one of a known model, or the weights are not the ones that it needs.
    Ranks: local.
    """
    model = build_empty(config, weights, origin=origin)
    check_weights(weights, model.state_dict(), origin=origin)
    model.to_empty(device="cpu").load_state_dict(weights)
    return model.eval()


def build_empty(config: Mapping[str, object], weights: Mapping[str, Tensor], *, origin: str) -> WFVAEModel:
    """The model of a published config, without values (on the meta device).

    Raises:
        WeightsError: the config is not one of a known model, or is larger than the weights by far.
    Ranks: local.
    """
    model_class = check_class(config, origin=origin)
    _check_claims(config, weights, origin=origin)
    try:
        with torch.device("meta"):  # no time and no random numbers for weights that are replaced at once
            return model_class.from_config(config)
    except (ConfigError, OverflowError, RuntimeError) as error:  # RuntimeError: sizes past 64 bits
        raise WeightsError(f"{origin}: {error}") from error


def _check_claims(config: Mapping[str, object], weights: Mapping[str, Tensor], *, origin: str) -> None:
    """Refuse numbers of layers and channels that would take hours or all memory to find out to be wrong."""
    most_values = max((tensor.numel() for tensor in weights.values()), default=0)
    for name, value in config.items():
        if not isinstance(value, int):
            continue
        most, what = (len(weights), "tensors") if "num" in name else (most_values, "values in the largest tensor")
        if value > max(most, 1):
            raise WeightsError(f"{origin}: {name} is {value}, but the weights have only {most} {what}.")


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
