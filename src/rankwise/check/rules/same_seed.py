"""
## What it finds

A seed of the random numbers that is the same on every rank.

## Why it hurts

Noise and augmentation are equal on all ranks: the batch has less variety than it seems.

## Example

    torch.manual_seed(args.seed)

## Instead

    torch.manual_seed(args.seed + rank)

## Known limits

Equal seeds are right where weights are made, and for tensor parallelism: therefore off by default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rankwise.check.finding import Finding
from rankwise.check.program import Program
from rankwise.check.reach import runs_on_many
from rankwise.check.works import calls_with

_SEEDS = re.compile(
    r"(?:torch\.)?(?:cuda\.)?manual_seed(?:_all)?|(?:set|fix|init)_?(?:all_)?(?:random_)?seeds?|seed_everything"
)


def check(program: Program) -> Iterator[Finding]:
    for trace, call in calls_with(program):
        if not _SEEDS.fullmatch(call.last) or call.guard or not runs_on_many(program, trace) or not call.arguments:
            continue
        if not any(value.varies for value in (*call.arguments, *call.keywords.values())):
            message = "every rank gets the same seed. Add the rank where noise or augmentation should differ"
            yield trace.module.finding("RW503", call.node, "warning", message)
