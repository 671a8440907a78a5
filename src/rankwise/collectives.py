"""What ranks do together, over the CPU: small messages, and failures that reach everybody.

A wait ends when all have come, when the time is up (the ranks that are missing are named, with what each was doing), or
when another rank has failed or died (it is named, with its traceback). Everything here works at world size 1 without a
process group too. Messages between the ranks of one job are pickled; nothing that comes from a file or from outside the
job is.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions

from rankwise.errors import MissingRanksError, RankFailedError, RankFailure, RankwiseError
from rankwise.waiting import link

P = ParamSpec("P")
T = TypeVar("T")

SEND_SECONDS = 5.0
"""How long a rank that failed in what it does for others waits for them to come and hear it."""

_Send = Callable[[bytes, float | None], None]


def barrier(name: str = "", timeout_seconds: float | None = None) -> None:
    """Wait until every rank has come here.

    Args:
        name: what the barrier is for; it stands in messages, and ranks that wait at barriers of different names are
            told so.
        timeout_seconds: by default the session's.
    Raises:
        MissingRanksError: the time is up; it names the ranks that did not come and what each was last doing.
        RankFailedError: a rank failed or died.
        RankwiseError: other ranks are at another barrier or agreement.
    Ranks: every rank must call.
    """
    _vote(True, f"barrier {name!r}" if name else "barrier", timeout_seconds)


def agree(flag: bool, how: Literal["any", "all"] = "any") -> bool:
    """Whether any rank's, or all ranks' flags are True: the same answer on every rank.

    Raises:
        MissingRanksError, RankFailedError, RankwiseError: as `barrier`.
    Ranks: every rank must call.
    """
    if how == "all":
        return not _vote(not flag, "agree on all", None)
    return _vote(bool(flag), "agree on any", None)


def broadcast_object(obj: T, source: int = 0) -> T:
    """The object of rank `source`, on every rank; what the others pass is ignored.

    Raises:
        MissingRanksError, RankFailedError: as `barrier`.
        RankwiseError: there is no such rank.
    Ranks: every rank must call. The object must pickle.
    """
    _require_rank(source)
    if not dist.is_initialized():
        return obj
    payload = pickle.dumps(obj) if dist.get_rank() == source else b""
    received = _broadcast(payload, source, f"broadcast from rank {source}")
    return obj if dist.get_rank() == source else pickle.loads(received)


def gather_objects(obj: T) -> list[T]:
    """The objects of all ranks in the order of ranks, on every rank.

    Raises:
        MissingRanksError, RankFailedError: as `barrier`.
    Ranks: every rank must call. The object must pickle.
    """
    if not dist.is_initialized():
        return [obj]
    rows = _gather(torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8), "gather objects")
    return [pickle.loads(row.numpy().tobytes()) for row in rows]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, in the order of ranks, on every rank: for measures that each rank has of its own samples.

    Args:
        rows: shape n ..., any dtype, on any device; n may differ between ranks and may be 0. The other axes and the
            dtype must be equal.
    Returns:
        Shape (sum of n) ..., on the device of `rows`, without gradient; it travels over the CPU.
    Raises:
        RankwiseError: the shapes or dtypes do not fit; on every rank.
        MissingRanksError, RankFailedError: as `barrier`.
    Ranks: every rank must call.
    """
    kinds = gather_objects((tuple(rows.shape), str(rows.dtype)))
    for rank, (shape, dtype) in enumerate(kinds):
        if not shape or (shape[1:], dtype) != (kinds[0][0][1:], kinds[0][1]):
            raise _for_all(
                f"rank {rank} has rows of shape {shape} and {dtype}, rank 0 of shape {kinds[0][0]} and {kinds[0][1]}. "
                "Give rows (at least one axis) that are equal but for their number."
            )
    if not dist.is_initialized():
        return rows.detach().clone()
    flat = rows.detach().cpu().contiguous()
    parts = _gather(
        flat.view(-1).view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8), "gather rows"
    )
    whole = [
        part.view(rows.dtype).view(shape) if part.numel() else torch.empty(shape, dtype=rows.dtype)
        for part, (shape, _) in zip(parts, kinds, strict=True)
    ]
    return torch.cat(whole).to(rows.device)


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
            raise _for_all(
                f"rank {rank} and rank 0 report different values ({differing}), so they have no mean. "
                "Report the same names on every rank."
            )
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
    what = f"on_main_process({_name_of(function)})"
    if dist.get_rank() == 0:
        return _run_for_others(lambda: function(*args, **kwargs), _broadcaster(what))
    value: T = _take(_broadcast(b"", 0, what))
    return value


