"""What of a training state goes into a checkpoint, and how it comes back out."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch.distributed.tensor import DTensor

from rankwise.errors import CheckpointError, CheckpointMismatchError

_ITEM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_NUM_KEYS_SHOWN = 4
_ADVICE = "Resume with the settings that it was saved with."


@runtime_checkable
class Stateful(Protocol):
    """Anything that gives its state and takes it back, as modules and optimizers do."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class PerRank:
    """Marks an item that every rank stores for itself, such as random states and places in the data.

    What is not marked is taken to be equal on all ranks, or sharded (DTensor), and stored once.

    Args:
        redistribute: where the number of ranks has changed, called with what each of the old ranks saved (in their
            order), this rank and the number of ranks now; returns what this rank loads. Without it such a load is
            refused.
    Ranks: local; the same items are marked on every rank.
    """

    def __init__(self, item: object, redistribute: Callable[[list[Any], int, int], Any] | None = None) -> None:
        self.item = item
        self.redistribute = redistribute


def check_names(state: Mapping[str, object]) -> None:
    """Raise `CheckpointError` unless every item's name can begin the names of what is in it.

    Ranks: local.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"a state is a mapping of items by name, not a {type(state).__name__}. Give {{'model': ...}}."
        )
    for name in state:
        if not isinstance(name, str) or not _ITEM_NAME.fullmatch(name):
            raise CheckpointError(
                f"an item of a checkpoint cannot be named {name!r}. Use letters, digits, '_' and '-'."
            )


def capture(value: object) -> Any:
    """`value` with everything that has a `state_dict` replaced by it.

    Ranks: local, unless the `state_dict` of what is in there says otherwise.
    """
    if isinstance(value, Stateful):
        return capture(value.state_dict())
    if isinstance(value, Mapping):
        return {key: capture(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(capture(item) for item in value)  # type: ignore[attr-defined,call-arg]
    return value


def buffer_addresses(value: object) -> set[int]:
    """Where the memory of all buffers lies that modules in `value` have: the tensors of their states share it.

    Ranks: local.
    """
    if isinstance(value, torch.nn.Module):
        return {buffer.data_ptr() for buffer in value.buffers() if buffer.numel() and not isinstance(buffer, DTensor)}
    if isinstance(value, Mapping) and not isinstance(value, Stateful):
        return {address for item in value.values() for address in buffer_addresses(item)}
    if type(value) in (list, tuple):
        return {address for item in value for address in buffer_addresses(item)}  # type: ignore[attr-defined]
    return set()


def check_fits(target: object, saved: Any, where: str) -> None:
    """Raise `CheckpointMismatchError` where `saved` cannot be loaded into `target`; changes nothing.

    Names of mappings, lengths of sequences that hold state, and shapes and types of tensors are compared. Plain values
    are not, nor sequences of nothing else. Modules are compared key by key; other objects judge in their own
    `load_state_dict`.

    Ranks: local.
    """
    if isinstance(target, torch.nn.Module):
        _check_tensors(dict(target.state_dict()), saved, where)
    elif isinstance(target, torch.Tensor):
        _check_tensors({"": target}, {"": saved}, where)
    elif isinstance(target, Stateful) or (_is_plain(target) and _is_plain(saved)):
        return
    elif isinstance(target, Mapping):
        _check_keys(target, saved, where)
        for key, item in target.items():
            check_fits(item, saved[key], f"{where}[{key!r}]")
    elif isinstance(target, (list, tuple)):
        _check_length(target, saved, where)
        for index, item in enumerate(target):
            check_fits(item, saved[index], f"{where}[{index}]")
    else:
        raise CheckpointMismatchError(
            f"{where} holds {_kind(saved)}, this run has {_kind(target)} there, which cannot take it back. {_ADVICE}"
        )


def restore(target: object, saved: Any, where: str) -> None:
    """Bring `saved`, which `check_fits` has passed, back into the objects and tensors of `target`.

    Plain values stay as they are.

    Raises:
        CheckpointMismatchError: an object's own `load_state_dict` refused; what stands before it is restored.
    Ranks: local, unless the `load_state_dict` of what is in there says otherwise.
    """
    if isinstance(target, Stateful):
        try:
            target.load_state_dict(saved)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            kind = type(target).__name__
            raise CheckpointMismatchError(
                f"{where} does not fit into this run's {kind}: {type(error).__name__}: {error}"
            ) from error
    elif isinstance(target, torch.Tensor):
        with torch.no_grad():
            target.copy_(saved)
    elif isinstance(target, Mapping):
        for key, item in target.items():
            restore(item, saved[key], f"{where}[{key!r}]")
    elif isinstance(target, (list, tuple)) and not _is_plain(target):
        for index, item in enumerate(target):
            restore(item, saved[index], f"{where}[{index}]")


def require_same(what: str, here: Iterable[Hashable], there: Iterable[Hashable], where: str) -> None:
    """Raise `CheckpointMismatchError` unless both sides have the same names.

    Ranks: local.
    """
    needed, found = dict.fromkeys(here), dict.fromkeys(there)
    missing = [name for name in needed if name not in found]
    unexpected = [name for name in found if name not in needed]
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"it lacks {what} {_some(missing)}")
    if unexpected:
        parts.append(f"it has {what} {_some(unexpected)} unknown to this run")
    raise CheckpointMismatchError(f"{where} does not fit: {' and '.join(parts)}. {_ADVICE}")


def _is_plain(value: object) -> bool:
    """Whether there is nothing in `value` to restore and nothing to compare by name."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, Mapping) and not isinstance(value, Stateful):
        return not value
    return not isinstance(value, (Stateful, torch.Tensor))


