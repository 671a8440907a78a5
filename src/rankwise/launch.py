"""Start the processes of this node through torch's own elastic launcher, and stop them in order.

torchrun does the work. What is added: SIGTERM and Ctrl-C reach the ranks and the launcher then waits for them (torchrun
alone would report a failure even where every rank ended well), the reason of a failure is one line, and the exit status
is that of the ranks.
"""

import argparse
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

from rankwise.parent import LAUNCHER_PID

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def launch(torchrun_arguments: Sequence[str]) -> int:
    """Run one command on several processes; the arguments are torchrun's, the script or `-m module` last.

    The first SIGTERM, SIGINT or SIGHUP is passed on to every rank of this node as SIGTERM, and the ranks are waited
    for; a second one kills them.

    Returns:
        0 when every rank ended with 0; 2 when a rank ended with 2 (it has said why); 128 + signal number when a rank
        was killed; otherwise the status of the first rank that failed.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    parser = get_args_parser()
    parser.allow_abbrev = False  # or an option of the script, `--nproc` say, is refused as a short form of several
    args = parser.parse_args(list(torchrun_arguments))
    if args.standalone or _names_no_rendezvous(args):
        # A free port of this host: torchrun's fixed default port clashes between two jobs on one machine.
        args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
        args.local_addr = args.local_addr or "127.0.0.1"
    # The elastic log repeats a failure in a table of twenty lines; the ranks and the line below say it once.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads_per_process(args.nproc_per_node)))
    os.environ[LAUNCHER_PID] = str(os.getpid())
    config, entrypoint, command = config_from_args(args)
    config.signals_to_handle = "SIGQUIT"

    with _StopSignals() as stop:
        try:
            elastic_launch(config, entrypoint)(*command)
        except ChildFailedError as error:
            return _report(error, stop)
    return 0


class _StopSignals:
    """Passes stop signals on to the child processes while the block runs."""

    def __init__(self) -> None:
        self.num_received = 0

    def __enter__(self) -> "_StopSignals":
        self._previous = {number: signal.signal(number, self._forward) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        import psutil

        self.num_received += 1
        for child in psutil.Process().children():
            if self.num_received == 1:
                child.terminate()
            else:
                child.kill()


def _names_no_rendezvous(args: argparse.Namespace) -> bool:
    one_node = args.nnodes in ("1", "1:1")
    return one_node and args.rdzv_backend == "static" and not args.rdzv_endpoint and args.master_port is None


def _threads_per_process(nproc_per_node: str) -> int:
    """This node's cores divided by its processes; torchrun's fixed 1 leaves most cores idle."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // int(nproc_per_node)) if nproc_per_node.isdigit() else 1


def _report(error: "ChildFailedError", stop: _StopSignals) -> int:
    statuses = {failure.exitcode for failure in error.failures.values()}
    if 2 in statuses:
        return 2
    rank, first = error.get_first_failure()
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        if not stop.num_received:
            print(f"error: rank {rank} (pid {first.pid}) was killed by {name}", file=sys.stderr)
        return 128 - first.exitcode
    print(f"error: rank {rank} (pid {first.pid}) ended with exit status {first.exitcode}", file=sys.stderr)
    return int(first.exitcode)
