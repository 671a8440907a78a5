import contextlib
import copy
import io
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from rankwise.monitor.clocks import HostClock
from rankwise.monitor.ddp import DdpWaits, find_ddp
from rankwise.monitor.phases import FinishedStep, Timeline
from rankwise.testing import on_ranks, run_on_ranks

LATE_SECONDS = 0.4
WAITED_SECONDS = 0.3
"""What of it must be seen on the rank that waits, and not on the late one."""


@dataclass
class Output:
    """What some libraries give in place of a tensor."""

    logits: Tensor
    name: str = "x"


class Packed(nn.Module):
    """A model with buffers, whose output is packed and partly unused."""

    def __init__(self, packing: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 8))
        self.unused = nn.Linear(4, 4)
        self.packing = packing

    def forward(self, x: Tensor) -> Any:
        y = self.layers(x)
        packed = {
            "tensor": y,
            "dataclass": Output(y),
            "dictionary": {"loss": None, "logits": [y]},
            "object": type("Bare", (), {})(),
        }[self.packing]
        if self.packing == "object":
            packed.logits = y
        return packed


def unpack(output: Any) -> Tensor:
    if isinstance(output, dict):
        output = output["logits"][0]
    found = getattr(output, "logits", output)
    assert isinstance(found, Tensor)
    return found


def make(packing: str = "tensor", **options: Any) -> DistributedDataParallel:
    torch.manual_seed(0)
    model = Packed(packing)
    if not options.get("find_unused_parameters"):
        model.unused = None  # type: ignore[assignment]
    return DistributedDataParallel(model, bucket_cap_mb=0.01, **options)


def train(
    ddp: nn.Module,
    timeline: Timeline,
    num_steps: int = 4,
    late: int | None = None,
    late_in: str = "data",
    sync: Any = contextlib.nullcontext,
) -> list[FinishedStep]:
    """A few steps in which a rank may be late, from the third on: DDP lays out its buckets in the second."""
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())

    def dawdle(phase: str, step: int) -> None:
        if late == dist.get_rank() and late_in == phase and step > 1:
            time.sleep(LATE_SECONDS)

    for step in range(num_steps):
        timeline.enter("data")
        x = torch.randn(16, 32, generator=generator)
        dawdle("data", step)
        timeline.leave("data")
        with sync():
            timeline.enter("forward")
            loss = unpack(ddp(x)).square().mean()
            dawdle("forward", step)
            timeline.leave("forward")
            timeline.enter("backward")
            loss.backward()  # type: ignore[no-untyped-call]
            timeline.leave("backward")
        optimizer.step()
        optimizer.zero_grad()
        timeline.step()
    return timeline.take()


def communication(steps: list[FinishedStep]) -> list[float]:
    return [step.phases.get("communication", 0.0) for step in steps[2:]]


def check_the_one_who_waits(steps: list[FinishedStep], late: int) -> None:
    waited = communication(steps)
    if dist.get_rank() == late:
        assert max(waited) < WAITED_SECONDS, waited
    else:
        assert min(waited) > WAITED_SECONDS, waited


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
@on_ranks(2)
def test_the_rank_that_waits_for_gradients_is_told_from_the_late_one(options: dict[str, Any]) -> None:
    ddp = make(**options)
    timeline = Timeline(HostClock())
    DdpWaits(ddp, timeline)
    # Rank 0 is late after the broadcast of the buffers, so that only the gradients are waited for.
    check_the_one_who_waits(train(ddp, timeline, late=0, late_in="forward"), late=0)


