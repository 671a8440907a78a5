from typing import Any

import pytest
import torch
from torch import nn

from videovae.errors import ConfigError
from videovae.optim import OptimizerConfig, build_optimizer, learning_rate, set_learning_rate

COSINE = OptimizerConfig(schedule="cosine", schedule_steps=110, warmup_steps=10, final_fraction=0.1)


def test_constant_rate_never_changes() -> None:
    config = OptimizerConfig()
    assert [learning_rate(step, config, 1e-5) for step in (0, 1, 10**6)] == [1e-5] * 3


def test_warm_up_rises_linearly_to_the_full_rate() -> None:
    config = OptimizerConfig(warmup_steps=4)
    rates = [learning_rate(step, config, 1.0) for step in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_cosine_falls_from_the_full_rate_to_the_final_fraction() -> None:
    assert learning_rate(10, COSINE, 2.0) == pytest.approx(2.0)
    assert learning_rate(60, COSINE, 2.0) == pytest.approx(2.0 * 0.55)
    assert learning_rate(110, COSINE, 2.0) == pytest.approx(0.2)
    rates = [learning_rate(step, COSINE, 2.0) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_cosine_stays_at_its_end() -> None:
    assert learning_rate(10_000, COSINE, 2.0) == learning_rate(110, COSINE, 2.0)


def test_discriminator_takes_the_rate_of_the_vae_unless_it_has_its_own() -> None:
    assert OptimizerConfig(learning_rate=3e-4).discriminator_peak == 3e-4
    assert OptimizerConfig(discriminator_learning_rate=2e-4).discriminator_peak == 2e-4


def test_optimizer_holds_the_trainable_parameters_and_the_settings() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4).requires_grad_(False))
    optimizer = build_optimizer(module, learning_rate=1e-3, weight_decay=0.02, betas=(0.5, 0.9))
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert group["params"] == list(module[0].parameters())
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-3, 0.02, (0.5, 0.9))


def test_optimizer_of_a_frozen_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no trainable parameter"):
        build_optimizer(nn.Linear(1, 1).requires_grad_(False), learning_rate=1.0, weight_decay=0.0, betas=(0.9, 0.9))


def test_set_learning_rate_reaches_every_group() -> None:
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0, but it must be finite and positive"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"discriminator_learning_rate": -1.0}, "discriminator_learning_rate=-1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"discriminator_max_grad_norm": float("nan")}, "discriminator_max_grad_norm=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1, but it must be finite and at least 0"),
        ({"discriminator_weight_decay": float("nan")}, "discriminator_weight_decay=nan"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\), but both must lie in \[0, 1\)"),
        ({"final_fraction": 1.5}, "final_fraction=1.5 is outside"),
        ({"schedule": "linear"}, "schedule='linear' is unknown. Choose constant or cosine"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"schedule_steps": 100}, "schedule_steps=100 would not be used by a constant schedule"),
        ({"schedule": "cosine"}, "schedule_steps=None, but a cosine"),
        ({"schedule": "cosine", "schedule_steps": 5, "warmup_steps": 5}, "after 5 warm-up steps needs more"),
    ],
)
def test_config_refuses_what_contradicts_itself(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**settings)
