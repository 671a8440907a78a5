"""What of a training state goes into a checkpoint, and how it comes back out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from rankwise.errors import CheckpointError, CheckpointMismatchError

_ITEM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_NUM_KEYS_SHOWN = 4


@runtime_checkable
class Stateful(Protocol):
    """Anything that gives its state and takes it back, as modules and optimizers do."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class PerRank:
    """Marks an item that every rank stores for itself, such as random states and places in the data.

    What is not marked is taken to be equal on all ranks and stored once, by the main process.
    """

    def __init__(self, item: object) -> None:
        self.item = item


def check_names(state: Mapping[str, object]) -> None:
    """Raise `CheckpointError` unless every item's name can be a file's name."""
    for name in state:
        if not isinstance(name, str) or not _ITEM_NAME.fullmatch(name):
            raise CheckpointError(
                f"an item of a checkpoint cannot be named {name!r}. Use letters, digits, '_', '.' and '-'."
            )
        if name == "manifest" or name.startswith("rank-"):
            raise CheckpointError(f"the name {name!r} is the checkpoint's own. Name the item otherwise.")


def capture(value: object) -> Any:
    """`value` with everything that has a `state_dict` replaced by it."""
    if isinstance(value, Stateful):
        return capture(value.state_dict())
    if isinstance(value, Mapping):
        return {key: capture(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(capture(item) for item in value)  # type: ignore[attr-defined,call-arg]
    return value


def check_fits(target: object, saved: Any, where: str) -> None:
    """Raise `CheckpointMismatchError` where `saved` cannot be loaded into `target`; changes nothing.

    Modules are compared key by key; other objects judge in their own `load_state_dict`.
    """
    if isinstance(target, torch.nn.Module):
        _check_tensors(dict(target.state_dict()), saved, where)
    elif isinstance(target, torch.Tensor):
        _check_tensors({"": target}, {"": saved}, where)
    elif isinstance(target, Mapping) and not isinstance(target, Stateful) and _holds_state(target):
        _check_keys(target, saved, where)
        for key, item in target.items():
            check_fits(item, saved[key], f"{where}[{key!r}]")


def restore(target: object, saved: Any, where: str) -> None:
    """Bring `saved` back into the objects and tensors of `target`; plain values stay as they are."""
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
            if _holds_state(item):
                restore(item, saved[key], f"{where}[{key!r}]")


def require_same(what: str, here: Sequence[str], there: Sequence[str], where: str) -> None:
    """Raise `CheckpointMismatchError` unless both sides have the same names."""
    missing = [name for name in here if name not in set(there)]
    unexpected = [name for name in there if name not in set(here)]
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"it lacks {what} {_some(missing)}")
    if unexpected:
        parts.append(f"it has {what} {_some(unexpected)} unknown to this run")
    raise CheckpointMismatchError(
        f"{where} does not fit: {' and '.join(parts)}. Resume with the settings that it was saved with."
    )


def _holds_state(value: object) -> bool:
    if isinstance(value, (Stateful, torch.Tensor)):
        return True
    return isinstance(value, Mapping) and any(_holds_state(item) for item in value.values())


def _check_keys(target: Mapping[Any, object], saved: Any, where: str) -> None:
    if not isinstance(saved, Mapping):
        raise CheckpointMismatchError(
            f"{where} holds a {type(saved).__name__}, this run has a mapping there. "
            "Resume with the settings that it was saved with."
        )
    require_same("keys", [str(key) for key in target], [str(key) for key in saved], where)


def _check_tensors(target: Mapping[str, Any], saved: Any, where: str) -> None:
    _check_keys(target, saved, where)
    for key, tensor in target.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        found = saved[key]
        if not isinstance(found, torch.Tensor) or found.shape != tensor.shape:
            seen = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise CheckpointMismatchError(
                f"{where}{f'[{key!r}]' if key else ''} has shape {seen}, this run needs {tuple(tensor.shape)}. "
                "Resume with the settings that it was saved with."
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NUM_KEYS_SHOWN])
    return f"{shown}, ... ({len(names)})" if len(names) > _NUM_KEYS_SHOWN else shown
