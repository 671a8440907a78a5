"""Numbers on their way into a page: many arrays and one object as one compressed text."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TYPES = {"uint8": "u8", "uint16": "u16", "int32": "i32", "float32": "f32", "float16": "f16"}
_ALIGNMENT = 4
_SHORTEST_SECONDS, _LONGEST_SECONDS = 1e-6, 1e4
_MOST = 65534
_MOST_SHORT = 65504.0

Reference = dict[str, Any]
"""Stands for an array in the object: its type, where it begins and how many numbers it has."""


class Packer:
    """Collects arrays; the object that refers to them and all of them become one text.

    The page's side of it is `unpack` in assets/base.js.

    Ranks: local.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, values: NDArray[Any]) -> Reference:
        """Keep an array, flat, row by row; gives what stands for it in the object."""
        little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
        reference = {"$": _TYPES[values.dtype.name], "at": self._size, "n": int(values.size)}
        content = little.tobytes()
        content += bytes(-len(content) % _ALIGNMENT)
        self._parts.append(content)
        self._size += len(content)
        return reference

    def add_seconds(self, seconds: NDArray[Any]) -> Reference:
        """Keep durations in 16 bits each: see `quantise`."""
        return self.add(quantise(seconds)) | {"$": "seconds"}

    def add_short(self, values: NDArray[Any]) -> Reference:
        """Keep numbers with three digits, in 16 bits each: enough for a line; none is beyond 65,504."""
        return self.add(np.clip(values, -_MOST_SHORT, _MOST_SHORT).astype(np.float16)) | {"$": "f16"}

    def pack(self, content: dict[str, Any]) -> str:
        """Base64 of a zlib stream: the length of the object's JSON in four bytes, the JSON, the arrays."""
        told = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
        told += b" " * (-len(told) % _ALIGNMENT)
        whole = b"".join([len(told).to_bytes(4, "little"), told, *self._parts])
        return base64.b64encode(zlib.compress(whole, 6)).decode()


def quantise(seconds: NDArray[Any]) -> NDArray[np.uint16]:
    """Durations from a microsecond to 10,000 s in 16 bits, right to 0.02 %; 0 stands for none, 1 for no time.

    Steps are equal in the logarithm, so a short phase is as exact as a long one.

    Ranks: local.
    """
    values = np.asarray(seconds, dtype=np.float64)
    is_known = np.isfinite(values)
    clipped = np.clip(np.where(is_known, values, _SHORTEST_SECONDS), _SHORTEST_SECONDS, _LONGEST_SECONDS)
    share = np.log(clipped / _SHORTEST_SECONDS) / np.log(_LONGEST_SECONDS / _SHORTEST_SECONDS)
    return np.where(is_known, 1 + np.rint(share * _MOST), 0).astype(np.uint16)
