"""Manifests for Kubernetes: a pod is a node.

A PyTorchJob, where its operator is installed: it names the pods and tells each its rank. Otherwise an Indexed Job with
a headless service, which every cluster can run. Several processes in a pod are started by `rankwise run`, with the
pod's index as the node's rank and not by an elastic rendezvous, so that rank 0 and its output are always in the first
pod.

A pod that has to leave gets SIGTERM, and so does the run. Ranks that stop in order end with status 0, and Kubernetes
takes that for the end of the work: a run that wants to be started again ends with another status.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

STOP_SECONDS = 120
"""How long a pod may still run once it has been asked to stop."""

_PORT = 29500
_RUNS_PER_POD = 4
_NO_CLAIM = """\
# No shared volume is mounted: the run folder is each pod's own, and goes with it. --claim CLAIM:PATH mounts one.
"""


def manifest(options: argparse.Namespace, command: Sequence[str]) -> str:
    """What `kubectl apply` takes: a PyTorchJob, or with `options.plain` a Service and an Indexed Job.

    Ranks: local, in no job yet.
    """
    name, num_nodes = options.job_name, options.nodes
    if options.plain:
        address = {"rank": "$(JOB_COMPLETION_INDEX)", "host": f"{name}-0.{name}", "port": str(_PORT)}
    else:
        address = {"rank": "$(RANK)", "host": "$(MASTER_ADDR)", "port": "$(MASTER_PORT)"}
    # Kubernetes replaces $(NAME) in what it runs, and turns $$ into $.
    program = [argument.replace("$", "$$") for argument in command]
    if options.plain or options.num_procs > 1:
        program = [
            *("rankwise", "run", f"--nnodes={num_nodes}", f"--nproc-per-node={options.num_procs}"),
            *(f"--node-rank={address['rank']}", f"--master-addr={address['host']}"),
            *(f"--master-port={address['port']}", "--no-python", *program),
        ]
    pod = _pod(options, program)
    if options.plain:
        pod["spec"]["subdomain"] = name
        documents = [_headless_service(name), _indexed_job(name, num_nodes, pod)]
    else:
        documents = [_pytorch_job(name, num_nodes, pod)]
    return ("" if options.claim else _NO_CLAIM) + "---\n".join(_yaml(document) for document in documents)


def _pod(options: argparse.Namespace, program: list[str]) -> dict[str, Any]:
    shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{options.shm_gib}Gi"}}
    volumes, mounts = [shm], [{"name": "shm", "mountPath": "/dev/shm"}]  # loader workers hand batches over in it
    if options.claim:
        claim, path = options.claim
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "shared", "mountPath": path})
    limits: dict[str, Any] = {}
    if options.gpus_per_node:
        limits["nvidia.com/gpu"] = options.gpus_per_node
    if options.cpus_per_process:
        limits["cpu"] = options.cpus_per_process * options.num_procs
    # The operator looks for a container of this name.
    container = {"name": "pytorch", "image": options.image, "command": program, "volumeMounts": mounts}
    if limits:
        container["resources"] = {"limits": limits}
    return {
        "spec": {
            "restartPolicy": "OnFailure",
            "terminationGracePeriodSeconds": STOP_SECONDS,
            "containers": [container],
            "volumes": volumes,
        }
    }


def _pytorch_job(name: str, num_nodes: int, pod: dict[str, Any]) -> dict[str, Any]:
    replicas = {"Master": {"replicas": 1, "restartPolicy": "OnFailure", "template": pod}}
    if num_nodes > 1:
        replicas["Worker"] = {"replicas": num_nodes - 1, "restartPolicy": "OnFailure", "template": pod}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {"runPolicy": {"backoffLimit": _RUNS_PER_POD * num_nodes}, "pytorchReplicaSpecs": replicas},
    }


def _indexed_job(name: str, num_nodes: int, pod: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "completions": num_nodes,
            "parallelism": num_nodes,
            # One failure ends the pods of all nodes, and each of them counts.
            "backoffLimit": _RUNS_PER_POD * num_nodes,
            "template": pod,
        },
    }


def _headless_service(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        # Names have to be known before all pods are ready: they only get ready together.
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": name}},
    }


def _yaml(value: Any, indent: str = "") -> str:
    """Block style, every string quoted: nothing that is put in can change the structure."""
    lines: list[str] = []
    for key, item in value.items() if isinstance(value, dict) else ((None, item) for item in value):
        start = f"{indent}- " if key is None else f"{indent}{key}:"
        if isinstance(item, dict | list):
            nested = _yaml(item, indent + "  ")
            lines.append(f"{start}{nested.lstrip(' ')}" if key is None else f"{start}\n{nested}")
        else:
            lines.append(f"{start}{'' if key is None else ' '}{_scalar(item)}\n")
    return "".join(lines)


def _scalar(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return '"' + "".join(_escaped(character) for character in value) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
