"""Who started this process: one short function per launcher, asked in the order of `LAUNCHERS`.

Each function takes the environment and returns the facts that its launcher set (field -> value and variable) when it
is at work, else None. What it leaves out, `Identity.resolve` assumes, and it checks what all of them say.
docs/launchers.md shows the table, and how each row was tested.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from rankwise.errors import LaunchError
from rankwise.variables import number, shown, task_count

Environ = Mapping[str, str]
Facts = dict[str, tuple[int, str]]
"""Field of `Identity` -> its value, and the variable that it came from."""

_TORCH = {
    "rank": "RANK",
    "local_rank": "LOCAL_RANK",
    "node_rank": "GROUP_RANK",
    "world_size": "WORLD_SIZE",
    "local_world_size": "LOCAL_WORLD_SIZE",
    "num_nodes": "GROUP_WORLD_SIZE",
}
_BY_HAND = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_STARTERS = {"SLURM_PROCID": "srun", "HOROVOD_RANK": "horovodrun", "JSM_NAMESPACE_RANK": "jsrun"}
_UNEXPLAINED = (
    ("PMI_RANK", "PMI_SIZE"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("GROUP_RANK", "GROUP_WORLD_SIZE"),
    ("LOCAL_WORLD_SIZE", "LOCAL_WORLD_SIZE"),
)
_FIRST_SPECIAL_STEP = 4294967290  # this and the numbers above: an interactive shell, a batch script, ...


def torchrun(environ: Environ) -> Facts | None:
    """torchrun's elastic agent, which sets every variable; so a missing one is an error.

    Source: docs.pytorch.org, torchrun, "Environment Variables".
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return None
    missing = [name for name in _TORCH.values() if name not in environ]
    if missing:
        raise LaunchError(
            f"TORCHELASTIC_RUN_ID is set, but {', '.join(missing)} is not. torchrun sets all of them: "
            "start through torchrun, or unset TORCHELASTIC_RUN_ID."
        )
    return _read(environ, **_TORCH)


def deepspeed(environ: Environ) -> Facts | None:
    """The `deepspeed` command's process for one node, whose CROSS_ variables count nodes.

    Source: deepspeed/launcher/launch.py.
    """
    names = _TORCH | {"node_rank": "CROSS_RANK", "local_world_size": "LOCAL_SIZE", "num_nodes": "CROSS_SIZE"}
    return _read(environ, **names) if environ.keys() >= set(names.values()) else None


def ray(environ: Environ) -> Facts | None:
    """Ray Train's torch backend, in a worker of Ray.

    Source: ray/train/torch/config.py, _set_torch_distributed_env_vars; Ray's page on containers for RAY_.
    """
    names = _TORCH | {"node_rank": "NODE_RANK"}
    del names["num_nodes"]
    in_worker = "RAY_JOB_ID" in environ or "RAY_RAYLET_PID" in environ
    return _read(environ, **names) if in_worker and environ.keys() >= set(names.values()) else None


def horovod(environ: Environ) -> Facts | None:
    """`horovodrun` without MPI.

    HOROVOD_CROSS_RANK counts the nodes that have a process of this local rank. These are all nodes for local rank 0
    alone; for the others it is left out.

    Source: horovod/runner/gloo_run.py.
    """
    facts = _mpi(environ, "HOROVOD_")
    if facts and facts.get("local_rank", (None,))[0] == 0:
        facts |= _present(environ, node_rank="HOROVOD_CROSS_RANK", num_nodes="HOROVOD_CROSS_SIZE")
    return facts


def jsrun(environ: Environ) -> Facts | None:
    """IBM's Job Step Manager, under LSF; it stands before Open MPI, on which IBM's MPI is built.

    Source: lightning.ai, LSFEnvironment; the local size: the MPI test programs of Spectrum MPI.
    """
    return _mpi(environ, "JSM_NAMESPACE_")


