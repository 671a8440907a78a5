"""Many ranks in few words, so that a line about 1024 of them stays a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MAX_GROUPS = 6
"""How many different values, ranges of ranks, or hosts are named before the rest is counted."""

_GIB = 1 << 30
_MIB = 1 << 20


def fold_ranks(ranks: Iterable[int]) -> str:
    """The ranks as ranges: "rank 3", "ranks 0-2, 7".

    Ranks: local.
    """
    ordered = sorted(set(ranks))
    ranges: list[tuple[int, int]] = []
    for rank in ordered:
        if ranges and ranges[-1][1] == rank - 1:
            ranges[-1] = (ranges[-1][0], rank)
        else:
            ranges.append((rank, rank))
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return ("rank " if len(ordered) == 1 else "ranks ") + fold_names(shown)


def fold_values(values: Mapping[int, str]) -> str:
    """What each rank says, equal words once: "ranks 0-511: 2.13.0; rank 512: 2.12.1".

    Ranks: local.
    """
    groups: dict[str, list[int]] = {}
    for rank in sorted(values):
        groups.setdefault(values[rank], []).append(rank)
    shown = [f"{fold_ranks(ranks)}: {value}" for value, ranks in groups.items()]
    return fold_names(shown, separator="; ")


def fold_same(values: Mapping[int, str]) -> str:
    """The value alone where all ranks say the same, else as `fold_values`.

    Ranks: local.
    """
    return next(iter(values.values())) if len(set(values.values())) == 1 else fold_values(values)


def fold_names(names: Iterable[str], *, separator: str = ", ") -> str:
    """The first few names, and how many more there are.

    Ranks: local.
    """
    listed = list(names)
    num_left = len(listed) - MAX_GROUPS
    if num_left <= 0:
        return separator.join(listed)
    return separator.join([*listed[:MAX_GROUPS], f"and {num_left} more"])


def show_bytes(num_bytes: float) -> str:
    """A size for people, in MiB or GiB.

    Ranks: local.
    """
    if num_bytes >= _GIB:
        return f"{num_bytes / _GIB:.1f} GiB"
    return f"{num_bytes / _MIB:.0f} MiB"
