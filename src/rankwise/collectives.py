"""What ranks do together, over the CPU: small messages, and failures that reach everybody.

Everything here works at world size 1 without a process group too. Messages between the ranks of one job are
pickled; nothing that comes from a file or from outside the job is.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from rankwise.errors import RankFailedError, RankFailure, RankwiseError

P = ParamSpec("P")
T = TypeVar("T")

_NO_ERROR: RankwiseError | None = None
_cpu_group: dist.ProcessGroup | None = None


def use_cpu_group(group: dist.ProcessGroup | None) -> None:
    """Send the messages of this module through `group`; None means the default group.

    Ranks: every rank must call, with the same group. Sessions do.
    """
    global _cpu_group
    _cpu_group = group


def barrier() -> None:
    """Wait until every rank has come here.

    Ranks: every rank must call.
    """
    agree(True)


def agree(flag: bool, how: Literal["any", "all"] = "any") -> bool:
    """Whether any rank's, or all ranks' flags are True: the same answer on every rank.

    Ranks: every rank must call.
    """
    if not dist.is_initialized():
        return bool(flag)
    vote = torch.tensor([int(flag)], dtype=torch.int32)
    dist.all_reduce(vote, dist.ReduceOp.MAX if how == "any" else dist.ReduceOp.MIN, group=_cpu_group)
    return bool(vote.item())


def broadcast_object(obj: T, source: int = 0) -> T:
    """The object of rank `source`, on every rank; what the others pass is ignored.

    Ranks: every rank must call.
    """
    if not dist.is_initialized():
        return obj
    box = [obj if dist.get_rank() == source else None]
    dist.broadcast_object_list(box, src=source, group=_cpu_group, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def gather_objects(obj: T) -> list[T]:
    """The objects of all ranks in the order of ranks, on every rank.

    Ranks: every rank must call.
    """
    if not dist.is_initialized():
        return [obj]
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, obj, group=_cpu_group)
    return rows


def reduce_mean(values: Mapping[str, float]) -> dict[str, float]:
    """The mean over ranks of every value, the same to the last bit on every rank.

    Args:
        values: the same keys on every rank; anything that `float` takes.
    Raises:
        RankwiseError: the keys differ between ranks.
    Ranks: every rank must call.
    """
    rows = gather_objects({name: float(value) for name, value in values.items()})
    for rank, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            differing = ", ".join(sorted(row.keys() ^ rows[0].keys()))
            error = RankwiseError(
                f"rank {rank} and rank 0 report different values ({differing}), so they have no mean. "
                "Report the same names on every rank."
            )
            error.on_every_rank = True
            raise error
    # Summed in the order of ranks: an all-reduce may add in another order on another run.
    return {name: sum(row[name] for row in rows) / len(rows) for name in values}


def on_main_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns on the main process, where alone it runs, on every rank.

    Raises:
        RankwiseError: the main process raised this one; every rank raises an equal one.
        RankFailedError: the main process raised anything else; its traceback is in the message. SystemExit and
            KeyboardInterrupt stay themselves on the main process.
    Ranks: every rank must call; the others wait. The result must pickle.
    """
    if not dist.is_initialized():
        return function(*args, **kwargs)
    if dist.get_rank() != 0:
        outcome: _Outcome[T] = pickle.loads(broadcast_object(b""))
        if outcome.error is not None:
            raise outcome.error
        return outcome.value  # type: ignore[return-value]
    try:
        value = function(*args, **kwargs)
        payload = pickle.dumps(_Outcome(value))
    except BaseException as error:
        everywhere = _for_every_rank(error)
        broadcast_object(pickle.dumps(_Outcome(error=everywhere)))
        if everywhere is error or not isinstance(error, Exception):
            raise
        raise everywhere from error
    broadcast_object(payload)
    return value


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The main process runs the block first, alone; the others after it, or they raise if it failed.

    Raises:
        RankFailedError, RankwiseError: on the other ranks before their block starts; as `on_main_process`.
    Ranks: every rank must enter.
    """
    if not dist.is_initialized():
        yield
    elif dist.get_rank() != 0:
        error = broadcast_object(_NO_ERROR)
        if error is not None:
            raise error
        yield
    else:
        try:
            yield
        except BaseException as error:
            broadcast_object(_for_every_rank(error))
            raise
        broadcast_object(_NO_ERROR)


def raise_together(error: Exception | None) -> None:
    """Raise on every rank if any rank has an error; return on every rank if none has.

    Raises:
        RankFailedError: names every rank that failed; chained to this rank's own error where it has one.
    Ranks: every rank must call.
    """
    rows = gather_objects(describe(error) if error is not None else None)
    failures = tuple(failure for failure in rows if failure is not None)
    if failures:
        together = RankFailedError(failures)
        together.on_every_rank = True
        raise together from error


def describe(error: BaseException) -> RankFailure:
    """An error of this rank in a form that can travel.

    Ranks: local.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    return RankFailure.of(error, rank=rank, host=socket.gethostname())


@dataclass
class _Outcome(Generic[T]):
    value: T | None = None
    error: RankwiseError | None = None


def _for_every_rank(error: BaseException) -> RankwiseError:
    """The error itself where it is one of ours and survives the journey, else one that tells of it."""
    if isinstance(error, RankwiseError):
        error.on_every_rank = True
        with contextlib.suppress(Exception):
            if type(pickle.loads(pickle.dumps(error))) is type(error):
                return error
    failed = RankFailedError((describe(error),))
    failed.on_every_rank = True
    return failed
