"""A job of two ranks in which one of them misbehaves, in the way that the first argument names."""

import os
import signal
import sys
import time

import torch.distributed as dist
import torch.multiprocessing

import rankwise


def main(act: str) -> None:
    with rankwise.init(device_type="cpu", timeout_seconds=60) as session:
        rank = session.identity.rank
        rankwise.barrier("together")
        if act == "raise-late" and rank == 1:
            time.sleep(7)  # rank 0 has left long since
            raise ValueError("the late reason")
        if act == "raise-while-main-is-busy":
            if rank == 1:
                raise ValueError("the reason")
            time.sleep(30)
        if act == "stop-main":
            if rank == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            rankwise.barrier("after", timeout_seconds=2)
        if act == "ignore-sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
            os.write(1, b"still here\n")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)


def spawned(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    with rankwise.init(device_type="cpu") as session:
        identity = session.identity
        places = rankwise.gather_objects((identity.rank, identity.local_rank, identity.local_world_size))
        if identity.is_main_process:
            os.write(1, f"{identity.launcher} {places}\n".encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "spawn":
        torch.multiprocessing.spawn(spawned, (sys.argv[2],), nprocs=2)
    else:
        main(sys.argv[1])