class Checkpointed(nn.Module):
    """A model that computes its layers again in the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.second = nn.Linear(64, 8)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Any:
        # Inputs of the reentrant kind need a gradient, or there is none of what is inside.
        for layer in (self.first, self.second):
            x = checkpoint(layer, x.requires_grad_(), use_reentrant=self.use_reentrant)
        return x


@pytest.mark.parametrize("use_reentrant", [False, True])
@on_ranks(2)
def test_checkpointed_layers_are_measured(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Checkpointed(use_reentrant))
    timeline = Timeline(HostClock())
    DdpWaits(ddp, timeline)
    check_the_one_who_waits(train(ddp, timeline, late=0, late_in="forward"), late=0)


@on_ranks(2)
def test_frozen_parameters_and_other_gradients_are_no_hindrance() -> None:
    """The first are frozen; and gradients that are asked for beside the backward pass change nothing."""
    ddp = make()
    parameters = list(ddp.parameters())
    frozen = copy.deepcopy(ddp.module)
    frozen.layers[0].requires_grad_(False)
    partly = DistributedDataParallel(frozen, bucket_cap_mb=0.01)
    timeline = Timeline(HostClock())
    DdpWaits(partly, timeline)
    check_the_one_who_waits(train(partly, timeline, late=0, late_in="forward"), late=0)

    DdpWaits(ddp, timeline)
    for _ in range(3):  # an armed forward pass, whose gradients are asked for beside the backward pass
        loss = unpack(ddp(torch.randn(16, 32))).square().mean()
        torch.autograd.grad(loss, parameters, retain_graph=True)
        if dist.get_rank() == 0:
            time.sleep(LATE_SECONDS)
        loss.backward()  # type: ignore[no-untyped-call]
        timeline.step()
    check_the_one_who_waits([timeline.take()[-1]] * 3, late=0)


@on_ranks(2)
def test_a_pass_without_reduction_does_not_hide_the_wait_of_one_before() -> None:
    ddp = make()
    timeline = Timeline(HostClock())
    DdpWaits(ddp, timeline)
    for _ in range(3):
        first = unpack(ddp(torch.randn(16, 32))).square().mean()
        with ddp.no_sync():
            second = unpack(ddp(torch.randn(16, 32))).square().mean()
        if dist.get_rank() == 0:
            time.sleep(LATE_SECONDS)
        (first + second).backward()  # type: ignore[no-untyped-call]
        timeline.step()
    check_the_one_who_waits(timeline.take(), late=0)


@on_ranks(2)
def test_the_first_pass_of_a_static_graph_is_measured_too() -> None:
    ddp = make(static_graph=True)
    timeline = Timeline(HostClock())
    DdpWaits(ddp, timeline)
    loss = unpack(ddp(torch.randn(16, 32))).square().mean()
    if dist.get_rank() == 0:
        time.sleep(LATE_SECONDS)
    loss.backward()  # type: ignore[no-untyped-call]
    timeline.step()
    check_the_one_who_waits(timeline.take() * 3, late=0)


@pytest.mark.parametrize("packing", ["dataclass", "dictionary", "object"])
@on_ranks(2)
def test_outputs_that_are_packed_are_found(packing: str) -> None:
    ddp = make(packing)
    timeline = Timeline(HostClock())
    DdpWaits(ddp, timeline)
    check_the_one_who_waits(train(ddp, timeline, late=0, late_in="forward"), late=0)


@on_ranks(2)
def test_the_wait_for_buffers_before_a_forward_pass_is_communication() -> None:
    ddp = make()
    timeline = Timeline(HostClock())
    DdpWaits(ddp, timeline)
    # Rank 0 gives the buffers, so rank 1 waits in its forward pass, and nobody in the backward pass.
    steps = train(ddp, timeline, late=0)
    check_the_one_who_waits(steps, late=0)
    if dist.get_rank() == 1:
        assert max(step.phases["forward"] for step in steps[2:]) < WAITED_SECONDS


@pytest.mark.parametrize("hook", [allreduce_hook, fp16_compress_hook])
@on_ranks(2)
def test_a_hook_of_the_users_own_stays_and_is_measured(hook: Any) -> None:
    ddp = make()
    ddp.register_comm_hook(None, hook)
    timeline = Timeline(HostClock())
    DdpWaits(ddp, timeline)
    check_the_one_who_waits(train(ddp, timeline, late=0, late_in="forward"), late=0)


@on_ranks(2)
def test_without_reduction_nothing_is_waited_for() -> None:
    ddp = make()
    timeline = Timeline(HostClock())
    DdpWaits(ddp, timeline)
    steps = train(ddp, timeline, late=0, late_in="forward", sync=ddp.no_sync)
    assert max(communication(steps)) < WAITED_SECONDS
    assert "communication" not in steps[-1].phases


@on_ranks(2)
def test_accumulated_batches_wait_in_the_last_alone() -> None:
    ddp = make()
    timeline = Timeline(HostClock())
    DdpWaits(ddp, timeline)
    x = torch.randn(16, 32)
    for is_last in (False, True):
        with contextlib.nullcontext() if is_last else ddp.no_sync():
            timeline.enter("forward")
            loss = unpack(ddp(x)).square().mean()
            if dist.get_rank() == 0:
                time.sleep(LATE_SECONDS)
            timeline.leave("forward")
            timeline.enter("backward")
            loss.backward()  # type: ignore[no-untyped-call]
            timeline.leave("backward")
        timeline.step()
    first, last = timeline.take()
    # The buffers come once, at the beginning; rank 1 waits for rank 0's two naps in its second pass.
    assert first.phases["communication"] < WAITED_SECONDS
    assert (last.phases["communication"] > 2 * WAITED_SECONDS) == (dist.get_rank() == 1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_are_the_same_to_the_last_bit(world_size: int) -> None:
    run_on_ranks(compare_gradients, world_size)


def compare_gradients() -> None:
    torch.use_deterministic_algorithms(True)
    every: list[dict[str, Any]] = [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}]
    for options in every:
        parameters = []
        for is_watched in (False, True):
            ddp = make(**options)
            timeline = Timeline(HostClock())
            if is_watched:
                DdpWaits(ddp, timeline)
            train(ddp, timeline)
            parameters.append([parameter.detach().clone() for parameter in ddp.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*parameters, strict=True)), options


@on_ranks(2)
def test_a_gradient_taken_on_the_side_leaves_no_wait_behind() -> None:
    ddp = make()
    timeline = Timeline(HostClock())
    DdpWaits(ddp, timeline)
    for _ in range(3):
        output = unpack(ddp(torch.randn(16, 32)))
        # As for an adaptive weight of a loss: a backward pass that ends before the parameters.
        weight = next(iter(ddp.module.layers[3].parameters()))
        torch.autograd.grad(output.square().mean(), weight, retain_graph=True)
        assert timeline.position().phase is None
        output.mean().backward()  # type: ignore[no-untyped-call]
        assert timeline.position().phase is None
        timeline.step()


@on_ranks(2)
def test_after_a_backward_pass_that_failed_the_next_is_measured() -> None:
    ddp = make()
    timeline = Timeline(HostClock())
    DdpWaits(ddp, timeline)

    def fail(gradient: Tensor) -> None:
        raise KeyError("in the backward pass")

    output = unpack(ddp(torch.randn(16, 32)))
    hidden = output * 2
    output.register_hook(fail)  # type: ignore[no-untyped-call]
    with pytest.raises(KeyError):
        hidden.mean().backward()  # type: ignore[no-untyped-call]
    assert timeline.position().phase is None
    ddp.zero_grad()
    dist.barrier()
    with ddp.no_sync():
        unpack(ddp(torch.randn(16, 32))).mean().backward()  # type: ignore[no-untyped-call]
    assert timeline.position().phase is None


@on_ranks(1)
def test_closing_leaves_the_module_as_it_was() -> None:
    ddp = make()
    before = dict(ddp.__dict__), len(ddp._forward_hooks)
    timeline = Timeline(HostClock())
    waits = DdpWaits(ddp, timeline)
    output = unpack(ddp(torch.randn(16, 32)))
    waits.close()
    waits.close()
    assert (dict(ddp.__dict__).keys(), len(ddp._forward_hooks)) == (before[0].keys(), before[1])
    num_signs = timeline.position().number
    output.mean().backward()  # type: ignore[no-untyped-call]
    assert timeline.position().number == num_signs


@on_ranks(1)
def test_a_module_that_is_watched_is_copied_and_saved_as_ever_and_its_copies_are_not_measured() -> None:
    ddp = make()
    timeline = Timeline(HostClock())
    DdpWaits(ddp, timeline)
    file = io.BytesIO()
    torch.save(ddp, file)
    file.seek(0)
    num_signs = timeline.position().number
    for other in (copy.deepcopy(ddp), torch.load(file, weights_only=False)):
        synced: list[Any] = []
        other.__dict__["_sync_module_buffers"] = lambda *args, synced=synced, **kwargs: synced.append(args)
        unpack(other(torch.randn(16, 32))).mean().backward()  # type: ignore[no-untyped-call]
        assert len(synced) == 1  # its own buffers, not those of the module that it comes from
        assert timeline.position().number == num_signs
    unpack(ddp(torch.randn(16, 32))).mean().backward()  # type: ignore[no-untyped-call]
    assert timeline.position().number > num_signs


@on_ranks(1)
def test_another_threads_passes_count_nothing() -> None:
    ddp = make()
    timeline = Timeline(HostClock())
    DdpWaits(ddp, timeline)
    num_signs = timeline.position().number
    thread = threading.Thread(target=lambda: unpack(ddp(torch.randn(16, 32))).mean().backward())  # type: ignore[no-untyped-call]
    thread.start()
    thread.join()
    assert timeline.position().number == num_signs


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("is_outside", [True, False])
@pytest.mark.parametrize("is_unused", [True, False])
@on_ranks(2, timeout_seconds=300.0)
def test_a_compiled_module_is_found_and_measured(is_unused: bool, is_outside: bool, backend: str) -> None:
    torch.manual_seed(0)
    layers = Packed("tensor").layers
    if is_outside:
        ddp = DistributedDataParallel(layers, find_unused_parameters=is_unused)
        compiled = torch.compile(ddp, backend=backend)
        assert isinstance(compiled, nn.Module)
    else:
        compiled = ddp = DistributedDataParallel(torch.compile(layers, backend=backend))
    assert find_ddp(compiled) is ddp
    timeline = Timeline(HostClock())
    DdpWaits(ddp, timeline)
    check_the_one_who_waits(train(compiled, timeline, late=0, late_in="forward"), late=0)


def test_other_modules_have_no_such_waits() -> None:
    assert find_ddp(nn.Linear(2, 2)) is None
