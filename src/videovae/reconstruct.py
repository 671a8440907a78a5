"""A video through the autoencoder and back, and the weights that do it."""

from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from rankwise.checkpoint import CheckpointManager
from videovae.data.video import VideoInfo, check_writable, iter_frames, probe, to_model_range, to_pixels, write_video
from videovae.errors import DataError, WeightsError
from videovae.models.folder import holds_weights
from videovae.models.pretrained import load
from videovae.models.wfvae import WFVAEModel
from videovae.models.wfvae_config import WFVAEConfig
from videovae.quality import psnr
from videovae.resume import find_checkpoint

MAX_PIXELS = 400 * 320 * 180
"""Most frames x height x width that are taken: the whole video and its reconstruction are held in memory."""
UNTILED_BYTES = 6 * 2**30
BYTES_PER_CHANNEL = 7
"""Without tiling the activations are held too: this many bytes per pixel and base channel. (Measured 6.5: 400 frames of
320x180 with 32 base channels take 5.1 GiB in all.)"""

Weights = Literal["ema", "raw"]


def load_model(path: Path, weights: Weights = "ema") -> tuple[WFVAEModel, Path]:
    """The model of a run folder (its newest checkpoint), of one checkpoint, or of an exported folder.

    Args:
        weights: averaged (`ema`) or raw; an exported folder holds only one kind, and gives that.
    Returns:
        The model in eval mode, and the folder that its weights came from.
    Raises:
        ConfigError, WeightsError, CheckpointError: there is none, or it is damaged.
    """
    if not path.exists():
        raise WeightsError(f"{path} does not exist. Give a run folder, one of its checkpoints, or an exported folder.")
    if path.is_file():
        raise WeightsError(f"{path} is a file. Import it first, with `videovae import {path} DIR`, and give DIR.")
    if is_exported(path):
        return load(path).eval(), path
    directory, step = find_checkpoint(path)
    checkpoints = CheckpointManager(directory)
    model = WFVAEModel(WFVAEConfig.from_dict(checkpoints.read("config", step)["model"]))
    model.load_state_dict(checkpoints.read("ema" if weights == "ema" else "vae", step))
    return model.eval(), checkpoints.path(step)


def is_exported(path: Path) -> bool:
    """Whether a folder holds a model in the layout of diffusers."""
    return holds_weights(path)


@torch.no_grad()
def reconstruct(model: WFVAEModel, source: Path, target: Path) -> float:
    """Encode a video of any size, decode it, and write that as H.264 with the same size and mean frame rate.

    Frames are padded to what the model can halve, and the reconstruction is cropped back. Sound is left out.

    Returns:
        PSNR of the reconstruction in dB, over the whole video and before it is compressed again.
    Raises:
        DataError: the video cannot be decoded, or is longer than fits into memory for now.
    """
    check_writable(target)
    if not source.is_file():
        raise DataError(f"{source} is no file. Give a video.")
    if target.exists() and target.samefile(source):
        raise DataError(f"{target} is the video itself. Give another name for the reconstruction.")
    info = probe(source)
    _check_length(source, info, model)
    frames = torch.stack([torch.from_numpy(frame) for frame in iter_frames(source)])
    x = to_model_range(rearrange(frames, "t h w c -> 1 c t h w"))
    if model.config.norm_type == "layernorm":
        model.enable_tiling()
    padded = _pad(x, model)
    recon = model.decode(model.encode(padded).latent_dist.mode()).sample
    recon = recon[:, :, : x.shape[2], : x.shape[3], : x.shape[4]].clamp(-1, 1)
    write_video(target, rearrange(to_pixels(recon[0]), "c t h w -> t h w c").numpy(), fps=info.fps)
    return psnr(recon, x, data_range=2.0).item()


def _check_length(source: Path, info: VideoInfo, model: WFVAEModel) -> None:
    most, reason = MAX_PIXELS, "the whole video is held in memory"
    if model.config.norm_type == "groupnorm":
        most = min(most, UNTILED_BYTES // (BYTES_PER_CHANNEL * model.config.base_channels))
        reason = "a model with group norm takes the whole video at once"
    num_pixels = info.num_frames * info.height * info.width
    if num_pixels > most:
        raise DataError(
            f"{source} has {info.num_frames} frames of {info.width}x{info.height}, and {reason}: for now at most "
            f"{most // (info.height * info.width)} frames of that size are taken. Cut the video into shorter ones."
        )


def _pad(x: Float[Tensor, "b c t h w"], model: WFVAEModel) -> Float[Tensor, "b c t2 h2 w2"]:
    """Repeat the last row, column and frame until the model's factors divide the size."""
    t, h, w = x.shape[2:]
    missing_h, missing_w = -h % model.spatial_factor, -w % model.spatial_factor
    missing_t = -(t - 1) % model.temporal_factor
    return F.pad(x, (0, missing_w, 0, missing_h, 0, missing_t), mode="replicate")
