"""Under a real Slurm: srun in all its layouts, shells that srun did not start, and torchrun and mpirun inside."""

import json
import re
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

NODES = ["n1", "n2"]
BLOCK = [[0, 1], [2, 3]]


def job_id(rows: list[dict]) -> str:
    """The job's number, which is known from the processes alone."""
    assert rows[0]["job_id"].isdecimal()
    return rows[0]["job_id"]


@pytest.mark.parametrize(
    ("layout", "nodes"),
    [
        pytest.param(["-N2", "--ntasks-per-node=2"], BLOCK, id="2x2"),
        pytest.param(["-N2", "-n3"], [[0, 1], [2]], id="3 on 2"),
        pytest.param(["-N2", "--ntasks-per-node=2", "-m", "cyclic"], [[0, 2], [1, 3]], id="cyclic"),
        pytest.param(["-N2", "-n5", "-m", "plane=4"], [[0, 1, 2, 3], [4]], id="4 and 1"),
        pytest.param(["-N1", "-n1"], [[0]], id="one task"),
    ],
)
def test_srun_places_every_task(slurm, layout, nodes) -> None:
    done = slurm("srun", *layout, *slurm.whoami)
    done.assert_places(nodes, launcher="slurm", hostnames=NODES, job_id=job_id(done.rows))
    for row in done.rows:
        assert row["sources"]["rank"] == "SLURM_PROCID"
        assert row["sources"]["local_rank"] == "SLURM_LOCALID"
        assert row["sources"]["node_rank"] == "SLURM_NODEID"
        assert "assumed" not in row["sources"].values()


def test_tasks_may_lie_in_any_order_over_the_nodes(slurm, tmp_path: Path) -> None:
    order = tmp_path / "order"
    order.write_text("n2\nn1\nn1\nn1\n")
    done = slurm("srun", "-n4", "-m", "arbitrary", *slurm.whoami, SLURM_HOSTFILE=str(order))
    done.assert_places([[1, 2, 3], [0]], launcher="slurm", hostnames=NODES, job_id=job_id(done.rows))


def test_parts_of_a_heterogeneous_job_are_one_world(slurm) -> None:
    done = slurm("srun", "-N1", "-n2", *slurm.whoami, ":", "-N1", "-n1", *slurm.whoami)
    done.assert_places([[0, 1], [2]], launcher="slurm", hostnames=NODES, job_id=job_id(done.rows))


def test_lines_of_many_tasks_do_not_mix(slurm) -> None:
    done = slurm("srun", "-N2", "--ntasks-per-node=8", *slurm.whoami)
    done.assert_places(
        [list(range(8)), list(range(8, 16))], launcher="slurm", hostnames=NODES, job_id=job_id(done.rows)
    )


OWN_UUID = "-8f6c2e1a-0000-4000-8000-00000000000"


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        pytest.param("CUDA_VISIBLE_DEVICES=$SLURM_LOCALID", ["cuda:0", "cuda:0"], id="each its own number"),
        pytest.param("CUDA_VISIBLE_DEVICES=0,1", ["cuda:0", "cuda:1"], id="all of the node"),
        pytest.param(f"CUDA_VISIBLE_DEVICES=GPU{OWN_UUID}$SLURM_LOCALID", ["cuda:0", "cuda:0"], id="each its own UUID"),
        pytest.param(f"CUDA_VISIBLE_DEVICES=GPU{OWN_UUID}0,GPU{OWN_UUID}1", ["cuda:0", "cuda:1"], id="all UUIDs"),
        pytest.param(
            f"CUDA_VISIBLE_DEVICES=MIG{OWN_UUID}$SLURM_LOCALID", ["cuda:0", "cuda:0"], id="each its own slice"
        ),
        pytest.param(
            "SLURM_GPUS_PER_TASK=2 CUDA_VISIBLE_DEVICES=$((2 * SLURM_LOCALID)),$((2 * SLURM_LOCALID + 1))",
            ["cuda:0", "cuda:0"],
            id="each its own two",
        ),
        pytest.param("ROCR_VISIBLE_DEVICES=0,1", ["cuda:0", "cuda:1"], id="all of AMD"),
        pytest.param("CUDA_VISIBLE_DEVICES=", ["cpu", "cpu"], id="none"),
    ],
)
def test_device_follows_what_each_task_may_see(slurm, variables, devices) -> None:
    """As Slurm sets the variables where nodes have GPUs."""
    script = f'export {variables}; exec "$@"'
    done = slurm("srun", "-N2", "--ntasks-per-node=2", "bash", "-c", script, "bash", *slurm.whoami)
    done.assert_places(BLOCK, launcher="slurm", hostnames=NODES, job_id=job_id(done.rows), devices=devices)


