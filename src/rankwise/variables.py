"""Numbers and lists in environment variables, read so that anything else is an error that shows the value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from rankwise.errors import LaunchError

_MAX_SHOWN = 40
_NUMBER = r"[0-9]{1,9}"  # more digits count no processes; and Unicode knows digits that no launcher writes
_RANGES = rf"\[{_NUMBER}(?:-{_NUMBER})?(?:,{_NUMBER}(?:-{_NUMBER})?)*\]"
_HOSTS = rf"[A-Za-z0-9_.-]+(?:{_RANGES}[A-Za-z0-9_.-]*){{0,3}}"


def number(environ: Mapping[str, str], name: str) -> int:
    """The count in a variable that is set.

    Raises:
        LaunchError: it is no whole number from 0 on, or too large to count processes.
    Ranks: local.
    """
    value = environ[name]
    if not re.fullmatch(_NUMBER, value):
        is_large = re.fullmatch("[0-9]+", value)
        fault = "is too large to count processes" if is_large else "is not a whole number from 0 on"
        raise LaunchError(f"{name}={_short(repr(value))} {fault}: set it right, or unset it.")
    return int(value)


def shown(environ: Mapping[str, str], *names: str) -> str:
    """Those of the variables that are set, as `NAME=value NAME=value`, for a message.

    Ranks: local.
    """
    return " ".join(f"{name}={_plain(environ[name])}" for name in dict.fromkeys(names) if name in environ)


def task_count(environ: Mapping[str, str], name: str, node: int) -> tuple[int, int]:
    """How many tasks a node has, and how many there are, in Slurm's list: 1 and 7 for node 3 of "2(x3),1".

    Nothing is expanded, so that no value makes a list as long as the number in it.

    Returns:
        0 for a node that is not in the list.
    Raises:
        LaunchError: it has another form.
    Ranks: local.
    """
    here = total = 0
    for part in environ[name].split(","):
        match = re.fullmatch(rf"({_NUMBER})(?:\(x({_NUMBER})\))?", part)
        if match is None:
            raise LaunchError(
                f"{name}={_short(repr(environ[name]))} is no list of task counts such as 2(x3),1. "
                "Start through srun, or unset it."
            )
        count, num_nodes = int(match[1]), int(match[2] or 1)
        here += count if 0 <= node < num_nodes else 0
        node -= num_nodes
        total += count * num_nodes
    return here, total


def hosts(environ: Mapping[str, str], name: str) -> Iterator[str]:
    """The hosts of a Slurm node list, one by one: n07, n08, n12 and gpu3 of "n[07-08,12],gpu3".

    A generator, so that no value makes a list as long as the range in it.

    Raises:
        LaunchError: it has another form.
    Ranks: local.
    """
    value = environ[name]
    ranges = [numbers for bracket in re.findall(_RANGES, value) for numbers in re.findall("([0-9]+)-([0-9]+)", bracket)]
    if not re.fullmatch(rf"{_HOSTS}(?:,{_HOSTS})*", value) or any(int(first) > int(last) for first, last in ranges):
        raise LaunchError(
            f"{name}={_short(repr(value))} is no node list such as n[1-4],gpu3. Set MASTER_ADDR to the node of rank 0."
        )
    for part in re.findall(_HOSTS, value):
        yield from _expand(part)


def _expand(part: str) -> Iterator[str]:
    """The hosts of one part of a node list, the last bracket running fastest."""
    before, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    ranges, _, after = rest.partition("]")
    for numbers in ranges.split(","):
        first, _, last = numbers.partition("-")
        for value in range(int(first), int(last or first) + 1):
            for end in _expand(after):
                yield f"{before}{value:0{len(first)}d}{end}"


def _plain(value: str) -> str:
    return _short(value) if re.fullmatch(r"[!-~]+", value) else _short(ascii(value))


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
