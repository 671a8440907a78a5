"""`rankwise ckpt diff`: what is only in one of two steps, and what differs, tensor by tensor in little memory."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rankwise.checkpoint.reader import read_tensors
from rankwise.ckpt.output import say, say_table
from rankwise.ckpt.places import find_place
from rankwise.ckpt.values import Place, Step, read_step, show_place

_SLICE = 1 << 20
_MAX_CHARACTERS = 60
_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Changed:
    """A tensor that is in both steps, in one shape and type, with other values.

    Attributes:
        max_abs: largest difference of two values; infinite where one of them is not a number, or infinite.
        relative: that, as a part of the largest value of either side.
        num_changed: values whose bits differ.
        num_values: how many there are.
    """

    name: str
    max_abs: float
    relative: float
    num_changed: int
    num_values: int


@dataclass
class Difference:
    """All that differs; pairs are of A and of B.

    Attributes:
        only_a, only_b: tensors that one of them lacks.
        forms: tensors of another shape or type, in words.
        changed: the largest relative difference first.
        values: plain values, as Python writes them; None on the side that has none.
    """

    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    forms: dict[str, tuple[str, str]] = field(default_factory=dict)
    changed: list[Changed] = field(default_factory=list)
    values: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    num_equal: int = 0

    @property
    def equal(self) -> bool:
        """Whether there is none."""
        return not (self.only_a or self.only_b or self.forms or self.changed or self.values)


def run(options: argparse.Namespace) -> int:
    """Compare two steps and print what differs.

    Returns:
        The exit status: 0 where they are equal, 1 where not.
    Raises:
        CheckpointError: one of them is not there, or what has to be read of it is damaged.
        OSError: a folder cannot be read.
    Ranks: local, in no job.
    """
    first, second = _paths(options.places)
    found = compare(read_step(first), read_step(second))
    if options.json:
        # JSON has no infinity.
        facts: dict[str, Any] = {"a": str(first), "b": str(second), "equal": found.equal} | asdict(found)
        for change in facts["changed"]:
            change.update({key: _finite(change[key]) for key in ("max_abs", "relative")})
        say(json.dumps(facts, indent=1, allow_nan=False))
    else:
        say(f"A  {first}\nB  {second}")
        _say_difference(found, options.limit)
    return 0 if found.equal else 1


def compare(a: Step, b: Step) -> Difference:
    """What differs between two steps. Tensors whose checksums are equal are not read.

    Raises:
        CheckpointCorruptError: what has to be read is damaged.
    Ranks: local.
    """
    found = Difference()
    tensors_a, tensors_b = a.tensors(), b.tensors()
    found.only_a = [show_place(place) for place in tensors_a if place not in tensors_b]
    found.only_b = [show_place(place) for place in tensors_b if place not in tensors_a]
    for place in tensors_a:
        if place in tensors_b:
            _compare_tensor(found, place, (a, tensors_a[place]), (b, tensors_b[place]))
    found.changed.sort(key=lambda change: (-change.relative, -change.max_abs, change.name))
    values_a, values_b = a.values(), b.values()
    for place in values_a | values_b:
        sides = [repr(values[place]) if place in values else None for values in (values_a, values_b)]
        # As text: nan is equal to nan there, and 1 is not 1.0.
        if sides[0] != sides[1]:
            found.values[show_place(place)] = (sides[0], sides[1])
    return found


def _compare_tensor(found: Difference, place: Place, a: tuple[Step, str], b: tuple[Step, str]) -> None:
    (step_a, name_a), (step_b, name_b) = a, b
    record_a, record_b = step_a.records[name_a], step_b.records[name_b]
    if (record_a.shape, record_a.dtype) != (record_b.shape, record_b.dtype):
        forms = [f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in (record_a, record_b)]
        found.forms[show_place(place)] = (forms[0], forms[1])
        return
    boxes = [{(each.offsets, each.sizes, each.xxh3) for each in record.chunks} for record in (record_a, record_b)]
    if boxes[0] == boxes[1]:
        found.num_equal += 1
        return
    tensors = (read_tensors(step.path, step.records, [name])[name] for step, name in (a, b))
    changed = _measure(show_place(place), *tensors)
    if changed.num_changed:
        found.changed.append(changed)
    else:
        found.num_equal += 1


def _measure(name: str, a: torch.Tensor, b: torch.Tensor) -> Changed:
    """How far two tensors of one shape and type are apart; in slices, as float64 would be twice their size."""
    num_changed, max_abs, largest = 0, 0.0, 0.0
    for part_a, part_b in _slices(a.reshape(-1), b.reshape(-1)):
        bits = _WHOLE_NUMBERS[min(part_a.element_size(), 8)]
        differs = part_a.view(bits) != part_b.view(bits)
        num_changed += int(differs.view(part_a.numel(), -1).any(1).sum())
        wide = torch.complex128 if part_a.is_complex() else torch.float64
        wide_a, wide_b = part_a.to(wide), part_b.to(wide)
        apart = (wide_a - wide_b).abs()
        # Of inf - inf and nan - nan nothing is apart, of one of them and a number all is.
        apart[(wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan())] = 0
        max_abs = max(max_abs, float(apart.nan_to_num(math.inf, math.inf).max()))
        for wide_part in (wide_a, wide_b):
            largest = max(largest, float(wide_part.abs().nan_to_num(0.0, 0.0).max()))
    relative = max_abs / largest if largest else float(max_abs > 0)
    return Changed(name, max_abs, relative, num_changed, a.numel())


def _slices(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, a.numel(), _SLICE):
        yield a[start : start + _SLICE], b[start : start + _SLICE]


def _paths(places: Sequence[str | int]) -> tuple[Path, Path]:
    if len(places) == 2:
        first, second = (find_place(str(text)).newest() for text in places)
        return first, second
    place = find_place(str(places[0]))
    return place.step(int(places[1])), place.step(int(places[2]))


def _say_difference(found: Difference, limit: int) -> None:
    for title, names in (("only in A", found.only_a), ("only in B", found.only_b)):
        _say_some(f"tensors {title}", [[name] for name in names], limit, ["name"])
    forms = [[name, *pair] for name, pair in found.forms.items()]
    _say_some("tensors of another type or shape", forms, limit, ["name", "A", "B"])
    changed = [
        [each.name, f"{each.max_abs:.4g}", f"{each.relative:.4g}", f"{each.num_changed} of {each.num_values}"]
        for each in found.changed
    ]
    _say_some("tensors with other values", changed, limit, ["name", "largest difference", "relative", "values"])
    values = [[name, *map(_cut, pair)] for name, pair in found.values.items()]
    _say_some("plain values", values, limit, ["name", "A", "B"])
    say(f"equal: {found.num_equal} tensors" + ("" if not found.equal else " and all plain values"))


def _say_some(title: str, rows: Sequence[Sequence[str]], limit: int, heading: Sequence[str]) -> None:
    if not rows:
        return
    say(f"\n{title}: {len(rows)}")
    if limit:
        say_table([heading, *rows[:limit]])
    if len(rows) > limit:
        say(f"... and {len(rows) - limit} more (--limit, --json)")


def _cut(text: str | None) -> str:
    if text is None:
        return "-"
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
