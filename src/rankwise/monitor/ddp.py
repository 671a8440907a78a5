"""How long a rank waits for the others' gradients in DistributedDataParallel: measured where DDP itself waits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
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
_MAX_DEPTH = 8


def _untraced(function: F) -> F:
    disabled: F = torch.compiler.disable(function, reason="notes the time")  # type: ignore[no-untyped-call]
    return disabled


class DdpWaits:
    """Notes when DDP waits for other ranks: for gradients at the end of a backward pass, for buffers before a forward.

    DDP starts to reduce a bucket of gradients as soon as it is full, while the backward pass goes on, and waits for all
    of them in one function that the autograd engine calls when everything else is computed. The engine calls such
    functions in the order in which they were handed over. Ours is handed over when the gradient of DDP's output comes,
    which is before DDP can hand over its own, and hands over another one when it is called: so the one runs right
    before DDP waits and the other right after. Gradients are not touched, and no communication hook is needed, so
    that any may be registered.

    Ranks: local.
    """

    def __init__(self, module: DistributedDataParallel, timeline: Timeline) -> None:
        self._timeline = timeline
        self._module = module
        self._is_queued = False
        self._is_waiting = False
        self._handle: RemovableHandle | None = module.register_forward_hook(_AfterForward(self))
        if hasattr(module, "_sync_buffers"):
            # DDP has no hook there; where a later one has no such function, this wait is part of `forward`.
            module.__dict__["_sync_buffers"] = _SyncBuffers(module, self)

    def close(self) -> None:
        """Leave the module as it was."""
        handle, self._handle = self._handle, None
        if handle is not None:
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

    def after_forward(self, output: Any) -> None:
        """Find the tensors whose gradients come first in the backward pass."""
        if not (torch.is_grad_enabled() and self._module.require_backward_grad_sync and self._timeline.is_mine()):
            return
        if self._is_waiting:  # the last backward pass failed while DDP waited
            self._end()
        self._is_queued = False
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    def _on_gradient(self, gradient: Tensor) -> None:
        """In a thread of the autograd engine, while the training thread stands in `backward`."""
        if not self._is_queued and self._handle is not None:
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

    # A compiled module is traced with its hooks, and clocks are nothing to trace.
    @_untraced
    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._waits is not None:
            self._waits.after_forward(output)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _SyncBuffers:
    """Stands for DDP's own function of that name; in a copy of DDP, or one from a file, it is as that."""

    def __init__(self, module: DistributedDataParallel, waits: DdpWaits | None = None) -> None:
        self._module = module
        self._waits = waits

    @_untraced
    def __call__(self) -> None:
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


def _tensors(output: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in what a module gives, whatever they are packed in."""
    if isinstance(output, Tensor):
        yield output
        return
    if depth == _MAX_DEPTH or output is None or isinstance(output, str | bytes | int | float):
        return
    if isinstance(output, Mapping):
        inner: Sequence[Any] = list(output.values())
    elif isinstance(output, list | tuple | set | frozenset):
        inner = list(output)
    elif is_dataclass(output):
        inner = [getattr(output, each.name) for each in fields(output)]
    else:
        inner = list(getattr(output, "__dict__", {}).values())
    for each in inner:
        yield from _tensors(each, depth + 1)
