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
from torch.utils.hooks import RemovableHandle, unserializable_hook

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
    functions in the order in which they were handed over, and DDP hands over its own when the last gradient is there.
    Ours is handed over when the gradient of a parameter comes, which is before that, and hands over another one when
    it is called: so the one runs right before DDP waits and the other right after. Gradients are not touched, and no
    communication hook is needed, so that any may be registered.

    One hook on one parameter, for as long as the module is watched, is what costs least. Where that parameter may be
    left out, or DDP hands over its own earlier, as in the first pass of a static graph, the hook is on what comes out
    of each forward pass, whose gradient comes first of all.

    Ranks: local.
    """

    def __init__(self, module: DistributedDataParallel, timeline: Timeline) -> None:
        self._timeline = timeline
        self._module = module
        self._is_syncing = False
        self._is_queued = False
        self._is_waiting = False
        self._is_consumed = False
        self._handles: list[RemovableHandle] = []
        self._parameter = _sure_parameter(module)
        if module._use_python_reducer:
            return  # of compiled autograd: each gradient is waited for where it comes
        if self._parameter is None:
            self._handles.append(module.register_forward_hook(_AfterForwardWithOutput(self)))
        else:
            self._handles.append(module.register_forward_hook(_AfterForward(self)))
            self._handles.append(self._parameter.register_hook(self._on_gradient))  # type: ignore[no-untyped-call]
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

    def after_forward(self, output: Any) -> None:
        """Take the next gradients for those of a backward pass in which DDP reduces them, if it will.

        Args:
            output: what the module gives, for a hook on it; None where a parameter has one.
        """
        if not torch.is_grad_enabled():
            return
        if not (self._module.require_backward_grad_sync and self._timeline.is_mine()):
            # A pass before this one may still be waiting for its backward pass, in which DDP reduces.
            self._is_syncing = self._is_syncing and not self._is_consumed
            return
        if self._is_waiting:  # the last backward pass failed while DDP waited
            self._end()
        self._is_queued, self._is_consumed, self._is_syncing = False, False, True
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    @unserializable_hook  # type: ignore[untyped-decorator]
    def _on_gradient(self, gradient: Tensor) -> None:
        """In a thread of the autograd engine, while the training thread stands in `backward`."""
        if self._is_syncing and not self._is_queued and self._handles and not torch.compiler.is_compiling():
            self._is_queued = True
            Variable._execution_engine.queue_callback(self._begin)

    def _begin(self) -> None:
        self._is_queued = False
        self._is_waiting = True
        self._timeline.begin_wait_anywhere(GRADIENTS)
        Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self._is_consumed = True
        if self._is_waiting:
            self._is_waiting = False
            self._timeline.end_wait()


class _AfterForward:
    """What DDP calls after a forward pass; a copy of DDP, or one from a file, is measured by nobody."""

    def __init__(self, waits: DdpWaits | None = None) -> None:
        self._waits = waits

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # A compiled module is traced with its hooks, and clocks are nothing to trace; to say so costs time elsewhere.
        if torch.compiler.is_compiling():
            self._after_traced()
        elif self._waits is not None:
            self._waits.after_forward(None)

    @_untraced
    def _after_traced(self) -> None:
        if self._waits is not None:
            self._waits.after_forward(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _AfterForwardWithOutput(_AfterForward):
    """The same where the hooks are on what comes out of it."""

    @_untraced
    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._waits is not None:
            self._waits.after_forward(output)


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


def _sure_parameter(module: DistributedDataParallel) -> nn.Parameter | None:
    """One that DDP surely waits for: any that it reduces, unless some may be left out; None where there is none.

    The first of a model mostly comes last in the backward pass, so it lies within the same checkpointed part, if any,
    as the end of it.
    """
    if module.find_unused_parameters or module.static_graph:
        return None
    return next((each for each in module._module_parameters if each.requires_grad), None)


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