def _check_keys(target: Mapping[Any, object], saved: Any, where: str) -> None:
    if not isinstance(saved, Mapping):
        raise CheckpointMismatchError(f"{where} holds {_kind(saved)}, this run has a mapping there. {_ADVICE}")
    require_same("keys", target, saved, where)


def _check_length(target: Sequence[object], saved: Any, where: str) -> None:
    if not isinstance(saved, (list, tuple)) or len(saved) != len(target):
        raise CheckpointMismatchError(f"{where} holds {_kind(saved)}, this run has {_kind(target)} there. {_ADVICE}")


def _check_tensors(target: Mapping[str, Any], saved: Any, where: str) -> None:
    _check_keys(target, saved, where)
    for key, tensor in target.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        found, place = saved[key], f"{where}[{key!r}]" if key else where
        if not isinstance(found, torch.Tensor):
            raise CheckpointMismatchError(f"{place} holds {_kind(found)}, this run has a tensor there. {_ADVICE}")
        if found.shape != tensor.shape:
            raise CheckpointMismatchError(
                f"{place} has shape {tuple(found.shape)}, this run needs {tuple(tensor.shape)}. {_ADVICE}"
            )
        if found.dtype != tensor.dtype:
            raise CheckpointMismatchError(f"{place} is {found.dtype}, this run needs {tensor.dtype}. {_ADVICE}")


def _kind(value: object) -> str:
    """What a value is, in words for a message."""
    match value:
        case torch.Tensor():
            return "a tensor"
        case list() | tuple():
            return f"a {type(value).__name__} of {len(value)}"
        case None:
            return "None"
        case Mapping():
            return "a mapping"
    return f"a value of type {type(value).__name__}"


def _some(names: Sequence[Hashable]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NUM_KEYS_SHOWN])
    return f"{shown}, ... ({len(names)})" if len(names) > _NUM_KEYS_SHOWN else shown


def sharded_targets(target: object) -> dict[tuple[Any, ...], DTensor]:
    """Where the tensors of `target` are distributed, by the way to them: so are those that are loaded into it.

    An optimizer that has made no step yet has no state to look at; what has the shape of a parameter will be
    distributed as that is.

    Ranks: local, unless the `state_dict` of what is in there says otherwise.
    """
    found: dict[tuple[Any, ...], DTensor] = {}

    def look(value: object, path: tuple[Any, ...]) -> None:
        if isinstance(value, DTensor):
            found[path] = value
        elif isinstance(value, torch.optim.Optimizer):
            parameters = [each for group in value.param_groups for each in group["params"]]
            found.update({(*path, "state", i): each for i, each in enumerate(parameters) if isinstance(each, DTensor)})
        elif isinstance(value, Stateful):
            look(value.state_dict(), path)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                look(item, (*path, key))
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                look(item, (*path, index))

    look(target, ())
    return found
