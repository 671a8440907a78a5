"""A run small enough to be repeated: tiny networks on tiny clips."""

from pathlib import Path

import pytest

from videovae.config import TrainConfig
from videovae.data.clips import ClipsConfig
from videovae.data.synthetic import make_clips
from videovae.losses import LossConfig
from videovae.models.discriminator import DiscriminatorConfig
from videovae.models.wfvae_config import WFVAEConfig
from videovae.optim import OptimizerConfig


@pytest.fixture(scope="session")
def clips_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of 24 frames."""
    folder = tmp_path_factory.mktemp("clips")
    make_clips(folder, num_clips=5, num_frames=24, height=32, width=40, seed=1)
    return folder


@pytest.fixture
def tiny(tmp_path: Path, clips_dir: Path) -> TrainConfig:
    """Forty steps of a second or two in all, with the adversarial loss on from step 4."""
    return TrainConfig(
        run_dir=tmp_path / "run",
        data=clips_dir,
        num_steps=40,
        log_every=5,
        eval_every=20,
        save_every=20,
        precision="fp32",
        ema_decay=0.9,
        timeout_seconds=30.0,
        model=WFVAEConfig(
            latent_dim=4,
            base_channels=4,
            encoder_num_resblocks=1,
            encoder_energy_flow_hidden_size=4,
            decoder_num_resblocks=1,
            decoder_energy_flow_hidden_size=4,
            norm_type="layernorm",
            t_interpolation="trilinear",
        ),
        discriminator=DiscriminatorConfig(base_channels=4, num_layers=2),
        loss=LossConfig(disc_start=4),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=3, schedule="cosine", schedule_steps=50),
        clips=ClipsConfig(num_frames=5, height=16, width=16, num_workers=0, num_heldout_clips=3),
    )
