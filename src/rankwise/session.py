"""One `with` block around a training script: who am I, where do I compute, where do I write, who stops us."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch

from rankwise import collectives, lastwords, logs, threads
from rankwise.device import select_device
from rankwise.errors import LaunchError, MissingRanksError, RankFailedError, RankFailure, RankwiseError
from rankwise.group import Connection, end_session, place_in_group, tell_contradiction
from rankwise.identity import Identity
from rankwise.parent import end_with_parent
from rankwise.rundir import RunFile, cannot_write
from rankwise.waiting import FIRST_FAILURE_SECONDS, TIMEOUT_SECONDS, is_lost_connection

_logger = logs.get_logger(__name__)
_open_session: Session | None = None


class Session:
    """What `init` gives: this process's place, device and run directory, and the word of the others.

    Attributes:
        identity: this process's place in the job.
        device: where it computes.
        run_dir: where the run writes, or None.
        timeout_seconds: how long a rank waits for the others in a collective.
    """

    def __init__(
        self, identity: Identity, device: torch.device, run_dir: Path | None, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        self.identity = identity
        self.device = device
        self.run_dir = run_dir
        self.timeout_seconds = timeout_seconds
        self._stop_requested = False
        self._is_terminated = False
        self._failed = False
        self._logs: logs.LogHandle | None = None
        self._connection: Connection | None = None

    @property
    def stop_requested(self) -> bool:
        """Whether this process was asked to stop, by SIGTERM, Ctrl-C or `request_stop`.

        Ranks: local; to stop at the same step on every rank ask `agree_to_stop`.
        """
        return self._stop_requested

    def request_stop(self) -> None:
        """Ask for a stop at the next `agree_to_stop`, as a signal would.

        Ranks: local; one rank is enough.
        """
        self._stop_requested = True

    def agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop: the same answer on every rank.

        Ranks: every rank must call.
        """
        return collectives.agree(self._stop_requested)

    def set_step(self, step: int | None) -> None:
        """Let log records carry the step from now on.

        Ranks: local.
        """
        logs.set_step(step)

    def first_failure(self, timeout_seconds: float = FIRST_FAILURE_SECONDS) -> RankFailure | None:
        """The failure that was noted first in the whole job, by order of arrival; None if none comes in time.

        Ranks: local.
        """
        return self._connection.first_failure(timeout_seconds) if self._connection is not None else None

    def note_hang(self, failure: RankFailure, *, only_here: bool = False) -> None:
        """Let a rank that hangs be the first failure of the job: what waits in our collectives raises it.

        Args:
            only_here: the main process does not answer, so this rank alone takes it for that.
        Ranks: local.
        """
        if self._connection is not None:
            self._connection.learn(failure) if only_here else self._connection.note(failure)

    def flush_logs(self) -> None:
        """Bring the log file and the console up to date.

        Ranks: local.
        """
        if self._logs is not None:
            self._logs.flush()

    @property
    def token(self) -> str:
        """A name of this session, the same on all ranks; empty at world size 1.

        Ranks: local.
        """
        return self._connection.token if self._connection is not None else ""

    def _surface(self, error: BaseException) -> RankFailedError | None:
        """Tell the others of this rank's error, or learn whose failure caused it, and settle who prints what."""
        if isinstance(error, SystemExit) and error.code in (0, None):
            return None
        if self._logs is not None:
            _logger.error("the session ends with %s", type(error).__name__, exc_info=error, extra=logs.FILE_ONLY)
        is_main = self.identity.is_main_process
        if isinstance(error, RankwiseError) and error.on_every_rank:
            # One rank speaks for all.
            if not is_main:
                lastwords.set_last_words(error, "")
            elif isinstance(error, RankFailedError):
                lastwords.set_last_words(error, f"rankwise: {error}")
            return None
        consequence = None
        if isinstance(error, RankFailedError) and error.verb == "failed first":
            first: RankFailure | None = error.failures[0]
            consequence = error
        elif is_lost_connection(error) and (first := self.first_failure(FIRST_FAILURE_SECONDS)) is not None:
            consequence = RankFailedError((first,), "failed first")
        if consequence is None:
            assert self._connection is not None, "there is one before anything can fail"
            first = self._connection.note_failure(error)
            # Ranks that only lost a connection leave none.
            lastwords.tell_torchrun(error)
        if first is None or isinstance(error, SystemExit | KeyboardInterrupt):
            return None  # nobody else speaks of it
        self._speak(error if consequence is None else consequence, first)
        return consequence if consequence is not error else None

    def _speak(self, error: BaseException, first: RankFailure) -> None:
        """Let the first failure of the job be printed once, where a person looks last."""
        assert self._connection is not None, "there is one before anything can fail"
        is_own = first.rank == self.identity.rank
        words = ""
        if lastwords.has_launcher():
            lastwords.tell_launcher(first)
        elif self._is_speaker(first):
            self._connection.tell_once(first)
        if not is_own and not isinstance(error, RankFailedError | MissingRanksError):
            words = f"rankwise: rank {self.identity.rank} failed after it: {type(error).__name__}: {error}"
        lastwords.set_last_words(error, words)

    def _is_speaker(self, first: RankFailure) -> bool:
        """Whether this rank prints the first failure: the main process does, and where it died one or two a node."""
        if first.rank == 0 and first.is_loss:
            return self.identity.is_local_main_process or self.identity.rank == 1
        return self.identity.is_main_process


