"""The settings of a WF-VAE, under their published names (one of which is misspelt)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

from videovae.errors import ConfigError
from videovae.models.blocks import NUM_GROUPS

# Block and wavelet on the way down, block and wavelet on the way up. The second wavelet level takes either
# set, the third the second set only.
SPACE = ("Downsample", "HaarWaveletTransform2D", "Upsample", "InverseHaarWaveletTransform2D")
SPACE_AND_TIME = (
    "Spatial2xTime2x3DDownsample",
    "HaarWaveletTransform3D",
    "Spatial2xTime2x3DUpsample",
    "InverseHaarWaveletTransform3D",
)


@dataclass(frozen=True)
class WFVAEConfig:
    """The settings of a WF-VAE."""

    latent_dim: int = 8
    """Channels of the latents."""
    base_channels: int = 128
    """Channels at the highest resolution; two and four times as many at the lower ones."""
    encoder_num_resblocks: int = 2
    """Residual blocks per resolution of the encoder."""
    encoder_energy_flow_hidden_size: int = 64
    """Channels into which the encoder takes the sub-bands of each wavelet level."""
    decoder_num_resblocks: int = 2
    """Residual blocks per resolution of the decoder."""
    decoder_energy_flow_hidden_size: int = 128
    """Channels from which the decoder predicts the sub-bands of each wavelet level."""
    attention_type: str = "AttnBlock3DFix"
    """The attention block; there is one."""
    use_attention: bool = True
    """Whether the lowest resolution has an attention block."""
    dropout: float = 0.0
    """Share of the features that training drops in each residual block."""
    norm_type: str = "groupnorm"
    """"groupnorm" (statistics over all frames, so neither causal nor tileable) or "layernorm"."""
    t_interpolation: str = "nearest"
    """How frames are doubled in time: "nearest" or "trilinear"."""
    connect_res_layer_num: int = 1
    """Residual blocks before each prediction of sub-bands."""
    scale: tuple[float, ...] = (0.18215,)
    """What latents are multiplied by for diffusion, one value per channel; equal values of any number fit any
    `latent_dim` (published 16-channel folders carry four). Encoding and decoding do not use it."""
    shift: tuple[float, ...] = (0.0,)
    """What is subtracted from latents before scaling; written like `scale`."""
    l1_dowmsample_block: str = "Downsample"
    """How the encoder leaves its highest resolution: "Downsample", or "Spatial2xTime2x3DDownsample", which
    halves time too and makes `temporal_factor` 8."""
    l1_downsample_wavelet: str = "HaarWaveletTransform2D"
    """Second wavelet level: "HaarWaveletTransform2D", or "...3D" if that block halves time."""
    l2_dowmsample_block: str = "Spatial2xTime2x3DDownsample"
    """How the encoder reaches its lowest resolution; there is one way."""
    l2_downsample_wavelet: str = "HaarWaveletTransform3D"
    """Third wavelet level; there is one."""
    l1_upsample_block: str = "Upsample"
    """The decoder's counterpart of `l1_dowmsample_block`: "Upsample" or "Spatial2xTime2x3DUpsample"."""
    l1_upsample_wavelet: str = "InverseHaarWaveletTransform2D"
    """The inverse of `l1_downsample_wavelet`."""
    l2_upsample_block: str = "Spatial2xTime2x3DUpsample"
    """The decoder's counterpart of `l2_dowmsample_block`."""
    l2_upsample_wavelet: str = "InverseHaarWaveletTransform3D"
    """The inverse of `l2_downsample_wavelet`."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choices()
        self._check_levels()
        for name in ("scale", "shift"):
            object.__setattr__(self, name, self._per_channel(name))

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "WFVAEConfig":
        """The settings in a published `config.json`; its bookkeeping, keys that begin with "_", is ignored.

        Raises:
            ConfigError: an unknown key, a value of another type, or settings that contradict each other.
        """
        defaults: dict[str, Any] = {field.name: field.default for field in fields(cls)}
        settings = {key: value for key, value in values.items() if not key.startswith("_")}
        if unknown := sorted(settings.keys() - defaults.keys()):
            raise ConfigError(f"unknown settings {unknown} for a WF-VAE. It knows {sorted(defaults)}.")
        return cls(**{key: _as_type_of(defaults[key], key, value) for key, value in settings.items()})

    def to_dict(self) -> dict[str, object]:
        """The settings as `from_dict` reads them, tuples as lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @property
    def halves_time_at_l1(self) -> bool:
        """Whether the second wavelet level halves time as well as space."""
        return self.l1_dowmsample_block == SPACE_AND_TIME[0]

    @property
    def temporal_factor(self) -> int:
        """Video frames per latent frame, after the first."""
        return 8 if self.halves_time_at_l1 else 4

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, along height and along width."""
        return 8

    def _check_numbers(self) -> None:
        least = {
            "latent_dim": 1,
            "base_channels": 1,
            "encoder_num_resblocks": 0,
            "encoder_energy_flow_hidden_size": 1,
            "decoder_num_resblocks": 1,
            "decoder_energy_flow_hidden_size": 1,
            "connect_res_layer_num": 0,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {smallest}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout={self.dropout} must be in [0, 1).")

    def _check_choices(self) -> None:
        choices = {
            "attention_type": ("AttnBlock3DFix",),
            "norm_type": ("groupnorm", "layernorm"),
            "t_interpolation": ("nearest", "trilinear"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown. Choose one of {list(known)}.")
        if self.norm_type == "groupnorm":
            for name in (
                "base_channels",
                "encoder_energy_flow_hidden_size",
                "decoder_energy_flow_hidden_size",
            ):
                if getattr(self, name) % NUM_GROUPS:
                    raise ConfigError(
                        f"{name}={getattr(self, name)} is not divisible into the {NUM_GROUPS} groups of "
                        f"norm_type='groupnorm'. Choose a multiple of {NUM_GROUPS}, or norm_type='layernorm'."
                    )

    def _check_levels(self) -> None:
        for level, known in (("l1", (SPACE, SPACE_AND_TIME)), ("l2", (SPACE_AND_TIME,))):
            names = [
                f"{level}_dowmsample_block",
                f"{level}_downsample_wavelet",
                f"{level}_upsample_block",
                f"{level}_upsample_wavelet",
            ]
            seen = tuple(getattr(self, name) for name in names)
            if seen not in known:
                sets = " or ".join(", ".join(choice) for choice in known)
                raise ConfigError(
                    f"{', '.join(names)} are {', '.join(map(str, seen))}, which do not fit together. Choose {sets}."
                )

    def _per_channel(self, name: str) -> tuple[float, ...]:
        values: tuple[float, ...] = getattr(self, name)
        if len(values) == self.latent_dim:
            return values
        if len(set(values)) == 1:
            return values[:1] * self.latent_dim
        raise ConfigError(
            f"{name} has {len(values)} values for latent_dim={self.latent_dim} channels. "
            f"Give one for each channel, or equal ones."
        )


def _as_type_of(default: Any, name: str, value: object) -> Any:
    """`value` in the type that a field has, whose default is `default`."""
    if isinstance(default, tuple):
        if isinstance(value, list | tuple) and all(_is_number(item) for item in value):
            return tuple(float(item) for item in value)
        needed = "a list of numbers"
    elif isinstance(default, float):
        if _is_number(value):
            return float(value)
        needed = "a number"
    else:
        if type(value) is type(default):
            return value
        needed = type(default).__name__
    raise ConfigError(f"{name}={value!r} must be {needed}.")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
