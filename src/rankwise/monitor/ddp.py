"""How long a rank waits for the others' gradients in DistributedDataParallel: measured where DDP itself waits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from rankwise.monitor.phases import Timeline

F = TypeVar("F", bound=Callable[..., Any])

GRADIENTS = "DDP's all-reduce of gradients"
BUFFERS = "DDP's broadcast of buffers"


def _untraced(function: F) -> F:
    disabled: F = torch.compiler.disable(function, reason="notes the time")  # type: ignore[no-untyped-call]
    return disabled


class DdpWaits:
    """Notes when DDP waits for other ranks: for gradients at the end of a backward pass, for buffers before a forward.

    DDP starts to reduce a bucket of gradients as soon as it is full, while the backward pass goes on, and waits for all
    of them in one function that the autograd engine calls when everything else is computed. The engine calls such
    functions in the order in which they were handed over, and DDP hands over its own when the last gradient is there.
    Ours is handed over when the gradient of a parameter comes, which is before that, and hands over another one when
    it is called: so the one runs right before DDP waits and the other right after. Gradients are not touched, and no
    communication hook is needed, so that any may be registered.

    The parameters have their hooks for as long as the module is watched: one for each forward pass, on what comes out
    of it, costs a step of 20 ms four times as much.

    Ranks: local.
    """

    def __init__(self, module: DistributedDataParallel, timeline: Timeline) -> None:
        self._timeline = timeline
        self._module = module
        self._is_syncing = False
        self._is_queued = False
        self._is_waiting = False
        self._handles: list[RemovableHandle] = [module.register_forward_hook(_AfterForward(self))]
        for parameter in _first_parameters(module):
            self._handles.append(parameter.register_hook(self._on_gradient))  # type: ignore[no-untyped-call]
        if hasattr(module, "_sync_buffers"):
            # DDP has no hook there; where a later one has no such function, this wait is part of `forward`.
            module.__dict__["_sync_buffers"] = _SyncBuffers(module, self)

    def close(self) -> None:
        """Leave the module as it was."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        self._module.__dict__.pop("_sync_buffers", None)

    def sync_buffers(self, sync: Callable[[], Any]) -> None:
        """Have the buffers copied, and note how long that takes."""
        is_mine = self._timeline.begin_wait(BUFFERS)
        try:
            sync()
        finally:
            if is_mine:
                self._timeline.end_wait()

    def after_forward(self) -> None:
        """Take the next gradients for those of a backward pass in which DDP reduces them, if it will."""
        if not torch.is_grad_enabled():
            return
        if self._is_waiting:  # the last backward pass failed while DDP waited
            self._end()
        self._is_queued = False
        self._is_syncing = self._module.require_backward_grad_sync and self._timeline.is_mine()

    def _on_gradient(self, gradient: Tensor) -> None:
        """In a thread of the autograd engine, while the training thread stands in `backward`."""
        if self._is_syncing and not self._is_queued:
            self._is_queued = True
            Variable._execution_engine.queue_callback(self._begin)

    def _begin(self) -> None:
        self._is_queued = False
        self._is_waiting = True
        self._timeline.begin_wait_anywhere(GRADIENTS)
        Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self._timeline.end_wait()


class _AfterForward:
    """What DDP calls after a forward pass; a copy of DDP, or one from a file, is measured by nobody."""

    def __init__(self, waits: DdpWaits | None = None) -> None:
        self._waits = waits

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._waits is None:
            return
        # A compiled module is traced with its hooks, and clocks are nothing to trace; to say so costs time elsewhere.
        if torch.compiler.is_compiling():
            self._after_traced()
        else:
            self._waits.after_forward()

    @_untraced
    def _after_traced(self) -> None:
        if self._waits is not None:
            self._waits.after_forward()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _SyncBuffers:
    """Stands for DDP's own function of that name; in a copy of DDP, or one from a file, it is as that."""

    def __init__(self, module: DistributedDataParallel, waits: DdpWaits | None = None) -> None:
        self._module = module
        self._waits = waits

    def __call__(self) -> None:
        if torch.compiler.is_compiling():
            self._sync_traced()
        else:
            self._sync()

    @_untraced
    def _sync_traced(self) -> None:
        self._sync()

    def _sync(self) -> None:
        sync = functools.partial(type(self._module)._sync_buffers, self._module)
        if self._waits is None:
            sync()
        else:
            self._waits.sync_buffers(sync)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._module,)


def find_ddp(module: nn.Module) -> DistributedDataParallel | None:
    """The DDP module that this is, compiled or not; None for any other.

    Ranks: local.
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile gives
    return module if isinstance(module, DistributedDataParallel) else None


def _first_parameters(module: DistributedDataParallel) -> list[nn.Parameter]:
    """Parameters of which one surely gets its gradient before DDP has all that it waits for.

    That is any of those that DDP reduces, and where some may be left out, all. The first of a model comes last in the
    backward pass, so it lies within the same checkpointed part, if any, as the end of it.
    """
    reduced = [each for each in module._module_parameters if each.requires_grad]
    return reduced if module.find_unused_parameters or module.static_graph else reduced[:1]
