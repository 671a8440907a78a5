"""How well the model reconstructs clips that it was not trained on."""

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

import rankwise
from rankwise.files import write_atomic
from videovae.config import TrainConfig
from videovae.data.clips import heldout_clips
from videovae.data.index import VideoEntry
from videovae.data.video import to_model_range, to_pixels, write_video
from videovae.errors import DataError
from videovae.quality import psnr
from videovae.state import TrainState, autocast

logger = rankwise.get_logger(__name__)

SAMPLE_FPS = 8
SHEET_COLUMNS = 6

Share = Sequence[tuple[int, UInt8[Tensor, "c t h w"]]]
"""This rank's held-out clips, each with its number among all."""


def heldout_share(videos: Sequence[VideoEntry], config: TrainConfig, identity: rankwise.Identity) -> Share:
    """This rank's part of the held-out clips, decoded: clip number i belongs to rank i modulo the world size.

    A clip that cannot be decoded is left out, and named in the log.

    Ranks: local.
    """
    clips = heldout_clips(videos, config.clips)
    share = []
    for number in range(identity.rank, len(clips), identity.world_size):
        try:
            share.append((number, clips[number].read()))
        except DataError as error:
            logger.warning(f"held-out clip {number} is left out: {error}")
    return share


@torch.no_grad()
def evaluate(
    state: TrainState, heldout: Share, config: TrainConfig, device: torch.device
) -> tuple[dict[str, float], UInt8[Tensor, "t height width c"] | None]:
    """Mean PSNR over the held-out clips of all ranks, with the raw and with the averaged weights.

    Returns:
        The measures by name, equal on every rank and empty where no clip is held out; and, on the rank that has the
        first clip, this one above its reconstruction with the averaged weights.
    Ranks: every rank must call.
    """
    raw = [_score(state, clip, config, device) for _, clip in heldout]
    frames = None
    with state.ema.applied_to(state.vae):
        averaged = [_score(state, clip, config, device) for _, clip in heldout]
        if heldout and heldout[0][0] == 0:
            frames = _side_by_side(state, heldout[0][1], config, device, axis="h")
    rows = [row for rows in rankwise.gather_objects(list(zip(raw, averaged, strict=True))) for row in rows]
    if not rows:
        return {}, None
    psnr_db, psnr_ema_db = (fmean(values) for values in zip(*rows, strict=True))
    return {"heldout/psnr_db": psnr_db, "heldout/psnr_ema_db": psnr_ema_db}, frames


@torch.no_grad()
def save_samples(state: TrainState, heldout: Share, config: TrainConfig, device: torch.device) -> tuple[Path, Path]:
    """Write the first held-out clip beside its reconstruction: a video, and a PNG sheet of frames.

    Ranks: main process only.
    Raises:
        DataError, OSError: the run folder cannot be written; no half file is left.
    """
    with state.ema.applied_to(state.vae):
        frames = _side_by_side(state, heldout[0][1], config, device, axis="w")
    folder = config.run_dir / "samples"
    folder.mkdir(exist_ok=True)
    video, sheet = (folder / f"step-{state.step:08d}{suffix}" for suffix in (".mp4", ".png"))
    write_video(video, frames.numpy(), fps=SAMPLE_FPS)
    num_columns = min(SHEET_COLUMNS, len(frames))
    chosen = torch.linspace(0, len(frames) - 1, num_columns).round().long()
    tiles = rearrange(frames[chosen], "t h (two w) c -> (two h) (t w) c", two=2)
    picture = io.BytesIO()
    Image.fromarray(tiles.numpy()).save(picture, "png")
    write_atomic(sheet, picture.getvalue())
    return video, sheet


def _reconstruct(
    state: TrainState, clip: UInt8[Tensor, "c t h w"], config: TrainConfig, device: torch.device
) -> tuple[Float[Tensor, "1 c t h w"], Float[Tensor, "1 c t h w"]]:
    x = to_model_range(clip[None].to(device))
    state.vae.eval()
    try:
        with autocast(device, config.precision):
            recon = state.vae(x, sample_posterior=False).recon
    finally:
        state.vae.train()
    return x, recon.float().clamp(-1, 1)


def _score(state: TrainState, clip: UInt8[Tensor, "c t h w"], config: TrainConfig, device: torch.device) -> float:
    x, recon = _reconstruct(state, clip, config, device)
    return psnr(recon, x, data_range=2.0).item()


def _side_by_side(
    state: TrainState, clip: UInt8[Tensor, "c t h w"], config: TrainConfig, device: torch.device, axis: str
) -> UInt8[Tensor, "t height width c"]:
    """The clip and its reconstruction, joined along one axis of the frame."""
    _, recon = _reconstruct(state, clip, config, device)
    both = torch.cat([clip, to_pixels(recon[0]).cpu()], dim="cthw".index(axis))
    return rearrange(both, "c t h w -> t h w c").contiguous()
