"""What `reconstruct` takes, and what it refuses before any work."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import videovae.reconstruct
from videovae.data.video import VideoInfo
from videovae.errors import DataError
from videovae.models.wfvae import WFVAEModel
from videovae.models.wfvae_config import WFVAEConfig
from videovae.reconstruct import reconstruct

SMALL = WFVAEConfig(
    latent_dim=4,
    base_channels=4,
    encoder_num_resblocks=1,
    encoder_energy_flow_hidden_size=4,
    decoder_num_resblocks=1,
    decoder_energy_flow_hidden_size=4,
    norm_type="layernorm",
)
LONG = VideoInfo(num_frames=400, width=320, height=180, fps=25.0, first_pts=0, last_pts=399)


class Reached(Exception):
    """The video was accepted: its frames are asked for."""


@pytest.mark.parametrize(
    ("norm_type", "base_channels", "num_frames", "is_taken"),
    [
        ("layernorm", 4, 400, True),
        ("layernorm", 4, 401, False),
        ("layernorm", 128, 400, True),
        ("groupnorm", 32, 400, True),
        ("groupnorm", 128, 120, True),
        ("groupnorm", 128, 200, False),
    ],
)
def test_only_videos_that_fit_into_memory_are_taken(
    norm_type: str,
    base_channels: int,
    num_frames: int,
    is_taken: bool,
    clips_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def frames(source: Path) -> None:
        raise Reached("the video is taken")

    config = replace(
        SMALL,
        norm_type=norm_type,
        base_channels=base_channels,
        encoder_energy_flow_hidden_size=32,
        decoder_energy_flow_hidden_size=32,
    )
    with torch.device("meta"):
        model = WFVAEModel(config)
    monkeypatch.setattr(videovae.reconstruct, "probe", lambda source: replace(LONG, num_frames=num_frames))
    monkeypatch.setattr(videovae.reconstruct, "iter_frames", frames)
    expected = Reached if is_taken else DataError
    with pytest.raises(expected, match="the video is taken" if is_taken else r"for now at most \d+ frames"):
        reconstruct(model, clips_dir / "clip-00000.mp4", tmp_path / "out.mp4")


def test_the_video_itself_is_never_overwritten(clips_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "clip.mp4"
    source.write_bytes((clips_dir / "clip-00000.mp4").read_bytes())
    with pytest.raises(DataError, match="is the video itself"):
        reconstruct(WFVAEModel(SMALL), source, tmp_path / "." / "clip.mp4")
    assert source.read_bytes() == (clips_dir / "clip-00000.mp4").read_bytes()


def test_what_cannot_be_written_is_told_before_the_work(clips_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        reconstruct(WFVAEModel(SMALL), clips_dir / "clip-00000.mp4", tmp_path / "nowhere" / "out.mp4")
    assert list(tmp_path.iterdir()) == []
