"""WF-VAE, the published network: weights interchange with Open-Sora-Plan's `WFVAEModel`.

Three wavelet levels carry the low frequencies of a clip past the convolutions ("energy flow"): on the way
in, each level's sub-bands join the features of that resolution; on the way out, each level's predicted
sub-bands are put together and added to the low band of the level above.

Source: Li et al. 2024, "WF-VAE: Enhancing Video VAE by Wavelet-Driven Energy Flow for Latent Video Diffusion
Model".
"""

from collections.abc import Mapping
from os import PathLike
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from videovae.errors import ConfigError
from videovae.models.blocks import (
    AttnBlock3DFix,
    Downsample,
    ResnetBlock2D,
    ResnetBlock3D,
    Spatial2xTime2x3DDownsample,
    Spatial2xTime2x3DUpsample,
    Upsample,
    build_norm,
)
from videovae.models.causal_conv import Carry, CausalConv3d, CausalSequential, Conv2d, in_chunks, keep_pace
from videovae.models.folder import write_folder
from videovae.models.posterior import DiagonalGaussian
from videovae.models.wavelet import (
    HaarWaveletTransform2D,
    HaarWaveletTransform3D,
    InverseHaarWaveletTransform2D,
    InverseHaarWaveletTransform3D,
)
from videovae.models.wfvae_config import WFVAEConfig

VIDEO_CHANNELS = 3
# Sub-bands of the video's three channels: eight at the first and third level, four or eight at the second.
BANDS_3D_CHANNELS = 8 * VIDEO_CHANNELS
BANDS_2D_CHANNELS = 4 * VIDEO_CHANNELS
# Latent frames per chunk when tiling, as published.
TILE_LATENT_FRAMES = 2

Coefficients = tuple[Tensor, Tensor]
"""Sub-bands of the second and of the third wavelet level."""


class EncoderOutput(NamedTuple):
    """What `encode` gives."""

    latent_dist: DiagonalGaussian
    coefficients: Coefficients | None
    """Of the input video, for the wavelet loss; None in tiled mode."""


class DecoderOutput(NamedTuple):
    """What `decode` gives."""

    sample: Tensor
    coefficients: Coefficients | None
    """As predicted from the latents, for the wavelet loss; None in tiled mode."""


class WFVAEOutput(NamedTuple):
    """What `forward` gives; DDP finds every tensor in it."""

    recon: Tensor
    posterior: DiagonalGaussian
    encoder_coefficients: Coefficients | None
    decoder_coefficients: Coefficients | None


class Encoder(nn.Module):
    """Video to the parameters of the posterior."""

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        base, flow = config.base_channels, config.encoder_energy_flow_hidden_size
        num_blocks, norm, drop = config.encoder_num_resblocks, config.norm_type, config.dropout

        def resnet(in_channels: int, out_channels: int) -> ResnetBlock3D:
            return ResnetBlock3D(in_channels, out_channels, norm_type=norm, dropout=drop)

        self.down1 = CausalSequential(
            Conv2d(BANDS_3D_CHANNELS, base, 3, padding=1),
            *(ResnetBlock2D(base, norm_type=norm, dropout=drop) for _ in range(num_blocks)),
            Spatial2xTime2x3DDownsample(base) if config.halves_time_at_l1 else Downsample(base),
        )
        self.down2 = CausalSequential(
            Conv2d(base + flow, 2 * base, 3, padding=1),
            *(resnet(2 * base, 2 * base) for _ in range(num_blocks)),
            Spatial2xTime2x3DDownsample(2 * base),
        )
        l1_channels = BANDS_3D_CHANNELS if config.halves_time_at_l1 else BANDS_2D_CHANNELS
        self.connect_l1 = Conv2d(l1_channels, flow, 3, padding=1)
        self.connect_l2 = Conv2d(BANDS_3D_CHANNELS, flow, 3, padding=1)
        self.mid = CausalSequential(
            resnet(2 * base + flow, 4 * base),
            *([AttnBlock3DFix(4 * base, norm_type=norm)] if config.use_attention else []),
            resnet(4 * base, 4 * base),
        )
        self.norm_out = build_norm(4 * base, norm)
        self.conv_out = CausalConv3d(4 * base, 2 * config.latent_dim, 3, padding=1)
        self.wavelet_transform_in = HaarWaveletTransform3D()
        self.wavelet_transform_l1 = HaarWaveletTransform3D() if config.halves_time_at_l1 else HaarWaveletTransform2D()
        self.wavelet_transform_l2 = HaarWaveletTransform3D()

    def forward(
        self, x: Float[Tensor, "b c t h w"], carry: Carry | None = None
    ) -> tuple[Float[Tensor, "b moments s y x"], Coefficients]:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        coeffs = self.wavelet_transform_in(x, carry)
        l1_coeffs = self.wavelet_transform_l1(coeffs[:, :VIDEO_CHANNELS], carry)
        l2_coeffs = self.wavelet_transform_l2(l1_coeffs[:, :VIDEO_CHANNELS], carry)

        h = self.down1(coeffs, carry)
        h = self.down2(torch.cat([h, self.connect_l1(l1_coeffs)], dim=1), carry)
        h = self.mid(torch.cat([h, self.connect_l2(l2_coeffs)], dim=1), carry)
        moments = self.conv_out(F.silu(self.norm_out(h)), carry)
        return moments, (l1_coeffs, l2_coeffs)


