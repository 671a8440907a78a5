"""Is everybody here, and is everybody who they say they are? Asked through the store, before any process group.

Every rank leaves a row; rank 0 judges all of them when the last has come, and every rank reads the verdict. Who gives
up first leaves a verdict too, so that all hear the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from rankwise.errors import LaunchError, MissingRanksError, RankwiseError, StoppedError
from rankwise.identity import ASSUMED, Identity
from rankwise.store import container, machine, wait_until

STOP_GRACE_SECONDS = 5.0
"""How long a rank that was asked to stop still waits for the others to start."""

PART_SECONDS = 3.0
"""How long rank 0 waits, after a start that failed, for the others to hear why."""

VERIFIED = "store"
"""The source of a field that the environment did not prove, once all ranks have told where they are."""

_LOCAL_FIELDS = ("local_rank", "node_rank", "local_world_size", "num_nodes")
_MAX_NAMED = 16

Row = dict[str, Any]
Judge = Callable[[Sequence[Row]], Row]
Check = Callable[[], None]


def call_roll(
    store: Store, identity: Identity, timeout: timedelta, is_stopped: Callable[[], bool]
) -> tuple[Identity, bool]:
    """This process's identity as all ranks together see it, and whether all of them share one machine.

    What the environment only let us assume is corrected here; what it proves is compared.

    Raises:
        LaunchError: two processes claim one rank, or the ranks contradict each other; on every rank.
        MissingRanksError: when the time is up.
        StoppedError: this process was asked to stop first.
    Ranks: every rank must call.
    """
    row = {
        **{name: getattr(identity, name) for name in ("rank", "world_size", "hostname", *_LOCAL_FIELDS)},
        "assumed": _assumed(identity),
        "machine": machine(),
        "container": container(),
        "pid": os.getpid(),
    }
    claimed = store.compare_set(f"roll/{identity.rank}", "", json.dumps(row))
    other = json.loads(claimed)
    verdict = None
    if (other["pid"], other["machine"]) != (row["pid"], row["machine"]):
        verdict = {"kind": "launch", "error": _claimed_twice(row, other)}
    first_size = json.loads(store.compare_set("roll/world_size", "", json.dumps([identity.world_size, identity.rank])))
    if first_size[0] != identity.world_size:
        verdict = {
            "kind": "launch",
            "error": f"rank {first_size[1]} says WORLD_SIZE={first_size[0]}, rank {identity.rank} on "
            f"{identity.hostname} says WORLD_SIZE={identity.world_size}. Start all processes with the same number.",
        }
    answer = consult(store, "roll", row, judge_places, timeout, is_stopped, verdict=verdict)
    place = answer["places"].get(str(identity.rank), {})
    sources = {**identity.sources, **{name: VERIFIED for name in row["assumed"] if answer["proven"]}}
    return dataclasses.replace(identity, **place, sources=sources), bool(answer["one_machine"])


def _assumed(identity: Identity) -> list[str]:
    if identity.sources.get("local_rank") == ASSUMED:
        return list(_LOCAL_FIELDS)  # where the others come from, they rest on one process per node
    return [name for name in _LOCAL_FIELDS if identity.sources.get(name) == ASSUMED]


def consult(
    store: Store,
    name: str,
    row: Row,
    judge: Judge,
    timeout: timedelta,
    is_stopped: Callable[[], bool],
    *,
    check: Check = lambda: None,
    verdict: Row | None = None,
) -> Row:
    """What rank 0 makes of the rows of all ranks: the same answer, or the same error, on every rank.

    Args:
        row: of this rank; JSON, with its "rank" and "world_size".
        judge: runs on rank 0 alone; an answer with an "error" is raised on every rank.
        check: runs while this rank waits; what it raises ends the wait.
        verdict: this rank knows already how this ends, and tells the others.
    Ranks: every rank must call.
    """
    rank, world_size = row["rank"], row["world_size"]
    key = f"{name}/verdict"
    store.compare_set(f"{name}/{rank}", "", json.dumps(row))
    if verdict is not None:
        # A process that comes when all is judged is refused alone.
        told = json.loads(store.compare_set(key, "", json.dumps(verdict)))
        raise _error_of(verdict | {"judged": told == verdict})
    if store.add(f"{name}/num", 1) == world_size:
        store.set(f"{name}/complete", "")

    def is_judged() -> bool:
        try:
            return is_verdict_there()
        except (dist.DistError, RuntimeError) as lost:
            raise RankwiseError(
                f"rank {rank} lost rank 0 while the ranks gathered: {str(lost).splitlines()[0]} See its output."
            ) from None

    def is_verdict_there() -> bool:
        if store.check([key]):
            return True
        check()
        if rank == 0 and store.check([f"{name}/complete"]):
            rows = [json.loads(text) for text in store.multi_get([f"{name}/{other}" for other in range(world_size)])]
            store.compare_set(key, "", json.dumps(judge(rows)))
            return True
        return False

    try:
        judged = wait_until(is_judged, timeout.total_seconds(), is_stopped, STOP_GRACE_SECONDS)
        if not judged:
            raise _missing(store, name, world_size, timeout, stopped=is_stopped())
    except BaseException as gave_up:
        # Those who still wait must not wait for a rank that has left.
        told = _tell(store, key, gave_up, rank)
        if not isinstance(gave_up, MissingRanksError) or told is None or "error" in told:
            _part(store, name, rank)
            raise
        # The last rank came in the very moment in which the time was up, and the others go on.
    answer: Row = json.loads(store.get(key))
    if "error" in answer:
        _part(store, name, rank)
        raise _error_of(answer)
    return answer


def _part(store: Store, name: str, rank: int) -> None:
    """After a bad end: rank 0, whose process may host the store, leaves when the others who came have heard of it."""
    deadline = time.monotonic() + PART_SECONDS
    with contextlib.suppress(RuntimeError):
        num_heard = store.add(f"{name}/heard", 1)
        while rank == 0 and num_heard < store.add(f"{name}/num", 0) and time.monotonic() < deadline:
            time.sleep(0.02)
            num_heard = store.add(f"{name}/heard", 0)


def judge_places(rows: Sequence[Mapping[str, Any]]) -> Row:
    """Whether the ranks' places fit together, and the places of those whose environment did not prove theirs.

    Processes of one host are a node where nobody knows better. Pure.

    Ranks: local; rank 0's answer is everybody's.
    """
    one_machine = len({row["machine"] for row in rows}) == 1
    answer: Row = {"places": {}, "proven": True, "one_machine": one_machine}
    if not any(row["assumed"] for row in rows):
        error = _contradiction(rows)
        return {"kind": "launch", "error": error} if error else answer
    nodes: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        nodes[row["hostname"], row["machine"], row["container"]].append(row)
    places = []
    for node_rank, members in enumerate(nodes.values()):
        for local_rank, row in enumerate(members):
            seen = {"local_rank": local_rank, "node_rank": node_rank}
            seen |= {"local_world_size": len(members), "num_nodes": len(nodes)}
            places.append({**row, **{name: seen[name] for name in row["assumed"]}})
    if (error := _contradiction(places)) is not None:
        # Launchers may put several nodes on one host: then host names prove nothing, and assumptions stay assumed.
        if any({"local_rank", "local_world_size"} - set(row["assumed"]) for row in rows):
            return answer | {"proven": False}
        return {"kind": "launch", "error": error}
    for place in places:
        row = rows[place["rank"]]
        changed = {name: place[name] for name in row["assumed"] if place[name] != row[name]}
        if changed:
            answer["places"][str(row["rank"])] = changed
    return answer


def _contradiction(rows: Sequence[Mapping[str, Any]]) -> str | None:
    sizes = Counter(row["node_rank"] for row in rows)
    seen: dict[tuple[int, int], Mapping[str, Any]] = {}
    for row in rows:
        place = (row["node_rank"], row["local_rank"])
        if place in seen:
            first = seen[place]
            return (
                f"rank {first['rank']} (pid {first['pid']} on {first['hostname']}) and rank {row['rank']} (pid "
                f"{row['pid']} on {row['hostname']}) both say local rank {place[1]} of node {place[0]}. Give each "
                "process of a node a LOCAL_RANK of its own, and each node a GROUP_RANK of its own."
            )
        seen[place] = row
    for row in rows:
        if sizes[row["node_rank"]] != row["local_world_size"]:
            return (
                f"rank {row['rank']} on {row['hostname']} says that {row['local_world_size']} processes are on node "
                f"{row['node_rank']}, but {sizes[row['node_rank']]} came. Set LOCAL_WORLD_SIZE to the number of "
                "processes on that node."
            )
        if row["num_nodes"] != len(sizes):
            return (
                f"rank {row['rank']} on {row['hostname']} says that there are {row['num_nodes']} nodes, but ranks of "
                f"{len(sizes)} came. Set GROUP_WORLD_SIZE to the number of nodes on all of them."
            )
    return None


def _error_of(answer: Mapping[str, Any]) -> RankwiseError:
    error = (LaunchError if answer["kind"] == "launch" else RankwiseError)(answer["error"])
    error.on_every_rank = answer.get("judged", True)
    return error


def _claimed_twice(row: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    return (
        f"two processes claim rank {row['rank']}: pid {other['pid']} on {other['hostname']} and pid {row['pid']} on "
        f"{row['hostname']}. Each process needs a RANK of its own: see that the launcher sets it, that no script "
        "exports a fixed one, and that the job was not started twice with one address."
    )


def _missing(store: Store, name: str, world_size: int, timeout: timedelta, *, stopped: bool) -> RankwiseError:
    missing = [rank for rank in range(world_size) if not store.check([f"{name}/{rank}"])]
    shown = ", ".join(map(str, missing[:_MAX_NAMED])) + (", ..." if len(missing) > _MAX_NAMED else "")
    when = "when this one was asked to stop" if stopped else f"within {timeout.total_seconds():g} s"
    told = f"{world_size - len(missing)} of {world_size} ranks started {when}"
    if missing:
        told += f"; missing: rank {shown}"
    told += ". See the output of those, or give more time (timeout_seconds)."
    return StoppedError(told) if stopped else MissingRanksError(told, tuple(missing))


def _tell(store: Store, key: str, error: BaseException, rank: int) -> Row | None:
    """Leave the error as the verdict; what comes back is the verdict that was there first, None where all is lost."""
    kind = "launch" if isinstance(error, LaunchError) else "other"
    words = f"rank {rank} gave up: {type(error).__name__}: {error}"
    with contextlib.suppress(RuntimeError):  # the store is gone, and with it everybody who could be told
        verdict: Row = json.loads(
            store.compare_set(key, "", json.dumps({"kind": kind, "error": words, "judged": False}))
        )
        return verdict
    return None