def test_variables_left_in_the_shell_are_a_contradiction(slurm) -> None:
    command = ["srun", "--label", "-N2", "--ntasks-per-node=2", *slurm.whoami]
    done = slurm(*command, RANK="0", WORLD_SIZE="4")
    assert done.status == 2, str(done)
    assert "Traceback" not in done.stderr
    # Rank 0 cannot know; the others do.
    assert [line[:3] for line in done.stdout.splitlines()] in ([], ["0: "])
    for rank in (1, 2, 3):
        (message,) = re.findall(rf"^{rank}: (error: .*)$", done.stderr, re.MULTILINE)
        assert "RANK=0" in message
        assert f"SLURM_PROCID={rank}" in message


def test_world_size_left_in_the_shell_is_a_contradiction(slurm) -> None:
    done = slurm("srun", "-N2", "-n2", *slurm.whoami, WORLD_SIZE="8")
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr.count("error: ") >= 2
    assert "WORLD_SIZE=8" in done.stderr
    assert "SLURM_STEP_NUM_TASKS=2" in done.stderr


def test_shell_of_an_allocation_is_one_process(slurm) -> None:
    done = slurm("salloc", "--quiet", "-N2", "--ntasks-per-node=2", *slurm.whoami)
    done.assert_places([[0]], launcher="single", hostnames=[socket.gethostname()], job_id=job_id(done.rows))
    assert done.rows[0]["sources"]["job_id"] == "SLURM_JOB_ID"


def test_batch_script_is_one_process_and_its_steps_are_many(slurm, tmp_path: Path) -> None:
    whoami = " ".join(slurm.whoami)
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2 --output=/dev/null\n"
        f"cd {tmp_path}\n{whoami} >batch 2>&1\nsrun {whoami} >step 2>&1\ntouch done\n"
    )
    submitted = slurm("sbatch", "--parsable", script)
    assert submitted.status == 0, str(submitted)
    number = submitted.stdout.strip()
    deadline = time.monotonic() + 60
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline, slurm("scontrol", "show", "job", number).stdout
        time.sleep(0.1)
    batch, step = (replace(submitted, stdout=(tmp_path / name).read_text()) for name in ("batch", "step"))
    batch.assert_places([[0]], launcher="single", hostnames=["n1"], job_id=number)
    step.assert_places(BLOCK, launcher="slurm", hostnames=NODES, job_id=number)


def test_torchrun_inside_srun_is_torchrun(slurm) -> None:
    agent = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-id", "job-7", "--master-port", slurm.free_port()]
    script = 'exec "${@/NODE/$SLURM_NODEID}"'
    options = [*agent, "--master-addr", "127.0.0.1", "--node-rank", "NODE", *slurm.whoami_module]
    done = slurm("srun", "-N2", "--ntasks-per-node=1", "bash", "-c", script, "bash", *slurm.torchrun, *options)
    done.assert_places(BLOCK, launcher="torchrun", hostnames=NODES, job_id="job-7")


def test_ranks_of_srun_find_each_other_without_an_address(slurm) -> None:
    done = slurm("srun", "-N2", "-n3", *slurm.python, slurm.program("gather.py"))
    done.assert_places(
        [[0, 1], [2]], launcher="slurm", hostnames=NODES, job_id=job_id(done.rows), devices=["cpu", "cpu"]
    )
    assert {row["sources"]["rank"] for row in done.rows} == {"SLURM_PROCID"}


def test_killed_task_is_named_by_the_tasks_that_srun_leaves_alone(slurm) -> None:
    alone = ["--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--label"]
    done = slurm("srun", *alone, "-N2", "-n3", *slurm.python, slurm.program("lose_a_rank.py"), "2")
    assert done.status != 0
    told = [json.loads(line.partition(": ")[2]) for line in done.stdout.splitlines()]
    assert sorted(row["rank"] for row in told) == [0, 1], str(done)
    assert all(row["seconds"] < 30 for row in told)
    assert all("rank 2 (n2" in row["error"] for row in told)
    assert "rank 2 (n2" in done.stderr
