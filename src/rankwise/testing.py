"""Tests on real processes: a plain test function under `@on_ranks(2)` runs on two of them.

The processes are forked from a server that has torch imported already, so a test costs tenths of a second. They find
each other through a file, talk over loopback, and none of them outlives its test.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from rankwise.parent import follow_parent
from rankwise.resumption import assert_exact_resume

__all__ = ["GRACE_SECONDS", "RankProcesses", "assert_exact_resume", "on_ranks", "run_on_ranks"]

Body = Callable[..., None]
F = TypeVar("F", bound=Body)

GRACE_SECONDS = 5.0
"""How long the other ranks may take to end once one has failed."""

_PLACE_PREFIXES = ("TORCHELASTIC_", "RANKWISE_")
_STACK_SECONDS = 2.0


def on_ranks(num_ranks: int, timeout_seconds: float = 60.0) -> Callable[[F], F]:
    """Run the decorated test function on `num_ranks` processes with a gloo process group between them.

    The function must stand at the top level of its module; pytest fixtures and parameters are passed through and
    must pickle. In the body the launcher's variables are set, and `rankwise.init()` uses the group that is there.
    The test fails if any rank raises, ends early, or does not end in time; the message holds every rank's traceback,
    or the stack on which it waits. `pytest.skip` in the body skips the test.

    Ranks: the body runs on every one of them.
    """

    def decorate(body: F) -> F:
        @functools.wraps(body)
        def run(*args: Any, **kwargs: Any) -> None:
            __tracebackhide__ = True
            run_on_ranks(body, num_ranks, timeout_seconds, args, kwargs)

        run.rankwise_body = body  # type: ignore[attr-defined]
        return run  # type: ignore[return-value]

    return decorate


def run_on_ranks(
    body: Body,
    num_ranks: int,
    timeout_seconds: float = 60.0,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Run `body` on `num_ranks` processes and wait for them; what `on_ranks` does.

    Raises:
        AssertionError: a rank failed; with what every rank said.
    Ranks: called by the one process that starts them; it is none of them.
    """
    __tracebackhide__ = True
    with RankProcesses(body, num_ranks, args, kwargs) as ranks:
        failed = ranks.join(timeout_seconds)
        if failed:
            raise AssertionError(ranks.describe(failed))
        sys.stdout.write(ranks.output())
        if (reason := ranks.skip_reason()) is not None:
            pytest.skip(reason)