class Decoder(nn.Module):
    """Latents to video."""

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        base, flow = config.base_channels, config.decoder_energy_flow_hidden_size
        num_blocks = config.decoder_num_resblocks

        def resnet(in_channels: int, out_channels: int) -> ResnetBlock3D:
            return ResnetBlock3D(in_channels, out_channels, norm_type=config.norm_type, dropout=config.dropout)

        def connect(bands_channels: int) -> CausalSequential:
            return CausalSequential(
                *(resnet(flow, flow) for _ in range(config.connect_res_layer_num)),
                Conv2d(flow, bands_channels, 3, padding=1),
            )

        attention = AttnBlock3DFix(4 * base, norm_type=config.norm_type) if config.use_attention else None
        self.energy_flow_hidden_size = flow
        self.conv_in = CausalConv3d(config.latent_dim, 4 * base, 3, padding=1)
        self.mid = CausalSequential(
            resnet(4 * base, 4 * base),
            *([] if attention is None else [attention]),
            resnet(4 * base, 4 * base + flow),
        )
        self.up2 = CausalSequential(
            *(resnet(4 * base, 4 * base) for _ in range(num_blocks)),
            Spatial2xTime2x3DUpsample(4 * base, config.t_interpolation),
            resnet(4 * base, 4 * base + flow),
        )
        self.up1 = CausalSequential(
            *(resnet((4 if index == 0 else 2) * base, 2 * base) for index in range(num_blocks)),
            # The published network interpolates here linearly whatever `t_interpolation` says.
            Spatial2xTime2x3DUpsample(2 * base, "trilinear") if config.halves_time_at_l1 else Upsample(2 * base),
            resnet(2 * base, 2 * base),
        )
        self.layer = CausalSequential(resnet(2 * base, base), resnet(base, base))
        self.connect_l1 = connect(BANDS_3D_CHANNELS if config.halves_time_at_l1 else BANDS_2D_CHANNELS)
        self.connect_l2 = connect(BANDS_3D_CHANNELS)
        self.norm_out = build_norm(base, config.norm_type)
        self.conv_out = Conv2d(base, BANDS_3D_CHANNELS, 3, padding=1)
        self.inverse_wavelet_transform_out = InverseHaarWaveletTransform3D()
        self.inverse_wavelet_transform_l1 = (
            InverseHaarWaveletTransform3D() if config.halves_time_at_l1 else InverseHaarWaveletTransform2D()
        )
        self.inverse_wavelet_transform_l2 = InverseHaarWaveletTransform3D()

    def forward(
        self, z: Float[Tensor, "b c t h w"], carry: Carry | None = None
    ) -> tuple[Float[Tensor, "b v s y x"], Coefficients]:
        flow = self.energy_flow_hidden_size
        z = z.contiguous(memory_format=torch.channels_last_3d)

        h = self.mid(self.conv_in(z, carry), carry)
        l2_coeffs = self.connect_l2(h[:, -flow:], carry)
        h = self.up2(h[:, :-flow], carry)
        l1_coeffs = self.connect_l1(h[:, -flow:], carry)
        l1_coeffs = add_low_band(l1_coeffs, l2_coeffs, self.inverse_wavelet_transform_l2, carry)
        h = self.up1(h[:, :-flow], carry)
        h = self.conv_out(F.silu(self.norm_out(self.layer(h, carry))))
        coeffs = add_low_band(h, l1_coeffs, self.inverse_wavelet_transform_l1, carry)
        return self.inverse_wavelet_transform_out(coeffs, carry), (l1_coeffs, l2_coeffs)


def add_low_band(
    coeffs: Float[Tensor, "b c t h w"],
    deeper: Float[Tensor, "b d s y x"],
    inverse: nn.Module,
    carry: Carry | None,
) -> Float[Tensor, "b c t h w"]:
    """`coeffs` with the clip that the `deeper` level's sub-bands make added to its low band."""
    low = keep_pace(inverse(deeper, carry), coeffs.shape[2], inverse, carry)
    return torch.cat([coeffs[:, :VIDEO_CHANNELS] + low, coeffs[:, VIDEO_CHANNELS:]], dim=1)