def on_local_main_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns on the local main process of this node, where alone it runs, on every rank of the node.

    Raises:
        RankFailedError: on the others, if the function raised; it raises its own error where it runs.
        RankwiseError: there is no session.
    Ranks: every rank of the node must call; the others wait. The result must pickle.
    """
    if not dist.is_initialized():
        return function(*args, **kwargs)
    what = f"on_local_main_process({_name_of(function)})"
    channel = link().node_channel()
    if channel.is_source:
        return _run_for_node(lambda: function(*args, **kwargs), channel.send)
    value: T = _take(channel.receive(what))
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
    elif dist.get_rank() == 0:
        with _first(_broadcaster("main_process_first"), _for_every_rank):
            yield
    else:
        _take(_broadcast(b"", 0, "main_process_first"))
        yield


@contextlib.contextmanager
def local_main_process_first() -> Iterator[None]:
    """The local main process of this node runs the block first; the node's others after it, or they raise if it failed.

    For what each node needs once: unpacking to a local disk, compiling an extension.

    Raises:
        RankFailedError: on the other ranks of the node before their block starts.
        RankwiseError: there is no session.
    Ranks: every rank of the node must enter.
    """
    if not dist.is_initialized():
        yield
        return
    channel = link().node_channel()
    if channel.is_source:
        with _first(lambda payload, timeout_seconds: channel.send(payload), _for_this_node):
            yield
    else:
        _take(channel.receive("local_main_process_first"))
        yield


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
    here = link().here
    host, device = here if here is not None else (socket.gethostname(), "")
    return RankFailure.of(error, rank=rank, host=host, device=device, pid=os.getpid())


@dataclass
class _Outcome(Generic[T]):
    value: T | None = None
    error: RankwiseError | None = None


def _run_for_others(function: Callable[[], T], send: _Send) -> T:
    """Run on the main process, and send the others what came of it."""
    try:
        value = function()
        payload = pickle.dumps(_Outcome(value))
    except BaseException as error:
        everywhere = _for_every_rank(error)
        _send_error(send, everywhere)
        if everywhere is error or not isinstance(error, Exception):
            raise
        raise everywhere from error
    send(payload, None)
    return value


def _run_for_node(function: Callable[[], T], send: Callable[[bytes], None]) -> T:
    """Run on a local main process. Its error is its own, and that of the job: other nodes know nothing of it yet."""
    try:
        value = function()
        payload = pickle.dumps(_Outcome(value))
    except BaseException as error:
        send(pickle.dumps(_Outcome[None](error=_for_this_node(error))))
        raise
    send(payload)
    return value


@contextlib.contextmanager
def _first(send: _Send, describe_error: Callable[[BaseException], RankwiseError]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        _send_error(send, describe_error(error))
        raise
    send(pickle.dumps(_Outcome[None]()), None)


def _send_error(send: _Send, error: RankwiseError) -> None:
    """Tell those who wait. Who is not there within seconds hears of it from the session, which this error will end."""
    with contextlib.suppress(MissingRanksError, RankFailedError):
        send(pickle.dumps(_Outcome[None](error=error)), SEND_SECONDS)


def _broadcaster(what: str) -> _Send:
    def send(payload: bytes, timeout_seconds: float | None) -> None:
        _broadcast(payload, 0, what, timeout_seconds)

    return send


def _take(payload: bytes) -> Any:
    outcome: _Outcome[Any] = pickle.loads(payload)
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


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


def _for_this_node(error: BaseException) -> RankwiseError:
    return RankFailedError((describe(error),), "failed first")


def _vote(flag: bool, what: str, timeout_seconds: float | None) -> bool:
    """Whether any rank's flag is set."""
    if not dist.is_initialized():
        return flag
    number = zlib.crc32(what.encode())
    # The largest and the smallest number of all ranks: they differ when ranks do different things here.
    vote = torch.tensor([int(flag), number, -number], dtype=torch.int64)
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
    link().run(lambda group: group.allreduce([vote], options), options, what, timeout_seconds)
    if vote[1] != -vote[2]:
        raise _for_all(f"{link().where_all_are(what)}. All ranks must come to the same calls in the same order.")
    return bool(vote[0])


def _broadcast(payload: bytes, source: int, what: str, timeout_seconds: float | None = None) -> bytes:
    size = torch.tensor([len(payload)], dtype=torch.int64)
    options = dist.BroadcastOptions()
    options.rootRank = source
    link().run(lambda group: group.broadcast([size], options), options, what, timeout_seconds)
    content = torch.empty(int(size), dtype=torch.uint8)
    if dist.get_rank() == source:
        content = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else content
    if content.numel():
        link().run(lambda group: group.broadcast([content], options), options, what, timeout_seconds)
    return content.numpy().tobytes()


def _gather(content: torch.Tensor, what: str) -> list[torch.Tensor]:
    """The bytes of all ranks: shape (n,) of uint8, each n its own."""
    world_size = dist.get_world_size()
    options = AllgatherOptions()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    size = torch.tensor([content.numel()], dtype=torch.int64)
    link().run(lambda group: group.allgather([sizes], [size], options), options, what, None)
    largest = max(int(each) for each in sizes)
    if largest == 0:
        return [torch.empty(0, dtype=torch.uint8)] * world_size
    padded = torch.zeros(largest, dtype=torch.uint8)
    padded[: content.numel()] = content
    gathered = [torch.empty(largest, dtype=torch.uint8) for _ in range(world_size)]
    link().run(lambda group: group.allgather([gathered], [padded], options), options, what, None)
    return [each[: int(length)] for each, length in zip(gathered, sizes, strict=True)]


def _require_rank(rank: int) -> None:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if not 0 <= rank < world_size:
        raise _for_all(f"there is no rank {rank} among {world_size}. Name one in 0..{world_size - 1}.")


def _for_all(message: str) -> RankwiseError:
    error = RankwiseError(message)
    error.on_every_rank = True
    return error


def _name_of(function: Callable[..., object]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
