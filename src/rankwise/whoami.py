"""`rankwise whoami`: what this process is, and which variable says so."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence

from rankwise.errors import DeviceError, RankwiseError
from rankwise.identity import Identity
from rankwise.visible import predict_device

USAGE = """usage: rankwise whoami [--json] [--probe]

Tells what this process is and which variable says so: its ranks, node, launcher, and the device that the environment
gives it. Run it under your launcher, on every process:  srun rankwise whoami

--json   one line per process: one JSON object
--probe  ask torch for the device, instead of the environment

Exit status 2 where the environment contradicts itself or there is no device (--probe)."""

MAX_LINE_BYTES = 1000
"""A line of JSON is shorter: srun passes on what tasks print in pieces of 1024 bytes, and mixes those of several."""

_NUMBERS = ("rank", "local_rank", "node_rank", "world_size", "local_world_size", "num_nodes")
_SPOKEN = {"given": "this system's own name", "none": "-"}
_STDOUT, _STDERR = 1, 2


def main(arguments: Sequence[str]) -> int:
    """Print who this process is.

    Returns:
        The exit status: 2 for a contradictory environment or options that are not understood, 1 where the output
        cannot be written.
    Ranks: local.
    """
    options = set(arguments)
    if options & {"-h", "--help"}:
        return _write(_STDOUT, USAGE)
    if unknown := [argument for argument in arguments if argument not in ("--json", "--probe")]:
        _write(_STDERR, f"{USAGE}\nerror: {unknown[0]!r} is no option of rankwise whoami")
        return 2
    try:
        identity = Identity.resolve(os.environ, hostname=socket.gethostname())
        probing = "--probe" in options
        device = _probe_device(identity) if probing else predict_device(identity, os.environ)
    except RankwiseError as error:
        _write(_STDERR, f"error: {error}")
        return 2
    if "--json" in options:
        return _write(_STDOUT, json_line(identity, device))
    return _write(_STDOUT, table(identity, device, probed=probing))


def json_line(identity: Identity, device: str | None) -> str:
    """One line of JSON that says who this process is, shorter than `MAX_LINE_BYTES` with its line end.

    Where names are so long that it would not fit, the sources are cut off first, then the host and the job.

    Ranks: local.
    """
    line = ""
    for max_chars in (MAX_LINE_BYTES, 24, 12, 0):
        sources = {name: _cut(source, max_chars) for name, source in identity.sources.items()}
        line = _dump(_facts(identity, device) | {"sources": sources})
        if len(line) + 1 < MAX_LINE_BYTES:
            return line
    facts = _facts(identity, device) | {"sources": {}}
    for max_chars in (60, 0):
        # A character takes up to twelve bytes as JSON, so the first cut may not be enough.
        facts |= {name: _cut(str(facts[name]), max_chars) for name in ("hostname", "job_id") if facts[name]}
        line = _dump(facts)
        if len(line) + 1 < MAX_LINE_BYTES:
            break
    return line


def table(identity: Identity, device: str | None, *, probed: bool) -> str:
    """A line with the rank, then aligned ones for a person: field, value, and where the value comes from.

    Ranks: local.
    """
    told = "torch" if probed else "the devices that the environment shows"
    if device is None:
        told = "the environment does not say; --probe asks torch"
    sources: Mapping[str, str] = {"device": told} | dict(identity.sources)
    facts = _facts(identity, device).items()
    rows = [(name, _shown(value), _SPOKEN.get(sources.get(name, ""), sources.get(name, ""))) for name, value in facts]
    name_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{name:<{name_width}}  {value:<{value_width}}  {source}".rstrip() for name, value, source in rows]
    # Blocks of several ranks follow each other on one console.
    return "\n".join([f"rank {identity.rank} of {identity.world_size}", *lines])


def _facts(identity: Identity, device: str | None) -> dict[str, object]:
    return {
        **{name: getattr(identity, name) for name in _NUMBERS},
        "launcher": identity.launcher,
        "hostname": identity.hostname,
        "job_id": identity.job_id,
        "is_main_process": identity.is_main_process,
        "is_local_main_process": identity.is_local_main_process,
        "device": device,
    }


def _probe_device(identity: Identity) -> str:
    """The device that torch gives this process; importing torch takes seconds."""
    try:
        from rankwise.device import select_device
    except (ImportError, OSError) as error:
        raise RankwiseError(f"torch cannot be imported ({error}). Install it, or leave out --probe.") from error
    try:
        return str(select_device(identity))
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DeviceError(f"torch gives no device: {reason}. Repair it, or leave out --probe.") from error


def _dump(facts: Mapping[str, object]) -> str:
    return json.dumps(facts, separators=(",", ":"))


def _cut(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[:max_chars] + ".."


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    return text if text.isprintable() else ascii(text)


def _write(descriptor: int, text: str) -> int:
    """Write `text` and a line end at once: text that leaves in two pieces is mixed with that of other processes."""
    try:
        os.write(descriptor, (text + "\n").encode("utf-8", "backslashreplace"))
    except BrokenPipeError:
        return 1  # the reader has gone, as `head` does: it wants no more
    except OSError as error:
        if descriptor != _STDERR:
            _write(_STDERR, f"error: the output cannot be written: {error.strerror}. Give it a place with room.")
        return 1
    return 0