class RankProcesses:
    """Processes that run one function as the ranks of a job; on leaving the block all of them have ended.

    Processes that `body` starts are its own to end.

    Ranks: used by the one process that starts them; it is none of them.
    """

    def __init__(
        self, body: Body, num_ranks: int, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.processes: list[ForkServerProcess] = []
        self._name = body.__qualname__
        self._job = _Job.of(body, num_ranks, args, kwargs or {})

    def __enter__(self) -> RankProcesses:
        self._job.folder.mkdir(exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rankwise.testing", "rankwise.session", "numpy", "pytest"])
        try:
            for rank in range(self._job.num_ranks):
                process = context.Process(target=_run_rank, args=(self._job, rank))
                self.processes.append(process)
                process.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        for process in self.processes:
            process.close()
        shutil.rmtree(self._job.folder, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL whatever still runs, and wait until it is gone.

        Ranks: by the process that started them.
        """
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                process.kill()
        for process in self.processes:
            if process.pid is not None:
                process.join()

    def join(self, timeout_seconds: float) -> dict[int, str]:
        """Wait for all ranks; once one has failed the others get a few seconds to end by themselves.

        Returns:
            What went wrong, by rank; empty when all is well.
        Ranks: by the process that started them.
        """
        deadline = time.monotonic() + timeout_seconds
        failing = False
        while running := [process for process in self.processes if process.is_alive()]:
            if not failing and any(process.exitcode for process in self.processes):
                failing, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            wait([process.sentinel for process in running], remaining)
        stuck = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        stacks = {rank: self._stack(rank) for rank in stuck}
        self.kill()
        return {
            rank: f"did not end within {timeout_seconds:g} s (or {GRACE_SECONDS:g} s after another failed); it was "
            f"at\n{stacks[rank]}"
            if rank in stacks
            else self._reason(rank, process.exitcode)
            for rank, process in enumerate(self.processes)
            if rank in stacks or process.exitcode != 0
        }

    def describe(self, failed: Mapping[int, str]) -> str:
        """Failures and output as one text for people.

        Ranks: by the process that started them.
        """
        parts = [f"{self._name}: {len(failed)} of {self._job.num_ranks} ranks failed"]
        parts += [f"---- rank {rank}: {reason.rstrip()}" for rank, reason in failed.items()]
        if output := self.output():
            parts.append(f"---- output\n{output.rstrip()}")
        return "\n".join(parts)

    def output(self) -> str:
        """What the ranks have printed so far, rank by rank.

        Ranks: by the process that started them.
        """
        return "".join(self._told("output"))

    def skip_reason(self) -> str | None:
        """Why the first rank that skipped the test did so; None if none has.

        Ranks: by the process that started them.
        """
        return next(iter(self._told("skipped")), None)

    def _told(self, what: str) -> list[str]:
        paths = [self._job.file(rank, what) for rank in range(self._job.num_ranks)]
        return [path.read_text(errors="replace") for path in paths if path.exists()]

    def _reason(self, rank: int, exitcode: int | None) -> str:
        told = self._job.file(rank, "traceback")
        if told.exists():
            return told.read_text()
        if exitcode is not None and exitcode < 0:
            return f"killed by {signal.Signals(-exitcode).name}"
        return f"ended early, with exit status {exitcode}"

    def _stack(self, rank: int) -> str:
        """The stacks of a rank that hangs, told by its fault handler."""
        path = self._job.file(rank, "stack")
        pid = self.processes[rank].pid
        if pid is None or not path.exists():
            return "its start"
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + _STACK_SECONDS
        text = ""
        while time.monotonic() < deadline:
            before, text = text, path.read_text()
            if text and text == before:
                break
            time.sleep(0.05)
        return text or "an unknown place"


@dataclass(frozen=True)
class _Job:
    """All that a fresh process needs to become a rank."""

    folder: Path
    module_name: str
    module_path: str
    function_name: str
    arguments: bytes
    num_ranks: int
    environ: dict[str, str]
    warning_filters: list[tuple[Any, ...]]

    @classmethod
    def of(cls, body: Body, num_ranks: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Job:
        path = sys.modules[body.__module__].__file__
        if path is None or "<locals>" in body.__qualname__ or "." in body.__qualname__:
            raise TypeError(f"{body.__qualname__} must stand at the top level of a module file to run on ranks.")
        try:
            arguments = pickle.dumps((tuple(args), dict(kwargs)))
        except Exception as error:
            names = ", ".join(kwargs)
            raise TypeError(f"an argument of {body.__qualname__} ({names}) does not pickle: {error}") from error
        return cls(
            folder=Path(tempfile.mkdtemp(prefix="rankwise-ranks-")),
            module_name=body.__module__,
            module_path=path,
            function_name=body.__name__,
            arguments=arguments,
            num_ranks=num_ranks,
            environ={name: value for name, value in os.environ.items() if not name.startswith(_PLACE_PREFIXES)},
            warning_filters=[_plain_filter(entry) for entry in warnings.filters],
        )

    def file(self, rank: int, what: str) -> Path:
        return self.folder / f"rank-{rank}.{what}"

    def load(self) -> tuple[Body, tuple[Any, ...], dict[str, Any]]:
        """The function and its arguments; the module is loaded from its file, for pytest may not have a name for it."""
        if self.module_name not in sys.modules:
            spec = importlib.util.spec_from_file_location(self.module_name, self.module_path)
            if spec is None or spec.loader is None:
                raise ImportError(f"{self.module_path} cannot be imported")
            module = importlib.util.module_from_spec(spec)
            for parent in accumulate(self.module_name.split(".")[:-1], "{}.{}".format):
                # pytest names the module after its folders, which are no packages; pickle imports them by name.
                sys.modules.setdefault(parent, ModuleType(parent))
            sys.modules[self.module_name] = module
            spec.loader.exec_module(module)
        function = getattr(sys.modules[self.module_name], self.function_name)
        args, kwargs = pickle.loads(self.arguments)
        return getattr(function, "rankwise_body", function), args, kwargs


def _run_rank(job: _Job, rank: int) -> None:
    """What each process does; it ends here, without the interpreter's own clean-up, which could hang."""
    follow_parent()
    _redirect_output(job.file(rank, "output"))
    with open(job.file(rank, "stack"), "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
        status = 0
        try:
            _set_place(job, rank)
            body, args, kwargs = job.load()
            torch.set_num_threads(1)
            store = f"file://{job.folder}/rendezvous"
            dist.init_process_group("gloo", store, timedelta(minutes=5), job.num_ranks, rank)
            dist.barrier()  # a body without collectives may be over before the others have connected
            with warnings.catch_warnings():
                _set_warning_filters(job.warning_filters)
                body(*args, **kwargs)
            if dist.is_initialized():
                dist.destroy_process_group()
        except pytest.skip.Exception as skipped:
            job.file(rank, "skipped").write_text(str(skipped))
        except BaseException:
            job.file(rank, "traceback").write_text(traceback.format_exc())
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _set_place(job: _Job, rank: int) -> None:
    os.environ.clear()
    os.environ.update(job.environ)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.num_ranks),
        LOCAL_WORLD_SIZE=str(job.num_ranks),
        GROUP_RANK="0",
        GROUP_WORLD_SIZE="1",
        OMP_NUM_THREADS="1",
    )
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _redirect_output(path: Path) -> None:
    """Send output to a file of this rank: the fork server's own goes wherever it went when it started."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _plain_filter(entry: tuple[Any, ...]) -> tuple[Any, ...]:
    action, message, category, module, line = entry
    return action, getattr(message, "pattern", ""), category, getattr(module, "pattern", ""), line


def _set_warning_filters(filters: Sequence[tuple[Any, ...]]) -> None:
    warnings.resetwarnings()
    for action, message, category, module, line in reversed(filters):
        warnings.filterwarnings(action, message, category, module, line)
