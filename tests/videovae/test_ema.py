import pytest
import torch
from torch import Tensor, nn

from videovae.ema import ExponentialAverage
from videovae.errors import ConfigError, WeightsError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4))


def shift(module: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount)


def copy_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def test_average_starts_as_the_weights() -> None:
    module = network()
    ema = ExponentialAverage(module, 0.9)
    assert all(torch.equal(ema.state_dict()[name], t) for name, t in module.state_dict().items())


def test_update_follows_the_published_formula() -> None:
    module = network()
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    ema = ExponentialAverage(module, 0.9)
    for _ in range(3):
        shift(module, 1.0)
        ema.update(module)
        for name, parameter in module.named_parameters():
            expected[name] = 0.9 * expected[name] + (1 - 0.9) * parameter.detach()
    for name, average in expected.items():
        torch.testing.assert_close(ema.state_dict()[name], average)


def test_update_leaves_the_module_alone() -> None:
    module = network()
    ema = ExponentialAverage(module, 0.5)
    shift(module, 1.0)
    before = copy_of(module.state_dict())
    ema.update(module)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_frozen_parameters_are_averaged_too() -> None:
    module = network().requires_grad_(False)
    ema = ExponentialAverage(module, 0.5)
    before = module[0].bias.clone()
    shift(module, 1.0)
    ema.update(module)
    torch.testing.assert_close(ema.state_dict()["0.bias"], before + 0.5)


def test_buffers_are_copied() -> None:
    module = network()
    ema = ExponentialAverage(module, 0.9)
    module(torch.randn(2, 3, 1, 4, 4))
    ema.update(module)
    assert torch.equal(ema.state_dict()["1.running_mean"], module[1].running_mean)
    assert ema.state_dict()["1.num_batches_tracked"].item() == 1


def test_average_of_bfloat16_weights_is_kept_in_float32() -> None:
    module = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(module.weight)
    ema = ExponentialAverage(module, 0.999)
    nn.init.constant_(module.weight, 2.0)
    ema.update(module)
    assert ema.state_dict()["weight"].dtype == torch.float32
    assert ema.state_dict()["weight"].item() == pytest.approx(1.001)
    with ema.applied_to(module):
        assert module.weight.dtype == torch.bfloat16


def test_a_fresh_module_loads_the_average_strictly() -> None:
    module = network()
    ema = ExponentialAverage(module, 0.9)
    shift(module, 1.0)
    ema.update(module)
    other = network()
    other.load_state_dict(ema.state_dict(), strict=True)
    assert all(torch.equal(t, ema.state_dict()[name]) for name, t in other.state_dict().items())


def test_a_restored_average_goes_on_bit_by_bit() -> None:
    module = network()
    ema = ExponentialAverage(module, 0.9)
    shift(module, 1.0)
    ema.update(module)
    restored = ExponentialAverage(network(), 0.9)
    restored.load_state_dict(copy_of(ema.state_dict()))
    shift(module, 1.0)
    for average in (ema, restored):
        average.update(module)
    assert all(torch.equal(restored.state_dict()[name], t) for name, t in ema.state_dict().items())


def test_loading_copies_and_does_not_share() -> None:
    ema, saved = ExponentialAverage(network(), 0.5), copy_of(network().state_dict())
    ema.load_state_dict(saved)
    module = network()
    shift(module, 1.0)
    ema.update(module)
    assert torch.equal(saved["0.bias"], network().state_dict()["0.bias"])


def test_applied_average_is_in_the_module_only_inside() -> None:
    module = network()
    ema = ExponentialAverage(module, 0.5)
    shift(module, 1.0)
    raw = copy_of(module.state_dict())
    with ema.applied_to(module):
        assert all(torch.equal(t, ema.state_dict()[name]) for name, t in module.state_dict().items())
    assert all(torch.equal(t, raw[name]) for name, t in module.state_dict().items())


def test_raw_weights_return_after_an_error_and_the_average_is_unharmed() -> None:
    module = network()
    ema = ExponentialAverage(module, 0.5)
    shift(module, 1.0)
    raw, average = copy_of(module.state_dict()), copy_of(ema.state_dict())

    def spoil() -> None:
        with ema.applied_to(module):
            shift(module, 7.0)
            raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        spoil()
    assert all(torch.equal(t, raw[name]) for name, t in module.state_dict().items())
    assert all(torch.equal(t, average[name]) for name, t in ema.state_dict().items())


def test_applied_average_keeps_the_parameter_objects() -> None:
    module = network()
    before = [(id(p), p.data_ptr()) for p in module.parameters()]
    with ExponentialAverage(module, 0.5).applied_to(module):
        assert [(id(p), p.data_ptr()) for p in module.parameters()] == before


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=f"EMA decay={decay} is outside"):
        ExponentialAverage(network(), decay)


def test_a_wrapped_module_is_refused() -> None:
    ema = ExponentialAverage(network(), 0.5)
    with pytest.raises(WeightsError, match=r"Sequential and the running average differ in 14 names.*bare network"):
        ema.update(nn.Sequential(network()))


def test_a_saved_average_of_another_size_is_refused() -> None:
    ema = ExponentialAverage(network(), 0.5)
    saved = copy_of(ema.state_dict()) | {"0.bias": torch.zeros(5)}
    with pytest.raises(WeightsError, match=r"saved average has 0\.bias of shape \(5,\)"):
        ema.load_state_dict(saved)
