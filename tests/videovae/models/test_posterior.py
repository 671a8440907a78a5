import torch

from videovae.models.posterior import DiagonalGaussian


def posterior(mean: float, logvar: float) -> DiagonalGaussian:
    shape = (2, 3, 4, 5, 6)
    return DiagonalGaussian(torch.cat([torch.full(shape, mean), torch.full(shape, logvar)], dim=1))


def test_first_half_of_the_channels_is_the_mean():
    assert torch.equal(posterior(1.5, 0.0).mean, torch.full((2, 3, 4, 5, 6), 1.5))
    assert torch.equal(posterior(1.5, 0.0).mode(), posterior(1.5, 0.0).mean)


def test_logvar_is_clamped():
    assert posterior(0.0, -99.0).logvar.unique().tolist() == [-30.0]
    assert posterior(0.0, 99.0).logvar.unique().tolist() == [20.0]


def test_std_is_the_root_of_var():
    torch.testing.assert_close(posterior(0.0, 1.2).std ** 2, posterior(0.0, 1.2).var)


def test_kl_sums_over_channels_time_and_height():
    assert torch.equal(posterior(0.0, 0.0).kl(), torch.zeros(2, 6))
    torch.testing.assert_close(posterior(2.0, 0.0).kl(), torch.full((2, 6), 0.5 * 4.0 * 3 * 4 * 5))


def test_kl_agrees_with_torch_distributions():
    gaussian = DiagonalGaussian(torch.randn(2, 8, 3, 4, 5))
    ours = torch.distributions.Normal(gaussian.mean, gaussian.std)
    expected = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(gaussian.kl(), expected)


def test_sample_follows_its_generator():
    first, second = (posterior(0.0, 0.0).sample(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(first, posterior(0.0, 0.0).sample(torch.Generator().manual_seed(1)))
    assert not torch.equal(first, second)


def test_sample_without_generator_follows_the_default_one():
    torch.manual_seed(3)
    noise = torch.randn(2, 3, 4, 5, 6)
    torch.manual_seed(3)
    torch.testing.assert_close(posterior(1.0, 2.0).sample(), 1.0 + posterior(1.0, 2.0).std * noise)


def test_gradients_reach_mean_and_variance_through_a_sample():
    parameters = torch.zeros(1, 2, 1, 2, 2, requires_grad=True)
    DiagonalGaussian(parameters).sample().pow(2).sum().backward()
    assert (parameters.grad != 0).all()
