"""What one library believes about this process; `launchers.py` starts it under every launcher, once per process.

usage: belief.py LIBRARY FOLDER DEVICES NUM_NODES [kubeflow]

Every process that runs this file leaves one JSON file in FOLDER: its belief, or the error that it met. DEVICES and
NUM_NODES are told to the library that asks for them, and so is "kubeflow".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

RANKWISE_TIMEOUT_SECONDS = 45.0
FIELDS = ("rank", "local_rank", "node_rank", "world_size", "num_nodes")
Belief = dict[str, int | None]


def rankwise_whoami() -> Belief:
    """The command line's word, without a process group."""
    command = [sys.executable, "-m", "rankwise", "whoami", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip() or f"rankwise whoami ended with status {done.returncode}")
    said = json.loads(done.stdout)
    return {name: said[name] for name in FIELDS}


def rankwise_init() -> Belief:
    """A session's identity, after all ranks of the process group were heard."""
    import rankwise

    with rankwise.init(device_type="cpu", timeout_seconds=RANKWISE_TIMEOUT_SECONDS) as session:
        identity = session.identity
        ranks = rankwise.gather_objects(identity.rank)
        if ranks != list(range(identity.world_size)):
            raise RuntimeError(f"gathered ranks {ranks}, needed 0..{identity.world_size - 1}")
        return {name: getattr(identity, name) for name in FIELDS}


def accelerate() -> Belief:
    """The state that an Accelerator is built on; it has no word for nodes."""
    from accelerate import PartialState

    state = PartialState(cpu=True)
    return {
        "rank": state.process_index,
        "local_rank": state.local_process_index,
        "world_size": state.num_processes,
    }


def fabric(devices: int, num_nodes: int, kubeflow: bool) -> Belief:
    """Fabric after `launch`, in a script written for many processes: DDP whatever their number.

    The number of nodes is what it was told, so that is not asked back.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.kubeflow import KubeflowEnvironment

    module = Fabric(
        accelerator="cpu",
        devices=devices,
        num_nodes=num_nodes,
        strategy="ddp",
        plugins=KubeflowEnvironment() if kubeflow else None,
    )
    module.launch()
    return {
        "rank": module.global_rank,
        "local_rank": module.local_rank,
        "node_rank": module.node_rank,
        "world_size": module.world_size,
    }


def ask(library: str, devices: int, num_nodes: int, kubeflow: bool) -> Belief:
    """The belief of `library`, one of `launchers.LIBRARIES`."""
    if library == "whoami":
        return rankwise_whoami()
    if library == "init":
        return rankwise_init()
    if library == "accelerate":
        return accelerate()
    if library == "fabric":
        # The next import of it fails, as where it is not installed.
        sys.modules["mpi4py"] = None  # type: ignore[assignment]
    return fabric(devices, num_nodes, kubeflow)


def actual_node() -> int:
    """The node that this process is on, as the launcher's own test bed says, and no library reads."""
    if "SLURMD_NODENAME" in os.environ:
        return int(os.environ["BENCH_NODES"].split(",").index(os.environ["SLURMD_NODENAME"]))
    return int(os.environ.get("BENCH_NODE", "0"))


def leave_word(folder: Path, word: dict[str, object]) -> None:
    """Write this process's file whole: the reader looks while others still write."""
    path = folder / f"{uuid.uuid4().hex}.json"  # pods may have equal process ids
    partial = path.with_suffix(".partial")
    # rankwise: ignore[RW301] the name has a uuid in it
    partial.write_text(json.dumps(word | {"node": actual_node(), "time": time.time()}))
    partial.rename(path)


def main() -> None:
    library, folder, devices, num_nodes, *rest = sys.argv[1:]
    try:
        belief = ask(library, int(devices), int(num_nodes), "kubeflow" in rest)
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
        leave_word(Path(folder), {"error": kind + lines[0]})
        # Launchers that kill the others at the first failure would keep them from leaving theirs.
        time.sleep(2)
        raise
    leave_word(Path(folder), {"belief": {name: belief.get(name) for name in FIELDS}})


if __name__ == "__main__":
    main()