def openmpi(environ: Environ) -> Facts | None:
    """Open MPI's `mpirun`. OMPI_COMM_WORLD_NODE_RANK is no node's place, but this process's among all jobs on it.

    Source: docs.open-mpi.org, "Environment variables set for MPI applications".
    """
    return _mpi(environ, "OMPI_COMM_WORLD_")


def mvapich(environ: Environ) -> Facts | None:
    """MVAPICH's `mpirun_rsh`: MV2_ in version 2, MVP_ since version 3.

    Source: mvapich2, src/pm/mpirun/mpispawn.c; the later prefix: mvapich 3, its list of variables.
    """
    return _mpi(environ, "MVP_COMM_WORLD_") or _mpi(environ, "MV2_COMM_WORLD_")


def pals(environ: Environ) -> Facts | None:
    """HPE's `mpiexec` of PALS. Slurm's plugin cray_shasta sets the same variables: then it is Slurm.

    Source: slurm, src/plugins/mpi/cray_shasta, for the names; scripts for Aurora and Polaris for the sizes.
    """
    if "PALS_RANKID" not in environ or "SLURM_STEP_ID" in environ:
        return None
    return _read(
        environ,
        rank="PALS_RANKID",
        local_rank="PALS_LOCAL_RANKID",
        node_rank="PALS_NODEID",
        world_size=_first(environ, "PMI_SIZE", "WORLD_SIZE"),
        local_world_size=_first(environ, "PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
    )


def intelmpi(environ: Environ) -> Facts | None:
    """Intel's `mpirun`, a Hydra with variables of its own.

    Source: Intel MPI Library Developer Reference, "Hydra Environment Variables"; its mpirun script.
    """
    at_work = any(name == "I_MPI_MPIRUN" or name.startswith("I_MPI_HYDRA") for name in environ)
    return _hydra(environ) if at_work else None


def mpich(environ: Environ) -> Facts | None:
    """MPICH's `mpiexec`, and every other Hydra.

    Source: measured with MPICH 4.0.
    """
    return _hydra(environ)


def slurm(environ: Environ) -> Facts | None:
    """`srun`: what describes the step comes before what describes the job, whose shells are no tasks.

    Source: man page of srun, "OUTPUT ENVIRONMENT VARIABLES"; measured with Slurm 22.05.
    """
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID"))
    if "SLURM_PROCID" not in environ or step is None:
        return None
    if re.fullmatch("[0-9]{10}", step) and int(step) >= _FIRST_SPECIAL_STEP:
        return None
    number(environ, _first(environ, "SLURM_STEP_ID", "SLURM_STEPID"))
    facts = _read(
        environ,
        rank="SLURM_PROCID",
        local_rank="SLURM_LOCALID",
        node_rank="SLURM_NODEID",
        world_size=_first(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
        num_nodes=_first(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
    )
    return facts | _slurm_local_size(environ, facts)


def pmix(environ: Environ) -> Facts | None:
    """A PMIx server that tells the rank alone: its sizes are no variables, so WORLD_SIZE has to be set.

    Source: pmix.org, PMIx_Init; PMIX_RANK measured with Open MPI 4.1.
    """
    if "PMIX_RANK" not in environ or "PMIX_NAMESPACE" not in environ:
        return None
    names = _TORCH | {"rank": "PMIX_RANK", "local_rank": _first(environ, "PMIX_LOCAL_RANK", "LOCAL_RANK")}
    return _read(environ, **names)


def sagemaker(environ: Environ) -> Facts | None:
    """SageMaker's PyTorch container without a distribution: one process on each host.

    Source: sagemaker-pytorch-training-toolkit, training.py; docs.aws.amazon.com, resourceconfig.json.
    """
    if not {"SM_HOSTS", "SM_CURRENT_HOST"} <= environ.keys() or not environ.keys().isdisjoint(_BY_HAND):
        return None
    names = re.findall(r'"([^"]*)"', environ["SM_HOSTS"])
    if environ["SM_CURRENT_HOST"] not in names:
        raise LaunchError(
            f"{shown(environ, 'SM_CURRENT_HOST', 'SM_HOSTS')}: this host is not in the list. Set both right."
        )
    place, size = (names.index(environ["SM_CURRENT_HOST"]), "SM_CURRENT_HOST"), (len(names), "SM_HOSTS")
    return {"rank": place, "node_rank": place, "world_size": size, "num_nodes": size}


def kubernetes(environ: Environ) -> Facts | None:
    """A pod of a PyTorchJob in which python was started without torchrun: RANK is the pod's.

    WORLD_SIZE counts pods times nprocPerNode: then torchrun has to be started in each.

    Source: kubeflow/training-operator, pkg/controller.v1/pytorch/envvar.go.
    """
    in_pod = "KUBERNETES_SERVICE_HOST" in environ or any(name.startswith("PET_") for name in environ)
    if not in_pod or "LOCAL_RANK" in environ:
        return None
    facts = env(environ)
    num_pods = environ.get("PET_NNODES", "")
    if facts and re.fullmatch("[0-9]{1,9}", num_pods) and int(num_pods) != facts["world_size"][0]:
        raise LaunchError(
            f"{shown(environ, 'WORLD_SIZE', 'PET_NNODES', 'PET_NPROC_PER_NODE')}: there are more processes than pods, "
            "but no LOCAL_RANK. Start through torchrun in each pod, or set nprocPerNode to 1."
        )
    return facts


def env(environ: Environ) -> Facts | None:
    """torchrun's variables without torchrun: set in a shell script or by a small launcher of one's own.

    Without any variable of the node each process is taken for alone on its node.
    """
    if environ.keys().isdisjoint(_BY_HAND):
        return None
    facts = _read(environ, **_TORCH)
    if facts.keys() == {"rank", "world_size"}:
        facts["node_rank"] = facts["rank"]
    return facts


def single(environ: Environ) -> Facts:
    """Nobody: one process, all alone. Also in a shell of a Slurm job, which srun did not start.

    Variables of more than one process that no launcher explains are refused: each would be a job of its own, silently.
    """
    for name, size in _UNEXPLAINED:
        if name in environ and number(environ, size if size in environ else name) > 1:
            raise LaunchError(
                f"{shown(environ, name, size)}: something started several processes; nothing says which this is. "
                "Set RANK, WORLD_SIZE and LOCAL_RANK for each, or unset it."
            )
    return {}


Launcher = Callable[[Environ], Facts | None]
# The inner ones first. mpirun starts its daemons through srun, so Slurm's variables are there under MPI too.
LAUNCHERS: dict[str, Launcher] = {
    "torchrun": torchrun,
    "deepspeed": deepspeed,
    "ray": ray,
    "horovod": horovod,
    "jsrun": jsrun,
    "openmpi": openmpi,
    "mvapich": mvapich,
    "pals": pals,
    "intelmpi": intelmpi,
    "mpich": mpich,
    "slurm": slurm,
    "pmix": pmix,
    "sagemaker": sagemaker,
    "kubernetes": kubernetes,
    "env": env,
    "single": single,
}


def find_launcher(environ: Environ) -> tuple[str, Facts]:
    """The innermost launcher that is at work, and what it says.

    RANK, LOCAL_RANK and WORLD_SIZE beside another launcher's variables are those of a launcher of one's own that runs
    inside it, if they count more processes; else they have to say the same.

    Raises:
        LaunchError: a variable is no number, is missing, or says something else than the launcher.
    Ranks: local.
    """
    for name, launcher in LAUNCHERS.items():
        facts = launcher(environ)
        if facts is None:
            continue
        if facts and facts["rank"][1] != "RANK":
            if environ.keys() >= set(_BY_HAND) and number(environ, "WORLD_SIZE") > facts["world_size"][0]:
                continue
            _require_agreement(environ, name, facts)
        return name, facts
    raise AssertionError("single answers always")


def _require_agreement(environ: Environ, launcher: str, facts: Facts) -> None:
    for field, name in _TORCH.items():
        if name in environ and field in facts and number(environ, name) != facts[field][0]:
            raise LaunchError(
                f"{shown(environ, name, facts[field][1])}: {name} is not what {launcher} says of this process. "
                f"Unset {name} where it was exported, or start with the launcher that sets it."
            )


def _read(environ: Environ, **names: str) -> Facts:
    missing = [names[field] for field in ("rank", "world_size") if names[field] not in environ]
    if missing:
        what, verb = " and ".join(missing), "are" if missing[1:] else "is"
        advice = f"Set {what} too, or start through torchrun"
        if set(missing).isdisjoint(_BY_HAND):
            advice = f"Start with {_STARTERS.get(names['rank'], 'the MPI launcher')}, or unset {names['rank']}"
        raise LaunchError(f"{shown(environ, *names.values())} but {what} {verb} not set. {advice}.")
    return _present(environ, **names)


def _present(environ: Environ, **names: str) -> Facts:
    return {field: (number(environ, name), name) for field, name in names.items() if name in environ}


def _first(environ: Environ, *names: str) -> str:
    return next((name for name in names if name in environ), names[0])


def _mpi(environ: Environ, prefix: str) -> Facts | None:
    """The names that most MPIs give, under their own prefix."""
    names = {"rank": "RANK", "local_rank": "LOCAL_RANK", "world_size": "SIZE", "local_world_size": "LOCAL_SIZE"}
    if f"{prefix}RANK" not in environ:
        return None
    return _read(environ, **{field: prefix + name for field, name in names.items()})


def _hydra(environ: Environ) -> Facts | None:
    # srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE too, but not the place on the node.
    if not {"PMI_RANK", "MPI_LOCALRANKID"} <= environ.keys():
        return None
    return _read(
        environ,
        rank="PMI_RANK",
        local_rank="MPI_LOCALRANKID",
        world_size="PMI_SIZE",
        local_world_size="MPI_LOCALNRANKS",
    )


def _slurm_local_size(environ: Environ, facts: Facts) -> Facts:
    """Tasks on this node, from the list of their ranks; the list of all nodes' counts must agree.

    In a heterogeneous step the counts are sorted by node name, the nodes themselves by component: no use there.
    """
    ranks = environ.get("SLURM_GTIDS", "")
    listed = ranks.count(",") + 1 if re.fullmatch("[0-9]+(,[0-9]+)*", ranks) else None
    name = _first(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    if name not in environ or "node_rank" not in facts or "SLURM_HET_SIZE" in environ:
        return {} if listed is None else {"local_world_size": (listed, "SLURM_GTIDS")}
    (world_size, size_name), (node, _) = facts["world_size"], facts["node_rank"]
    here, total = task_count(environ, name, node)
    if total != world_size:
        raise _leaked(environ, name, size_name)
    if here == 0:
        raise _leaked(environ, "SLURM_NODEID", name)
    if listed not in (None, here):
        raise _leaked(environ, "SLURM_GTIDS", name)
    # A batch script that was submitted from inside a step keeps that step's variables. In a step of its own srun
    # sets both to the same value.
    in_batch = environ.get("ENVIRONMENT") == "BATCH" and world_size > 1
    if in_batch and environ.get("SLURM_TASKS_PER_NODE", environ[name]) != environ[name]:
        raise _leaked(environ, name, "SLURM_TASKS_PER_NODE")
    return {"local_world_size": (here, name)}


def _leaked(environ: Environ, *names: str) -> LaunchError:
    return LaunchError(
        f"{shown(environ, *names)}: these cannot both describe this task. Start through srun; in a batch script that "
        "was submitted from inside another step, unset SLURM_STEP_ID, SLURM_STEPID and the other SLURM_STEP_ first."
    )
