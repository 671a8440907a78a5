"""The networks, as published, and the folders that they come in."""

from videovae.models.posterior import DiagonalGaussian
from videovae.models.pretrained import load, save_pretrained
from videovae.models.wfvae import DecoderOutput, EncoderOutput, WFVAEModel, WFVAEOutput
from videovae.models.wfvae_config import WFVAEConfig

__all__ = [
    "DecoderOutput",
    "DiagonalGaussian",
    "EncoderOutput",
    "WFVAEConfig",
    "WFVAEModel",
    "WFVAEOutput",
    "load",
    "save_pretrained",
]
