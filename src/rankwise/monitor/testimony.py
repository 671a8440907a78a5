"""What each rank does once a hang is declared: write where it is, tell of peers that cannot, end if asked."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from rankwise import lastwords, logs
from rankwise.errors import RankFailure, RankwiseError
from rankwise.monitor.blame import Row
from rankwise.monitor.peers import facts_as_text, kill_process, look_at_process
from rankwise.monitor.stacks import torch_collectives, write_stacks
from rankwise.session import Session
from rankwise.store import in_thread

T = TypeVar("T")

NOTE_SECONDS = 1.0
"""After the order: when the main process lets everybody hear of the failure; the stacks are written by then."""

END_SECONDS = 2.0
"""After the order: when the ranks that hang end; the others a second later, so that launchers name the right one."""

_HELD_SECONDS = 2.0
_ASK_SECONDS = 0.5
_FAILURE = "Hang"
_logger = logs.get_logger(__name__)


@dataclass(frozen=True)
class Order:
    """What whoever declares a hang asks of every rank."""

    number: int
    folder: str | None
    """Its name in RUN/hangs; None where nothing can be written."""
    causes: tuple[int, ...]
    end: bool = False
    failure: Mapping[str, Any] = field(default_factory=dict)
    """The `RankFailure` that the job ends with."""
    deaf: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By rank those that cannot speak: `reporter` (the rank that does it), `pid`, `started`, `left`."""
    alone: bool = False
    """Whether the main process is among the deaf, so that every rank hears of the failure from itself."""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Order:
        """From what `asdict` made of one."""
        known = {name: told[name] for name in cls.__dataclass_fields__ if name in told}
        return cls(**{**known, "causes": tuple(told["causes"])})


def failure_of(row: Row, stacks: str | None) -> RankFailure:
    """A rank that hangs, as the failure that ends the job.

    Ranks: local.
    """
    place = f" ({row.where})" if row.where else ""
    inner = f" in {row.collective or row.phase}" if row.collective or row.phase else ""
    did = "it left the loop" if row.left else f"it made no progress for {row.idle_seconds:.0f} s{inner}{place}"
    message = f"{did} after step {row.step}, and the job was not to wait for it (on_hang='end')"
    message += f". Stacks: {stacks}" if stacks is not None else ""
    return RankFailure(row.rank, row.host, _FAILURE, message, device=row.device, pid=row.pid or None)


def held_path(run_dir: Path, rank: int) -> Path:
    """Where the timer that a held GIL does not stop writes the stacks of a rank.

    Ranks: local.
    """
    return run_dir / "hangs" / "held" / f"rank-{rank:05d}.txt"


def carry_out(
    order: Order, session: Session, row: Row, is_over: Callable[[], bool], release: Callable[[], None]
) -> None:
    """Do what the order says, in a thread of its own: a disk that hangs may be the reason for all of it.

    Args:
        is_over: whether the session has ended by itself: then this rank needs no help to end.
        release: called before this process is ended.
    Ranks: local.
    """
    has_duty = any(told["reporter"] == row.rank for told in order.deaf.values())

    def work() -> None:
        _Testimony(order, session, row, is_over, release).give()

    # Who has to end a peer does so before it ends itself.
    threading.Thread(target=work, name="rankwise-hang", daemon=not (order.end and has_duty)).start()


def within(seconds: float, call: Callable[[], T], name: str) -> T | None:
    """What the call gives, None where it raises, or takes longer; then it goes on by itself.

    Ranks: local.
    """
    answer: Future[T] = in_thread(call, name)
    try:
        return answer.result(seconds)
    except Exception:
        return None


