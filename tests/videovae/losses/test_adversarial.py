import pytest
import torch

from videovae.losses.adversarial import (
    adaptive_weight,
    discriminator_hinge_loss,
    discriminator_loss,
    discriminator_vanilla_loss,
    generator_adversarial_loss,
    is_discriminator_step,
)
from videovae.models.discriminator import DiscriminatorConfig, NLayerDiscriminator3D

REAL = torch.tensor([2.0, 0.5, -1.0])
FAKE = torch.tensor([-3.0, 0.0, 1.0])


def test_hinge_loss_counts_only_patches_inside_the_margin() -> None:
    expected = 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)
    assert discriminator_hinge_loss(REAL, FAKE).item() == pytest.approx(expected)


def test_vanilla_loss_is_the_cross_entropy() -> None:
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = 0.5 * (entropy(REAL, torch.ones(3)) + entropy(FAKE, torch.zeros(3)))
    assert discriminator_vanilla_loss(REAL, FAKE).item() == pytest.approx(expected.item())


def test_kind_chooses_the_loss() -> None:
    assert discriminator_loss(REAL, FAKE, "hinge") == discriminator_hinge_loss(REAL, FAKE)
    assert discriminator_loss(REAL, FAKE, "vanilla") == discriminator_vanilla_loss(REAL, FAKE)


def test_generator_loss_falls_as_fakes_look_real() -> None:
    assert generator_adversarial_loss(torch.tensor([1.0, 3.0])).item() == -2.0


def test_losses_of_half_precision_logits_are_float32() -> None:
    for loss in (discriminator_hinge_loss, discriminator_vanilla_loss):
        assert loss(REAL.bfloat16(), FAKE.bfloat16()).dtype == torch.float32
    assert generator_adversarial_loss(FAKE.bfloat16()).dtype == torch.float32


def test_adaptive_weight_is_the_ratio_of_gradient_lengths() -> None:
    weight = adaptive_weight(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]), 0.5)
    assert weight.item() == pytest.approx(0.5 * 5 / 2.0001)


def test_adaptive_weight_is_clamped_before_it_is_scaled() -> None:
    assert adaptive_weight(torch.tensor([1e9]), torch.tensor([0.0]), 0.5).item() == 0.5e4


def test_adaptive_weight_carries_no_gradient() -> None:
    gradient = torch.ones(2, requires_grad=True)
    assert not adaptive_weight(gradient * 2, gradient, 0.5).requires_grad


@pytest.mark.parametrize(("disc_start", "expected"), [(0, [1, 3, 5]), (2, [3, 5]), (3, [3, 5]), (9, [])])
def test_odd_steps_from_disc_start_train_the_discriminator(disc_start: int, expected: list[int]) -> None:
    assert [step for step in range(7) if is_discriminator_step(step, disc_start)] == expected


def small_game() -> tuple[torch.nn.Module, NLayerDiscriminator3D, torch.Tensor]:
    torch.manual_seed(0)
    generator = torch.nn.Conv3d(3, 3, 1)
    discriminator = NLayerDiscriminator3D(DiscriminatorConfig(base_channels=2, num_layers=2))
    return generator, discriminator, torch.randn(2, 3, 5, 8, 8)


def test_discriminator_step_gives_the_generator_no_gradient() -> None:
    generator, discriminator, x = small_game()
    discriminator_hinge_loss(discriminator(x), discriminator(generator(x).detach())).backward()
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_generator_step_gives_the_frozen_discriminator_no_gradient() -> None:
    generator, discriminator, x = small_game()
    discriminator.requires_grad_(False)
    generator_adversarial_loss(discriminator(generator(x))).backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert all(parameter.grad is not None and parameter.grad.count_nonzero() for parameter in generator.parameters())
