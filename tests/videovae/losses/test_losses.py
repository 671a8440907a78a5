"""The loss as a whole: its settings, and every number of the published one's recorded steps."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import videovae.losses
from videovae.errors import ConfigError
from videovae.losses import (
    LossConfig,
    adaptive_weight,
    discriminator_loss,
    generator_adversarial_loss,
    reconstruction_terms,
)
from videovae.models.discriminator import DiscriminatorConfig, NLayerDiscriminator3D
from videovae.models.wfvae import WFVAEModel

GENERATOR, DISCRIMINATOR = 0, 1


class Golden(NamedTuple):
    record: dict[str, Any]
    tensors: dict[str, Tensor]
    vae: WFVAEModel
    discriminator: NLayerDiscriminator3D
    config: LossConfig


def load_recipe(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Golden:
    folder = shared_dir / "golden"
    record = json.loads((folder / "losses_l1_hinge.json").read_text())
    recipe = load_recipe(folder / "recipe.py")

    def fill(module: nn.Module, seed: int) -> None:
        for name, parameter in module.named_parameters():
            parameter.data.copy_(recipe.recipe_tensor(name, tuple(parameter.shape), seed))

    vae = WFVAEModel.from_config(record["vae_config"])
    fill(vae, record["vae_weights"]["recipe_seed"])
    sizes, args = record["disc"]["args"], record["loss_args"]
    discriminator = NLayerDiscriminator3D(
        DiscriminatorConfig(sizes["input_nc"], base_channels=sizes["ndf"], num_layers=sizes["n_layers"])
    )
    fill(discriminator, record["disc"]["recipe_seed"])
    config = LossConfig(
        loss_type=args["loss_type"],
        logvar=args["logvar_init"],
        kl_weight=args["kl_weight"],
        perceptual_weight=args["perceptual_weight"],
        disc_start=args["disc_start"],
        disc_weight=args["disc_weight"],
    )
    return Golden(record, load_file(folder / "losses_l1_hinge.safetensors"), vae, discriminator, config)


def recorded(golden: Golden, optimizer: int, step: int) -> dict[str, Any]:
    (found,) = (s for s in golden.record["steps"] if (s["optimizer_idx"], s["global_step"]) == (optimizer, step))
    return dict(found)


def gradient_norms(module: nn.Module) -> dict[str, float]:
    return {
        # In float64: over seven million values, a norm in float32 is off by 3e-4.
        name: 0.0 if parameter.grad is None else parameter.grad.double().norm().item()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def assert_same_norms(module: nn.Module, expected: dict[str, float]) -> None:
    norms = gradient_norms(module)
    assert norms.keys() == expected.keys()
    for name, norm in norms.items():
        # The absolute part is for biases without effect (of keys, say), whose gradient is rounding.
        assert norm == pytest.approx(expected[name], rel=5e-5, abs=1e-4), name


def pinned(recon: Tensor, golden: Golden) -> Tensor:
    """The recorded reconstruction with the gradient of ours.

    The two differ by rounding, but the slope of the discriminator's activations jumps at 0: where a few cross
    it, gradients move by 1e-3. Pinned, they agree to 2e-5.
    """
    torch.testing.assert_close(recon, golden.tensors["recon"], rtol=0.0, atol=5e-5)
    return recon + (golden.tensors["recon"] - recon).detach()


@pytest.mark.parametrize("step", [0, 10])
def test_generator_step_agrees_with_reference(golden: Golden, step: int) -> None:
    expected, config = recorded(golden, GENERATOR, step), golden.config
    vae, x = golden.vae, golden.tensors["input"].float()
    vae.zero_grad()
    golden.discriminator.requires_grad_(False)

    posterior = vae.encode(x).latent_dist
    recon = pinned(vae.decode(posterior.mode()).sample, golden)
    terms = reconstruction_terms(recon, x, posterior, None, config)
    loss = terms.nll + config.kl_weight * terms.kl + config.wavelet_weight * terms.wavelet
    weight = adversarial = torch.zeros(())
    if step >= config.disc_start:
        adversarial = generator_adversarial_loss(golden.discriminator(recon))
        nll_grad, adversarial_grad = (
            torch.autograd.grad(term, vae.last_layer, retain_graph=True)[0] for term in (terms.nll, adversarial)
        )
        weight = adaptive_weight(nll_grad, adversarial_grad, config.disc_weight)
        loss = loss + weight * adversarial
    loss.backward()

    log = {name.removeprefix("train/"): value for name, value in expected["log"].items()}
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert terms.nll.item() == pytest.approx(log["nll_loss"], rel=1e-5)
    assert terms.nll.item() == pytest.approx(log["rec_loss"], rel=1e-5)
    assert terms.kl.item() == pytest.approx(log["kl_loss"], rel=1e-5)
    assert terms.wavelet.item() == log["wl_loss"]
    assert weight.item() == pytest.approx(log["d_weight"], rel=1e-4)
    assert adversarial.item() == pytest.approx(log["g_loss"], rel=1e-4)
    assert_same_norms(vae, expected["grad_norm_per_param"])
    assert all(parameter.grad is None for parameter in golden.discriminator.parameters())


@pytest.mark.parametrize("step", [0, 10])
def test_discriminator_step_agrees_with_reference(golden: Golden, step: int) -> None:
    expected, config = recorded(golden, DISCRIMINATOR, step), golden.config
    vae, discriminator, x = golden.vae, golden.discriminator, golden.tensors["input"].float()
    vae.zero_grad()
    discriminator.requires_grad_(True).zero_grad()

    with torch.no_grad():
        recon = pinned(vae.decode(vae.encode(x).latent_dist.mode()).sample, golden)
    logits_real, logits_fake = discriminator(x), discriminator(recon)
    factor = float(step >= config.disc_start)
    loss = factor * discriminator_loss(logits_real, logits_fake, config.disc_loss)
    loss.backward()

    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert logits_real.mean().item() == pytest.approx(expected["log"]["train/logits_real"], rel=1e-4)
    assert logits_fake.mean().item() == pytest.approx(expected["log"]["train/logits_fake"], rel=1e-4)
    assert_same_norms(discriminator, expected["grad_norm_per_param"])
    assert all(parameter.grad is None for parameter in vae.parameters())
    discriminator.zero_grad()


def test_wavelet_term_trains_the_decoder_towards_the_coefficients_of_the_video(golden: Golden) -> None:
    vae, x = golden.vae, golden.tensors["input"].float()
    vae.zero_grad()
    recon, posterior, encoded, decoded = vae(x, sample_posterior=False)
    wavelet = reconstruction_terms(recon, x, posterior, (encoded, decoded), golden.config).wavelet
    expected = sum((a - b).abs().sum().item() for a, b in zip(encoded, decoded, strict=True)) / len(x)
    assert wavelet.item() == pytest.approx(expected, rel=1e-5)
    wavelet.backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in vae.decoder.connect_l1.parameters())
    vae.zero_grad()


def test_perceptual_weight_without_weights_names_the_files() -> None:
    with pytest.raises(ConfigError, match=r"perceptual_weights is not set.*VGG16.*linear heads"):
        LossConfig(perceptual_weight=1.0)


def test_perceptual_weights_without_weight_are_refused() -> None:
    with pytest.raises(ConfigError, match="would not be used: perceptual_weight is 0"):
        LossConfig(perceptual_weights=Path("lpips.pth"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "huber"}, "loss_type='huber' is unknown. Choose l1 or l2"),
        ({"disc_loss": "lsgan"}, "disc_loss='lsgan' is unknown. Choose hinge or vanilla"),
        ({"logvar": float("inf")}, "logvar=inf, but it must be finite"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0, but a weight is finite and at least 0"),
        ({"wavelet_weight": float("nan")}, "wavelet_weight=nan"),
        ({"perceptual_weight": -0.1}, "perceptual_weight=-0.1"),
        ({"disc_weight": float("inf")}, "disc_weight=inf"),
        ({"disc_start": -1}, "disc_start=-1, but a step is at least 0"),
    ],
)
def test_config_refuses_what_has_no_meaning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LossConfig(**settings)


def test_public_names_are_sorted_and_exist() -> None:
    names = videovae.losses.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), name.lower() == name, name))
    assert all(hasattr(videovae.losses, name) for name in names)
