"""Start the processes of this node through torch's own elastic launcher, and stop them in order.

torchrun does the work. What is added: SIGTERM and Ctrl-C reach the ranks and the launcher then waits for them (torchrun
alone would report a failure even where every rank ended well), the reason of a failure is one line, and the exit status
is that of the ranks.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from rankwise.as_rank import BIND
from rankwise.errors import RankFailure
from rankwise.lastwords import FOLDER, in_words, print_words, told_to_launcher
from rankwise.parent import LAUNCHER, launcher_token
from rankwise.threads import threads_per_process

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOPPED = 128 + signal.SIGTERM
"""Exit status of a job that a stop signal ended before its ranks could answer it."""

_DELIVERY_SECONDS = 0.1


def main(arguments: Sequence[str]) -> int:
    """`rankwise run`.

    Ranks: local, in the launcher and not in a rank.
    """
    if not arguments:
        print("usage: rankwise run [torchrun options] SCRIPT [ARGUMENT ...]", file=sys.stderr)
        return 2
    return launch(arguments)


def launch(torchrun_arguments: Sequence[str], *, stopped_status: int = STOPPED) -> int:
    """Run one command on several processes; the arguments are torchrun's, the script or `-m module` last.

    The first SIGTERM, SIGINT or SIGHUP is passed on to every rank of this node as SIGTERM, also to those that are only
    being started, and the ranks are waited for; a second one kills them.

    Args:
        stopped_status: what to return when a stop signal ended ranks that did not answer it, since they had not started
            or have no handler.
    Returns:
        0 when every rank ended with 0; 2 when a rank refused its input with 2 (it has said why) or the arguments cannot
        be used; 128 + signal number when a rank was killed; otherwise the status of the rank that failed first.
    Ranks: local, in the launcher and not in a rank; from the main thread.
    """
    with _StopSignals() as stop:
        import torch
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous import RendezvousError
        from torch.distributed.launcher.api import elastic_launch
        from torch.distributed.run import config_from_args, get_args_parser

        parser = get_args_parser()
        parser.prog = "rankwise run"
        parser.add_argument(
            "--bind",
            action="store_true",
            help="keep each rank on cores of its own, those near its device where there are accelerators",
        )
        parser.allow_abbrev = False  # or an option of the script, `--nproc` say, is refused as a short form of several
        args = parser.parse_args(list(torchrun_arguments))
        if args.standalone or _names_no_rendezvous(args):
            # A free port of this host: torchrun's fixed default port clashes between two jobs on one machine.
            args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
            args.local_addr = args.local_addr or "127.0.0.1"
        if args.log_dir and args.redirects == "0" and args.tee == "0":
            args.tee = "3"  # torchrun would make the folder and write nothing there
        if args.bind and torch.accelerator.is_available():
            args.numa_binding = args.numa_binding or "node"
        # The elastic log repeats a failure in a table of twenty lines; the ranks and the line below say it once.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
        try:
            config, entrypoint, command = config_from_args(args)
            if config.nproc_per_node < 1:
                raise ValueError(f"--nproc-per-node is {args.nproc_per_node}; give 1 or more")
        except (ValueError, AssertionError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        config.signals_to_handle = "SIGQUIT"
        threads = str(threads_per_process(config.nproc_per_node, launcher="torchrun"))
        added = {"OMP_NUM_THREADS": threads, LAUNCHER: launcher_token()}
        if args.bind and args.numa_binding is None:
            added[BIND] = "1"
        with tempfile.TemporaryDirectory(prefix="rankwise-run-") as folder, _environment(**added, **{FOLDER: folder}):
            try:
                elastic_launch(config, entrypoint)(*_with_last_words(entrypoint, command))
            except ChildFailedError as error:
                return stopped_status if _is_stopped(error, stop) else _report(error, told_to_launcher(folder))
            except (RendezvousError, OSError) as error:
                print(f"error: the processes of the job did not find each other: {error}", file=sys.stderr)
                return 1
    return 0


class _StopSignals:
    """Passes stop signals on to the child processes while the block runs."""

    def __init__(self) -> None:
        self.num_received = 0
        self._told: set[int] = set()
        self._closed = threading.Event()
        self._messenger = threading.Thread(target=self._deliver, name="rankwise-stop", daemon=True)

    def __enter__(self) -> "_StopSignals":
        # Signals that the launcher was started to ignore, as behind nohup, stay ignored.
        wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._receive) for number in wanted}
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.num_received += 1
        if self.num_received == 1:
            self._messenger.start()

    def _deliver(self) -> None:
        """Tell every child once, whenever it starts; kill those that were told when another signal comes."""
        while not self._closed.is_set():
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.pid not in self._told:
                        self._told.add(child.pid)
                        child.terminate()
                    elif self.num_received > 1:
                        child.kill()
            self._closed.wait(_DELIVERY_SECONDS)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """The environment that the children inherit, and no other process after them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _names_no_rendezvous(args: argparse.Namespace) -> bool:
    one_node = args.nnodes in ("1", "1:1")
    return one_node and args.rdzv_backend == "static" and not args.rdzv_endpoint and args.master_port is None


def _with_last_words(entrypoint: object, command: Sequence[str]) -> list[str]:
    """The command of a Python script, run by `rankwise.as_rank`, which leaves the traceback of a failure for us."""
    if entrypoint == sys.executable and command[:1] == ["-u"]:
        return ["-u", "-m", "rankwise.as_rank", *command[1:]]
    return list(command)


def _is_stopped(error: "ChildFailedError", stop: _StopSignals) -> bool:
    return stop.num_received == 1 and all(rank.exitcode == -signal.SIGTERM for rank in error.failures.values())


def _report(error: "ChildFailedError", told: RankFailure | None) -> int:
    # Once a rank has failed, the agent sends SIGTERM to the others: their statuses are consequences. One that refuses
    # its input has said why; one that broke is the news.
    rank, first = min(
        error.failures.items(),
        key=lambda item: (
            item[1].exitcode == -signal.SIGTERM,
            item[1].exitcode == 2,
            not os.path.exists(item[1].error_file),  # a session leaves one where the failure is this rank's own
            item[1].timestamp,
        ),
    )
    if told is not None and told.error_type != "SystemExit":
        own = error.failures.get(told.rank, first)
        if told.is_loss and told.rank in error.failures and own.exitcode < 0:
            told = dataclasses.replace(told, message=f"killed by {signal.Signals(-own.exitcode).name}")
        print_words(in_words(told))
        return int(own.exitcode) if own.exitcode > 0 else 128 - own.exitcode if told.is_loss else 1
    if first.exitcode == 2:
        return 2
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        print(f"error: rank {rank} (pid {first.pid}) was killed by {name}", file=sys.stderr)
        return 128 - first.exitcode
    print(f"error: rank {rank} (pid {first.pid}) ended with exit status {first.exitcode}", file=sys.stderr)
    return int(first.exitcode)
