"""Weights that others trained, as a model folder of this project.

Two kinds of source: folders in the layout of diffusers, and checkpoints of the trainers of Open-Sora-Plan and WF-VAE.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from videovae.errors import WeightsError
from videovae.models.folder import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    holds_weights,
    read_config,
    read_json_object,
    read_safetensors,
    read_shards,
    read_weights,
)
from videovae.models.pickled import plain_tensors, read_pickled
from videovae.models.pretrained import assemble, build_empty, check_class
from videovae.models.wavelet import (
    HaarWaveletTransform2D,
    HaarWaveletTransform3D,
    InverseHaarWaveletTransform2D,
    InverseHaarWaveletTransform3D,
)
from videovae.models.wfvae import WFVAEModel

BIN_NAME = "diffusion_pytorch_model.bin"
BIN_INDEX_NAME = f"{BIN_NAME}.index.json"
CHECKPOINT_SUFFIX = ".ckpt"
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What DDP, `torch.compile`, FSDP and activation checkpointing put into the names of what they wrap."""
WAVELETS = (
    HaarWaveletTransform2D,
    HaarWaveletTransform3D,
    InverseHaarWaveletTransform2D,
    InverseHaarWaveletTransform3D,
)

Kind = Literal["ema", "raw"]
Choice = Literal["auto", "ema", "raw"]


@dataclass(frozen=True)
class Published:
    """Weights as they were found."""

    weights: dict[str, Tensor]
    kind: Kind | None
    """Averaged, or of one step; None where the source does not say."""
    step: int | None = None
    """The training step, where the source says it."""


def import_weights(source: Path, directory: Path, *, weights: Choice = "auto", config: Path | None = None) -> Published:
    """Write published weights into a folder that `videovae` and the models' own code load.

    Args:
        source: a folder in the layout of diffusers, or a checkpoint of the trainers of Open-Sora-Plan and WF-VAE.
        directory: new or empty.
        weights: `auto` takes the averaged weights where there are some.
        config: a `config.json` of the model; without it the one beside the weights.
    Returns:
        What was taken.
    Raises:
        WeightsError: the source is missing, damaged, holds code or another model, or `directory` holds something.
    Ranks: main process only.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise WeightsError(f"{directory} is not empty. Give a new or an empty folder.")
    path = find_weights(source)
    settings = _read_settings(path, config)
    check_class(settings, origin=str(path if config is None else config))
    found = read_published(path, weights)
    model = build_model(settings, found, origin=str(path))
    model.save_pretrained(directory)
    return found


def find_weights(source: Path) -> Path:
    """The file with the weights, or their index, that a path names.

    Raises:
        WeightsError: there is none, or more than one.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise WeightsError(f"{source} does not exist. Give a checkpoint, or a folder in the layout of diffusers.")
    found = [source / name for name in (WEIGHTS_NAME, BIN_NAME) if (source / name).is_file()]
    if not found:
        found = [source / name for name in (INDEX_NAME, BIN_INDEX_NAME) if (source / name).is_file()]
    found += sorted(path for path in source.iterdir() if path.suffix == CHECKPOINT_SUFFIX)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found[:5])
        raise WeightsError(f"{source} holds {len(found)} sets of weights: {names}. Give the path of one of them.")
    hint = " It looks like a run folder: those are exported, with `videovae export`."
    inner = next((each for each in sorted(source.iterdir()) if holds_weights(each)), None)
    if not (source / "checkpoints").is_dir():
        hint = f" Did you mean {inner}?" if inner else ""
    raise WeightsError(f"{source} holds no {WEIGHTS_NAME}, no {BIN_NAME} and no *{CHECKPOINT_SUFFIX}.{hint}")


def read_published(path: Path, weights: Choice = "auto") -> Published:
    """The weights in a file, or in the files of an index, under the names of the model.

    Nothing that the file holds is executed.

    Raises:
        WeightsError: the file is missing or damaged, holds code, or has not the weights that were asked for.
    Ranks: local.
    """
    if path.name == INDEX_NAME:
        found = Published(read_shards(path, read_safetensors), None)
    elif path.name == BIN_INDEX_NAME:
        found = Published(read_shards(path, _read_bin), None)
    elif path.suffix == ".safetensors":
        found = Published(read_weights(path.parent) if path.name == WEIGHTS_NAME else read_safetensors(path), None)
    else:
        found = choose_weights(read_pickled(path), weights, origin=str(path))
    if found.kind is None and weights != "auto":
        raise WeightsError(
            f"{path} holds one set of weights and does not say whether they are averaged. Leave --weights away."
        )
    return found