class _Testimony:
    def __init__(
        self, order: Order, session: Session, row: Row, is_over: Callable[[], bool], release: Callable[[], None]
    ) -> None:
        self._order = order
        self._session = session
        self._row = row
        self._is_over = is_over
        self._release = release
        self._begin = time.monotonic()
        name = order.folder
        self._folder = session.run_dir / "hangs" / name if session.run_dir is not None and name is not None else None

    def give(self) -> None:
        mine = {int(rank): told for rank, told in self._order.deaf.items() if told["reporter"] == self._row.rank}
        is_cause = self._row.rank in self._order.causes
        files = in_thread(lambda: self._write(mine, is_cause), "rankwise-hang-files")
        if not self._order.end:
            return
        self._pause(NOTE_SECONDS)
        failure = RankFailure(**self._order.failure)
        if self._order.alone or self._session.identity.is_main_process:
            # The launcher first: it hears of the processes that are ended here from the system.
            lastwords.tell_launcher(failure)
            self._session.note_hang(failure, only_here=self._order.alone)
        if mine:
            with contextlib.suppress(Exception):
                files.result(_HELD_SECONDS + 1.0)  # what is killed can be asked no more
            # Not before the hang is known for the first failure, or the killed one would be.
            self._session.first_failure(END_SECONDS)
            if self._order.alone:
                self._pause(END_SECONDS + 1.0)  # the others come to it one after the other
            for rank, told in mine.items():
                if not told.get("left") and kill_process(told["pid"], told["started"]):
                    self._forget_held(rank)
        self._pause(END_SECONDS if is_cause else END_SECONDS + (2.0 if self._order.alone else 1.0))
        if not self._is_over():
            self._end(failure, is_cause)

    def _pause(self, until_seconds: float) -> None:
        time.sleep(max(0.0, self._begin + until_seconds - time.monotonic()))

    def _write(self, mine: Mapping[int, Mapping[str, Any]], is_cause: bool) -> None:
        if self._folder is None:
            if is_cause and sys.__stderr__ is not None:
                write_stacks(sys.__stderr__, f"rankwise: the stacks of rank {self._row.rank}, which hangs")
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / f"rank-{self._row.rank:05d}.txt", "w") as file:
                write_stacks(file, _headline(self._row))
                _write_collectives(file)
            for rank, told in mine.items():
                self._write_for(rank, told)
        except OSError as error:
            _logger.warning("the stacks of a hang could not be written to %s: %s", self._folder, error)

    def _write_for(self, rank: int, told: Mapping[str, Any]) -> None:
        """The file of a rank that cannot write its own."""
        assert self._folder is not None
        assert self._session.run_dir is not None
        if told.get("left"):
            return
        facts = look_at_process(told["pid"], told["started"])
        by = f"rank {rank} does not answer; rank {self._row.rank} of the same host wrote this\n"
        with contextlib.suppress(FileExistsError), open(self._folder / f"rank-{rank:05d}.txt", "x") as file:
            file.write(f"{by}{json.dumps(dict(told))}\n{facts_as_text(facts)}")
            file.flush()
            # A process that was stopped had no time to write; one that holds its GIL did, or does it now.
            deadline = time.monotonic() + (0.0 if facts["state"] in ("gone", "T", "t", "Z", "X") else _HELD_SECONDS)
            held = held_path(self._session.run_dir, rank)
            while not (stacks := _read(held)) and time.monotonic() < deadline:
                time.sleep(0.05)
            file.write(f"\nits stacks, from the timer that needs no GIL:\n{stacks}" if stacks else "")

    def _forget_held(self, rank: int) -> None:
        """Remove the file that a killed rank had opened for its timer, if nothing came of it."""
        if self._session.run_dir is not None:
            with contextlib.suppress(OSError):
                path = held_path(self._session.run_dir, rank)
                if path.stat().st_size == 0:
                    path.unlink()

    def _end(self, failure: RankFailure, is_cause: bool) -> None:
        """End this process, whose main thread may be stuck for ever, so without any of its clean-up."""
        if is_cause:
            lastwords.tell_torchrun(RankwiseError(failure.message))
        lastwords.tell_launcher(failure)
        within(1.0, self._session.flush_logs, "rankwise-hang-logs")
        within(1.0, self._release, "rankwise-hang-release")
        os._exit(1)


def _headline(row: Row) -> str:
    inside = f"phase {row.phase or 'none'}" + (f", in {row.collective}" if row.collective else "")
    told = asdict(row)
    kept = {name: told[name] for name in ("rank", "host", "device", "pid", "step", "phase", "collective", "where")}
    return (
        f"rank {row.rank} ({row.host}, {row.device}, pid {row.pid}): {row.step} steps finished, {inside}, "
        f"{row.idle_seconds:.1f} s without progress, at {row.where or 'an unknown place'}\n{json.dumps(kept)}"
    )


def _write_collectives(file: IO[str]) -> None:
    """The last operations of torch's process groups, where torch keeps them; it may not answer."""
    told = within(_ASK_SECONDS, lambda: torch_collectives(10), "rankwise-hang-torch") or {}
    if told:
        lines = [
            f"  {entry.get('profiling_name')} number {entry.get('collective_seq_id')} of group "
            f"{entry.get('process_group')}: {entry.get('state')}, sizes {entry.get('input_sizes')}"
            for entry in told["last"]
        ]
        file.write("\n".join(["", f"torch has begun {told['enqueued']} collectives; the last:", *lines, ""]))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
