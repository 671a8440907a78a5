"""The manifests: what a cluster would read in them, and that the pods' processes find each other."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise.jobfiles import main

IMAGE = ["--image", "example.org/team/train:1.2"]
WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


def text_of(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["kubernetes", *IMAGE, *arguments]) == 0
    return capfd.readouterr().out


def read(text: str) -> list[Any]:
    try:
        import yaml
    except ImportError:
        reason = "PyYAML is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason} (nothing may be missing where CI=true)")
        pytest.skip(reason)
    return list(yaml.safe_load_all(text))


def container_of(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["spec"]["containers"]
    return container


def expanded(argument: str, environ: dict[str, str]) -> str:
    """What Kubernetes makes of an argument: $(NAME) is replaced where it is known, $$ is a plain $."""

    def replace(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else environ.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)", replace, argument)


def test_a_pytorch_job_has_a_master_and_workers(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "3", "--gpus-per-node", "8", "--cpus-per-process", "6", "--claim", "shared:/data"]
    (job,) = read(text_of(capfd, *options, "--job-name", "vae", "--", "python", "train.py"))
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("kubeflow.org/v1", "PyTorchJob", "vae")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: spec["replicas"] for name, spec in replicas.items()} == {"Master": 1, "Worker": 2}
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    spec = replicas["Master"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] == 120
    container = container_of(replicas["Master"]["template"])
    assert container["name"] == "pytorch"  # the operator looks for this name
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "cpu": 48}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"shm": "/dev/shm", "shared": "/data"}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": "shared"}


@pytest.mark.parametrize("plain", [[], ["--plain"]])
def test_a_manifest_without_a_shared_volume_says_so(plain: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    command = ["--", "python", "train.py"]
    assert text_of(capfd, *plain, *command).startswith("# No shared volume is mounted")
    assert "#" not in text_of(capfd, *plain, "--claim", "shared:/data", *command)


def test_one_node_has_no_workers(capfd: pytest.CaptureFixture[str]) -> None:
    (job,) = read(text_of(capfd, "--", "python", "train.py"))
    assert job["spec"]["pytorchReplicaSpecs"].keys() == {"Master"}


def test_one_process_in_a_pod_is_started_directly(capfd: pytest.CaptureFixture[str]) -> None:
    (job,) = read(text_of(capfd, "--nodes", "2", "--", "python", "train.py"))
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        assert container_of(replica["template"])["command"] == ["python", "train.py"]


def test_an_indexed_job_comes_with_the_service_that_names_its_pods(capfd: pytest.CaptureFixture[str]) -> None:
    service, job = read(text_of(capfd, "--plain", "--nodes", "4", "--job-name", "vae", "--", "python", "train.py"))
    assert (service["kind"], service["metadata"]["name"]) == ("Service", "vae")
    assert service["spec"] == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"job-name": job["metadata"]["name"]},
    }
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Indexed", 4, 4)
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["restartPolicy"] in ("OnFailure", "Never")  # a Job takes no other
    assert "--master-addr=vae-0.vae" in container_of(job["spec"]["template"])["command"]


@pytest.mark.parametrize("plain", [[], ["--plain"]])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.lists(WORD, max_size=4))
def test_any_command_arrives_as_it_was_given(
    plain: list[str], arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["python", *arguments, "$(HOME) $$(HOME) $HOME $$ \"'\\ \x7f\x85\u2028\ufeff\U0001f600 :\n- # {x}"]
    *_, job = read(text_of(capfd, *plain, "--", *command))
    pod = job["spec"]["template"] if plain else job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    program = [expanded(argument, {"HOME": "/root"}) for argument in container_of(pod)["command"]]
    assert program[-len(command) :] == command


@pytest.mark.parametrize("plain", [[], ["--plain"]])
def test_the_processes_of_two_pods_find_each_other(plain: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import os; os.write(1, ' '.join(os.environ[n] for n in ('RANK','LOCAL_RANK','WORLD_SIZE')).encode() + b'\\n')"
    )
    text = text_of(capfd, *plain, "--nodes", "2", "--procs-per-node", "2", "--", sys.executable, "-c", code)
    program = [json.loads(argument) for argument in re.findall(r'^ +- ("[^\n]*")$', text, flags=re.MULTILINE)]
    program = program[program.index("rankwise") + 1 :]
    program = program[: program.index(code.replace("$", "$$")) + 1]  # the first pod's; all have the same
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    here = {"--master-addr=train-0.train": "--master-addr=127.0.0.1", "--master-port=29500": f"--master-port={port}"}
    program = [here.get(argument, argument) for argument in program]
    with contextlib.ExitStack() as stack:
        pods = []
        for index in ("0", "1"):
            given = {"JOB_COMPLETION_INDEX": index}
            if not plain:
                given = {"RANK": index, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, "-m", "rankwise", *(expanded(argument, given) for argument in program)]
            pod = subprocess.Popen(
                command, env=os.environ | given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.callback(pod.kill)
            pods.append(pod)
        outputs = [pod.communicate(timeout=100) for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], outputs
    assert [sorted(out.splitlines()) for out, _ in outputs] == [["0 0 4", "1 1 4"], ["2 0 4", "3 1 4"]]