@contextlib.contextmanager
def init(
    run_dir: str | os.PathLike[str] | None = None,
    *,
    device_type: str | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    backend: str | None = None,
    make_group: bool = False,
    share_devices: bool = False,
    bind_cpus: bool = False,
    log_level: int | str = "INFO",
    capture_prints: bool = False,
) -> Iterator[Session]:
    """Set this process up for a run on all its ranks, and clean up at the end whatever happens.

    In this order: stop signals, identity (compared between all ranks), device, logs, process group, run.json. World
    size 1 needs no environment and makes no process group. A process group that exists already is used and left alone.

    SIGTERM or Ctrl-C while a rank starts is kept for the first `agree_to_stop`; if the others do not come within
    seconds of it, the start ends with an error. A second Ctrl-C is a KeyboardInterrupt at once, a second SIGTERM ends
    the process.

    torch computes with this node's cores divided by its processes where OMP_NUM_THREADS does not say otherwise.

    An error that ends the body is told to all ranks. The main process, or `rankwise run`, prints the first one of the
    job once, with its rank, host, device and traceback, and ranks that only lost their connection print nothing.

    Args:
        run_dir: gets run.json and a log file per rank; nothing is written without it.
        device_type, share_devices: as `select_device`.
        timeout_seconds: how long a rank waits for the others, at the start and in every collective.
        backend: of the process group; by default gloo on CPU, joined by NCCL on CUDA (torch's choice on others).
            One without gloo on the CPU gets a second group for messages.
        make_group: make a process group at world size 1 too, on loopback.
        bind_cpus: keep this process on cores of its own near its device; as `rankwise.bind_cpus`.
        log_level: records below it go nowhere, but for loggers that have a level of their own.
        capture_prints: what `print` writes becomes INFO records: on the console of the main process alone.
    Raises:
        LaunchError: the environment contradicts itself, or the ranks contradict each other.
        DeviceError: there is no device (at world size 1; otherwise RankFailedError on every rank), or two ranks are on
            one.
        MissingRanksError: ranks did not start in time; it names them.
        StoppedError: asked to stop before all had started.
        RankFailedError: another rank could not start, or failed first.
        RankwiseError: `run_dir` cannot be written, or another job of this host writes there.
    Ranks: every rank must enter.
    """
    if _open_session is not None:
        raise RankwiseError("a session is open already in this process. Close it before the next `init`.")
    try:
        identity = place_in_group(Identity.resolve(os.environ, hostname=socket.gethostname()))
        end_with_parent()
    except LaunchError as error:
        tell_contradiction(error, os.environ)
        raise
    session = Session(identity, torch.device("cpu"), Path(run_dir) if run_dir is not None else None, timeout_seconds)
    run_file = RunFile(session.run_dir) if session.run_dir is not None else None
    connection = Connection(lambda: session.stop_requested, timedelta(seconds=timeout_seconds))
    session._connection = connection
    with contextlib.ExitStack() as stack:
        # First, so that a stop does not kill a rank that others may wait for, nor one that leaves in good order.
        stack.enter_context(_stop_signals(session))
        stack.callback(lambda: session._logs.close() if session._logs is not None else None)
        stack.callback(lambda: connection.close(failed=session._failed))
        if run_file is not None:
            stack.callback(run_file.end)
        stack.callback(lambda: end_session(failed=True))
        # Warnings that wait for equal ones go to the main process while there is a way.
        stack.callback(lambda: session._logs.flush() if session._logs is not None else None)
        stack.callback(_set_open_session, None)
        _set_open_session(session)
        try:
            session.identity = connection.find_others(identity)
            setup_error = None
            try:
                session.device = select_device(session.identity, device_type, share=share_devices)
                _set_threads(session, bind_cpus)
                # Until here a process may claim the rank, and so the log file, of another.
                if run_file is not None:
                    run_file.require_free(session.identity)
                session._logs = logs.configure(
                    session.identity,
                    session.run_dir,
                    log_level,
                    device=str(session.device),
                    capture_prints=capture_prints,
                )
                if not session.identity.is_main_process:
                    logs.set_channel(connection.send_record)
            except Exception as error:
                setup_error = _cannot_start(session.identity, error)
            connection.open(
                session.device, setup_error, backend=backend, make_group=make_group, share_devices=share_devices
            )
            if run_file is not None:
                run_file.write(session.identity, session.device)
            _logger.info("%s", _start_line(session))
            try:
                yield session
            except SystemExit as error:
                if error.code in (0, None):
                    end_session(failed=False)
                raise
            end_session(failed=False)
        except BaseException as error:
            session._failed = not (isinstance(error, SystemExit) and error.code in (0, None))
            first = session._surface(error)
            if first is not None:
                raise first from None
            raise


