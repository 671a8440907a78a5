"""Steps of the networks: of one kind each, equal on every rank, and over many batches as over one."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import rankwise
from rankwise.testing import on_ranks
from videovae.config import TrainConfig
from videovae.data.index import heldout_ranges
from videovae.losses import is_discriminator_step
from videovae.models.posterior import DiagonalGaussian
from videovae.state import RecentLosses, TrainState, build_state
from videovae.steps import discriminator_step, generator_step, last_layer_gradients, weigh
from videovae.videos import open_videos


def started(config: TrainConfig, session: rankwise.Session) -> TrainState:
    opened = open_videos(config, session)
    assert opened is not None
    return build_state(config, session, opened[0], heldout_ranges(opened[1]))


def clips(num_clips: int) -> Tensor:
    return torch.rand(num_clips, 3, 5, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


@on_ranks(2)
def test_ranks_keep_equal_weights_and_see_different_clips(tiny: TrainConfig) -> None:
    with rankwise.init() as session:
        rankwise.seed_all(0, session.identity)
        state = started(tiny, session)
        noise = rankwise.gather_objects(torch.rand(3).tolist())
        assert noise[0] != noise[1]
        batches = []
        for state.step in range(8):
            x = next(state.loader).video / 127.5 - 1
            batches.append(x)
            step = discriminator_step if is_discriminator_step(state.step, 4) else generator_step
            step([x], state, tiny)
        weights = torch.cat(
            [p.detach().flatten() for net in (state.vae, state.discriminator) for p in net.parameters()]
        )
        everybody = rankwise.gather_objects((weights, torch.stack(batches)))
        assert torch.equal(everybody[0][0], everybody[1][0])
        assert not torch.equal(everybody[0][1], everybody[1][1])


def alone(state: TrainState) -> TrainState:
    """The same networks once more, which reduce nothing."""
    vae, discriminator = copy.deepcopy(state.vae), copy.deepcopy(state.discriminator)
    both = copy.copy(judge(state))
    both._modules = {"discriminator": discriminator}
    return replace(
        state,
        vae=vae,
        parallel_vae=vae,
        discriminator=discriminator,
        parallel_discriminator=both,
        vae_optimizer=torch.optim.SGD(vae.parameters()),
        discriminator_optimizer=torch.optim.SGD(discriminator.parameters()),
        losses=RecentLosses(),
    )


def judge(state: TrainState) -> nn.Module:
    module = state.parallel_discriminator
    return module.module if isinstance(module, DistributedDataParallel) else module


def assert_same_gradients(joined: nn.Module, split: nn.Module) -> None:
    found = dict(split.named_parameters())
    pairs = [(name, p.grad, found[name].grad) for name, p in joined.named_parameters() if p.grad is not None]
    assert len(pairs) > 5
    # Single values may be rounding of what cancels out, so differences are held against the whole gradient.
    whole = torch.stack([gradient.norm() for _, gradient, _ in pairs]).norm()
    assert whole > 0
    for name, gradient, other in pairs:
        assert other is not None, name
        assert (other - gradient).norm() <= 2e-5 * whole, name


def steps_as_one_joined_batch(tiny: TrainConfig, patch: pytest.MonkeyPatch) -> None:
    """Steps of both networks on this rank's batches, and on all ranks' in one batch: the same gradients and losses."""
    # The noise of one large batch is another than that of many small ones, and so are the statistics of batch norms.
    patch.setattr(DiagonalGaussian, "sample", lambda self, generator=None: self.mode())
    with rankwise.init() as session:
        rank, world_size = session.identity.rank, session.identity.world_size
        state = started(tiny, session)
        state.step = 6
        state.discriminator.eval()
        with torch.no_grad():
            for parameter in state.discriminator.parameters():
                parameter *= 5.0  # fresh from its start it says so little that the weight is at its limit
        reductions = count_reductions(state)
        steps = {"vae": generator_step, "discriminator": discriminator_step}
        for num_batches, name in itertools.product((1, 3), steps):
            x = clips(world_size * num_batches)
            mine = [x[first + rank : first + rank + 1] for first in range(0, len(x), world_size)]
            whole = alone(state)
            steps[name]([x], whole, tiny)
            steps[name](mine, state, tiny)
            assert_same_gradients(getattr(whole, name), getattr(state, name))
            ranks = rankwise.gather_objects({key: value.detach() for key, value in state.losses.items()})
            for key, value in whole.losses.items():
                torch.testing.assert_close(torch.stack([losses[key] for losses in ranks]).mean(), value.detach())
        assert {"nll", "kl", "wavelet", "adversarial_weight", "generator", "discriminator"} < set(ranks[0])
        assert 0 < state.losses["adversarial_weight"] < 0.9 * 0.5 * 1e4
        # Only the last backward pass of a step talks to the other ranks.
        assert reductions == (list(steps) * 2 if world_size > 1 else [])


def count_reductions(state: TrainState) -> list[str]:
    """Networks whose gradients were averaged, once for each time that it was begun."""
    begun: list[str] = []
    for name, module in (("vae", state.parallel_vae), ("discriminator", state.parallel_discriminator)):
        if isinstance(module, DistributedDataParallel):

            def note(name: str, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
                if bucket.index() == 0:
                    begun.append(name)
                return allreduce_hook(None, bucket)  # type: ignore[arg-type]

            module.register_comm_hook(name, note)
    return begun


@on_ranks(2)
def test_batches_of_two_ranks_count_as_one_joined_batch(tiny: TrainConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        steps_as_one_joined_batch(tiny, patch)


def test_batches_of_one_process_count_as_one_joined_batch(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_as_one_joined_batch(tiny, monkeypatch)


def test_adversarial_weight_is_that_of_all_batches_together(tiny: TrainConfig) -> None:
    with rankwise.init() as session:
        state = started(tiny, session)
        gradients: Sequence[Tensor] = []
        for x in clips(2).split(1):
            recon = state.vae(x, sample_posterior=False).recon
            losses = ((recon - x).abs().sum(), recon.square().mean())
            gradients = [*gradients, last_layer_gradients(*losses, state)]
        apart = [weigh([pair], tiny) for pair in gradients]
        assert not torch.allclose(apart[0], apart[1])
        nll, adversarial = ((gradients[0] + gradients[1]) / 2).unbind()
        torch.testing.assert_close(weigh(gradients, tiny), 0.5 * nll.norm() / (adversarial.norm() + 1e-4))


def test_weighing_several_batches_beforehand_leaves_no_trace(tiny: TrainConfig) -> None:
    with rankwise.init() as session:
        state = started(tiny, session)
        state.step = 6
        trained = [parameter.requires_grad for parameter in state.vae.parameters()]
        batches = list(clips(2).split(1))
        torch.manual_seed(0)
        for x in batches:
            state.vae(x)
        expected = torch.rand(1)
        torch.manual_seed(0)
        generator_step(batches, state, tiny)
        assert torch.equal(torch.rand(1), expected)
        assert [parameter.requires_grad for parameter in state.vae.parameters()] == trained
        counts = {b.item() for name, b in state.discriminator.named_buffers() if name.endswith("num_batches_tracked")}
        assert counts == {2}


def test_generator_step_leaves_the_discriminator_alone_and_the_other_way_round(tiny: TrainConfig) -> None:
    with rankwise.init() as session:
        state = started(tiny, session)
        state.step = 6
        x = torch.rand(1, 3, 5, 16, 16) * 2 - 1
        before = [p.detach().clone() for p in state.discriminator.parameters()]
        generator_step([x], state, tiny)
        assert all(p.grad is None for p in state.discriminator.parameters())
        assert all(torch.equal(old, new) for old, new in zip(before, state.discriminator.parameters(), strict=True))
        weights, average = [[t.clone() for t in d.values()] for d in (state.vae.state_dict(), state.ema.state_dict())]
        discriminator_step([x], state, tiny)
        assert all(torch.equal(a, b) for a, b in zip(weights, state.vae.state_dict().values(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(average, state.ema.state_dict().values(), strict=True))
        assert not all(torch.equal(old, new) for old, new in zip(before, state.discriminator.parameters(), strict=True))
