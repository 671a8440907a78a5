"""Nested values as JSON and tensors, there and back without loss and without pickle.

Plain JSON stays as it is. What JSON lacks becomes an object with one key: {"$tuple": [...]}, {"$dict": [[k, v]]}
for keys that are no strings, {"$float": "inf"}, and {"$tensor": NAME} for a tensor that lies under that name in the
safetensors file beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from rankwise.errors import CheckpointCorruptError, CheckpointError

_DTYPES = {
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}


def flatten(value: object, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """`value` as JSON and as tensors that own their memory, on the CPU.

    Args:
        name: of the item, for error messages.
    Raises:
        CheckpointError: the tree holds something that cannot be stored; says what and where.
    Ranks: local.
    """
    flattener = _Flattener(name)
    return flattener.encode(value, ()), flattener.tensors


def unflatten(encoded: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `flatten` was given; a tensor that was there twice is there twice again.

    Raises:
        CheckpointCorruptError: the JSON names a tensor that is not among `tensors`.
    Ranks: local.
    """
    if isinstance(encoded, list):
        return [unflatten(item, tensors) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    match next(iter(encoded.items()), None):
        case ("$tuple", items):
            return tuple(unflatten(item, tensors) for item in items)
        case ("$dict", pairs):
            return {unflatten(key, tensors): unflatten(item, tensors) for key, item in pairs}
        case ("$float", text):
            return float(text)
        case ("$tensor", key):
            if key not in tensors:
                raise CheckpointCorruptError(f"the tensor {key!r} is missing in the safetensors file")
            return tensors[key]
    return {key: unflatten(item, tensors) for key, item in encoded.items()}


class _Flattener:
    def __init__(self, name: str) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._name = name
        self._seen: dict[tuple[object, ...], str] = {}
        self._memory: set[int] = set()

    def encode(self, value: object, path: tuple[str, ...]) -> Any:
        # Exact types: a subclass (numpy.float64 is a float, torch.Size a tuple) would come back as another type.
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if isinstance(value, float) and kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._add(value, path)}
        if isinstance(value, list) and kind is list:
            return [self.encode(item, (*path, str(index))) for index, item in enumerate(value)]
        if isinstance(value, tuple) and kind is tuple:
            return {"$tuple": [self.encode(item, (*path, str(index))) for index, item in enumerate(value)]}
        if isinstance(value, Mapping):
            return self._encode_mapping(value, path)
        raise CheckpointError(
            f"{self._where(path)} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint does not hold. "
            "Store tensors, numbers, strings, lists, tuples and dicts of them (`.item()` makes a plain number)."
        )

    def _encode_mapping(self, value: Mapping[Any, object], path: tuple[str, ...]) -> Any:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, (*path, key)) for key, item in value.items()}
        pairs = []
        for key, item in value.items():
            place = (*path, str(key))
            if isinstance(key, torch.Tensor):
                raise CheckpointError(f"{self._where(place)} has a tensor for a key, which cannot be restored.")
            pairs.append([self.encode(key, place), self.encode(item, place)])
        return {"$dict": pairs}

    def _add(self, tensor: torch.Tensor, path: tuple[str, ...]) -> str:
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self._where(path)} is a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device}, "
                "which a checkpoint does not hold. Store a dense tensor of a common type."
            )
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise CheckpointError(
                f"{self._where(path)} is a {type(tensor).__qualname__}; only plain tensors can be stored."
            )
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() > 0 and same in self._seen:
            return self._seen[same]
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # safetensors refuses tensors that share memory, as views of one buffer do.
        memory = plain.untyped_storage().data_ptr()
        if memory in self._memory:
            plain = plain.clone()
        self._memory.add(plain.untyped_storage().data_ptr())
        key = ".".join(path) or "value"
        while key in self.tensors:
            key += "_"
        self.tensors[key] = plain
        self._seen[same] = key
        return key

    def _where(self, path: tuple[str, ...]) -> str:
        return "state" + "".join(f"[{key!r}]" for key in (self._name, *path))