def _set_threads(session: Session, bind_cpus: bool) -> None:
    if bind_cpus:
        threads.bind_cpus(session.identity, session.device)
    if session.identity.local_world_size > 1 or bind_cpus:
        torch.set_num_threads(
            threads.threads_per_process(session.identity.local_world_size, launcher=session.identity.launcher)
        )


def _set_open_session(session: Session | None) -> None:
    global _open_session
    _open_session = session


def _cannot_start(identity: Identity, error: Exception) -> RankwiseError:
    if isinstance(error, RankwiseError):
        return error
    if isinstance(error, OSError):
        told = cannot_write(error)
    else:
        told = RankwiseError(
            f"rank {identity.rank} cannot set up on {identity.hostname}: {type(error).__name__}: {error}"
        )
    told.__cause__ = error
    return told


@contextlib.contextmanager
def _stop_signals(session: Session) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C ask for a stop; the second Ctrl-C is a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    num_interrupts = 0

    def on_terminate(number: int, frame: FrameType | None) -> None:
        if session._is_terminated:
            # A script that never asks whether to stop: whoever sends a second one means it.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        session._is_terminated = True
        session.request_stop()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal num_interrupts
        num_interrupts += 1
        if num_interrupts > 1:
            raise KeyboardInterrupt
        session.request_stop()
        if session.identity.is_main_process:
            os.write(2, b"rankwise: stopping in good order; press Ctrl-C again to stop at once\n")

    wanted = {signal.SIGTERM: on_terminate, signal.SIGINT: on_interrupt}
    # A signal that this process was started to ignore, as behind nohup, stays ignored.
    previous = {
        number: signal.signal(number, handler)
        for number, handler in wanted.items()
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _start_line(session: Session) -> str:
    identity = session.identity
    nodes = "1 node" if identity.num_nodes == 1 else f"{identity.num_nodes} nodes"
    return (
        f"rank {identity.rank} of {identity.world_size} on {nodes} (launcher: {identity.launcher}), "
        f"host {identity.hostname}, device {session.device}"
    )