class WFVAEModel(nn.Module):
    """A causal video VAE: clips of 1 + k * `temporal_factor` frames to 1 + k latent frames, and back.

    Pixels are in [-1, 1]; heights and widths are multiples of `spatial_factor`. A single frame is an image.
    """

    def __init__(self, config: WFVAEConfig | None = None) -> None:
        super().__init__()
        self.config = WFVAEConfig() if config is None else config
        self.use_tiling = False
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    @classmethod
    def from_config(cls, values: Mapping[str, object]) -> "WFVAEModel":
        """A model with random weights, from the contents of a published `config.json`."""
        return cls(WFVAEConfig.from_dict(values))

    @property
    def temporal_factor(self) -> int:
        """Video frames per latent frame, after the first."""
        return self.config.temporal_factor

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, along height and along width."""
        return self.config.spatial_factor

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the reconstruction and the adversarial loss."""
        return self.decoder.conv_out.weight

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Work through clips in chunks of time from now on: the same results, in less memory for long clips.

        Raises:
            ConfigError: the model has group norm, whose statistics span all frames of a clip.
        """
        if use_tiling and self.config.norm_type == "groupnorm":
            raise ConfigError(
                "norm_type='groupnorm' takes its statistics over all frames of a clip, so tiling in time "
                "would change the results. Tile a model with norm_type='layernorm', or give this one "
                "shorter clips."
            )
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Work on whole clips from now on."""
        self.use_tiling = False

    def encode(self, x: Float[Tensor, "b c t h w"]) -> EncoderOutput:
        """The posterior of a video's latents.

        Raises:
            ConfigError: the video's channels, frames, height or width are none that the model takes.
        """
        self._check_video(x)
        if not self.use_tiling:
            moments, coefficients = self.encoder(x)
            return EncoderOutput(DiagonalGaussian(moments.contiguous()), coefficients)
        sizes = _chunk_sizes(x.shape[2], TILE_LATENT_FRAMES * self.temporal_factor)
        moments = in_chunks(lambda chunk, carry: self.encoder(chunk, carry)[0], x, sizes)
        return EncoderOutput(DiagonalGaussian(moments.contiguous()), None)

    def decode(self, z: Float[Tensor, "b c t h w"]) -> DecoderOutput:
        """The video that latents stand for.

        Raises:
            ConfigError: the latents do not have the model's channels.
        """
        if z.ndim != 5 or z.shape[1] != self.config.latent_dim or 0 in z.shape:
            raise ConfigError(
                f"latents of shape {tuple(z.shape)}; this model decodes (b, {self.config.latent_dim}, t, h, w)."
            )
        if not self.use_tiling:
            video, coefficients = self.decoder(z)
            return DecoderOutput(video.contiguous(), coefficients)
        sizes = _chunk_sizes(z.shape[2], TILE_LATENT_FRAMES)
        video = in_chunks(lambda chunk, carry: self.decoder(chunk, carry)[0], z, sizes)
        return DecoderOutput(video.contiguous(), None)

    def forward(
        self,
        x: Float[Tensor, "b c t h w"],
        sample_posterior: bool = True,
        generator: torch.Generator | None = None,
    ) -> WFVAEOutput:
        """Encode, draw latents (or take the most likely ones), decode.

        Ranks: local; the draws of two ranks differ only if their generators do.
        """
        posterior, encoder_coefficients = self.encode(x)
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        recon, decoder_coefficients = self.decode(z)
        return WFVAEOutput(recon, posterior, encoder_coefficients, decoder_coefficients)

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write `config.json` and the weights in diffusers' layout, into a new or empty folder.

        Raises:
            WeightsError: the folder holds something, or cannot be written.
        Ranks: main process only.
        """
        write_folder(directory, type(self).__name__, self.config.to_dict(), self.state_dict())

    def _check_video(self, x: Tensor) -> None:
        if x.ndim != 5 or x.shape[1] != VIDEO_CHANNELS or 0 in x.shape:
            raise ConfigError(f"video of shape {tuple(x.shape)}; this model encodes (b, {VIDEO_CHANNELS}, t, h, w).")
        num_frames, height, width = x.shape[2:]
        if num_frames % self.temporal_factor != 1:
            raise ConfigError(
                f"{num_frames} frames; this model takes 1 + a multiple of {self.temporal_factor}. "
                f"Cut the clip, or repeat its last frame."
            )
        if height % self.spatial_factor or width % self.spatial_factor:
            raise ConfigError(
                f"frames of {height} x {width} pixels; this model takes heights and widths divisible by "
                f"{self.spatial_factor}. Crop or pad the clip."
            )


def _chunk_sizes(num_frames: int, step: int) -> list[int]:
    """1 + `step` frames first, then `step` at a time, and what remains."""
    first = min(num_frames, 1 + step)
    num_whole, remainder = divmod(num_frames - first, step)
    return [first] + [step] * num_whole + [remainder] * (remainder > 0)
