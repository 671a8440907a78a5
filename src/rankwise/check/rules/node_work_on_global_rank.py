"""
## What it finds

A download or an extraction under a guard of the global rank.

## Why it hurts

Where nodes have disks of their own, the others never get the files.

## Example

    if dist.get_rank() == 0:
        dataset = MNIST("data", download=True)

## Instead

    if local_rank == 0:
        dataset = MNIST("data", download=True)

## Known limits

Right on a shared file system, which is not seen: therefore off by default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rankwise.check.finding import Finding
from rankwise.check.program import Program
from rankwise.check.values import constant
from rankwise.check.works import calls_with

_FETCHES = re.compile(
    r"_?(?:maybe_)?(?:download|snapshot_download|urlretrieve|hf_hub_download|extractall|prepare_data)\w*"
)


def check(program: Program) -> Iterator[Finding]:
    for trace, call in calls_with(program):
        fetches = _FETCHES.fullmatch(call.last) or constant(call.argument(-1, "download")) is True
        atom = next((one for one in call.guard if one.scope == "rank" and one.which == "main" and one.sure), None)
        if fetches and atom is not None:
            message = "only rank 0 fetches this; nodes with disks of their own go without. Guard it by the local rank"
            yield trace.module.finding("RW202", atom.place or call.node, "warning", message, atom.trail)
