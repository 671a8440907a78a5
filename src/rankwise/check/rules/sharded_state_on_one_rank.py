"""
## What it finds

State that is spread over the ranks, gathered by one rank alone: `accelerator.get_state_dict`, `accelerator.save_state`,
a DeepSpeed engine's `save_checkpoint`, the `state_dict` of an FSDP model, under a guard of the main process.

## Why it hurts

Gathering is a collective. Under ZeRO-3 or FSDP the main process waits for the others until the timeout; with plain DDP
it happens to work, which is why it stays unseen.

## Example

    if accelerator.is_main_process:
        accelerator.save_state("checkpoint")

## Instead

    accelerator.save_state("checkpoint")  # on every rank; it knows who writes

## Known limits

Whether accelerate runs FSDP, ZeRO or DDP is not seen: there it is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator

from rankwise.check.explore import whole_guard
from rankwise.check.finding import Finding, Severity
from rankwise.check.program import Program
from rankwise.check.reach import main_only
from rankwise.check.trace import Call
from rankwise.check.values import Thing
from rankwise.check.works import calls_with

_OF_ACCELERATOR = frozenset({"get_state_dict", "save_state"})
_OF_DEEPSPEED = frozenset({"save_checkpoint", "save_16bit_model", "save_fp16_model"})
_GATHERS = frozenset(
    {"get_model_state_dict", "get_optimizer_state_dict", "get_state_dict", "full_optim_state_dict", "optim_state_dict"}
)


def check(program: Program) -> Iterator[Finding]:
    for trace, call in calls_with(program):
        severity = _gathers(call)
        atom = main_only(whole_guard(program, call)) if severity else None
        if atom is not None and severity:
            shown = trace.module.text(call.node.func)
            message = f"{shown}() gathers state from every rank, but one alone comes here. Call it on all ranks"
            yield trace.module.finding("RW404", call.node, severity, message, atom.trail)


def _gathers(call: Call) -> Severity | None:
    thing = call.receiver.data if call.receiver is not None else None
    text = call.name.rpartition(".")[0]
    if call.last in _OF_ACCELERATOR and (
        (isinstance(thing, Thing) and thing.tag == "accelerator") or text.endswith("accelerator")
    ):
        return "warning"
    if call.last in _OF_DEEPSPEED and isinstance(thing, Thing) and thing.tag == "deepspeed":
        return "error"
    if call.last in ("state_dict", "optim_state_dict") and isinstance(thing, Thing) and thing.tag == "fsdp":
        return "error"
    if call.last in _GATHERS and call.name.startswith("torch.distributed"):
        return "error"
    if call.name.endswith("GatheredParameters") and "modifier_rank" not in call.keywords:
        return "error"
    return None