def choose_weights(saved: object, weights: Choice, *, origin: str) -> Published:
    """The weights of the autoencoder among what a trainer saved.

    An average leaves out what was frozen when it began, so the rest comes from the raw weights.

    Raises:
        WeightsError: there are none, or not the kind that was asked for.
    Source: `save_checkpoint` in Open-Sora-Plan's train_causalvae.py and WF-VAE's train_ddp.py: `state_dict` with
        `gen_model` and `dics_model`, and `ema_state_dict`, which is empty without averaging.
    """
    if not isinstance(saved, Mapping):
        raise WeightsError(f"{origin} holds a {type(saved).__name__}; a checkpoint or a state dict was expected.")
    averaged = _mapping(saved, "ema_state_dict", origin)
    raw = _mapping(saved, "state_dict", origin)
    if "gen_model" in raw:
        raw = _mapping(raw, "gen_model", origin)
    step = saved.get("current_step")
    step = step if isinstance(step, int) else None
    if weights == "ema" and not averaged:
        raise WeightsError(f"{origin} has no averaged weights (ema_state_dict). Give --weights raw, or leave it away.")
    if weights == "raw" and not raw and averaged:
        raise WeightsError(f"{origin} holds averaged weights alone. Give --weights ema, or leave it away.")
    if not raw and not averaged:
        if not all(isinstance(value, Tensor) for value in saved.values()) or not saved:
            keys = ", ".join(sorted(map(str, saved))[:5]) or "none"
            raise WeightsError(f"{origin} is no checkpoint with state_dict or ema_state_dict; its keys are: {keys}.")
        return Published(_bare(saved, origin), None)
    chosen = _bare(raw, origin)
    if averaged and weights != "raw":
        return Published(chosen | _bare(averaged, origin), "ema", step)
    return Published(chosen, "raw", step)


def build_model(settings: Mapping[str, object], found: Published, *, origin: str) -> WFVAEModel:
    """The model with the weights that were found.

    Raises:
        WeightsError: a weight is missing, unknown, of another shape, or not finite.
    Ranks: local.
    """
    empty = build_empty(settings, found.weights, origin=origin)
    # An average leaves the wavelets' kernels out, and may have been saved alone.
    fixed = _wavelet_kernels(empty) if found.kind == "ema" else {}
    model = assemble(settings, fixed | found.weights, origin=origin)
    broken = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(
            f"{origin} has values that are no finite numbers in {len(broken)} tensors, {broken[0]} among them. "
            "It is of a run that diverged, or damaged."
        )
    return model


def _read_settings(path: Path, config: Path | None) -> dict[str, object]:
    if config is not None:
        return read_json_object(config)
    if not (path.parent / CONFIG_NAME).exists():
        raise WeightsError(
            f"no {CONFIG_NAME} is beside {path}, and weights do not say all settings of their model. Give --config "
            "FILE: the one that they were trained with (--model_config), or that of the published model."
        )
    return read_config(path.parent)


def _read_bin(path: Path) -> dict[str, Tensor]:
    return choose_weights(read_pickled(path), "auto", origin=str(path)).weights


def _mapping(saved: Mapping[object, object], key: str, origin: str) -> Mapping[object, object]:
    value = saved.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise WeightsError(f"{origin} holds a {type(value).__name__} under {key}; names and tensors were expected.")
    return value


def _bare(values: Mapping[object, object], origin: str) -> dict[str, Tensor]:
    """Tensors under the names that they have without wrappers."""
    tensors = plain_tensors(values, origin=origin)
    bare = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): tensor for name, tensor in tensors.items()
    }
    if len(bare) != len(tensors):
        raise WeightsError(f"{origin} holds {len(tensors) - len(bare)} weights twice, with and without a prefix.")
    return bare


def _wavelet_kernels(model: WFVAEModel) -> dict[str, Tensor]:
    """The kernels of the wavelets: the same in every model."""
    return {
        f"{prefix}.{name}": kernel
        for prefix, module in model.named_modules()
        if isinstance(module, WAVELETS)
        for name, kernel in type(module)().named_buffers()
    }
