"""One rank of a job that logs as `logs.py` counts it, with one library used as its documentation says.

torchrun --nproc-per-node 8 benchmarks/log_job.py STYLE
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

NUM_LINES = 10
LINE, ALIKE, OWN = "shard %d is read", "the disk is nearly full", "my fan is loud"
SPEAKER = 5


class Style(NamedTuple):
    """How a program says three kinds of things."""

    rank: int
    barrier: Callable[[], object]
    info: Callable[[str], object]
    """What one rank may say for all."""
    warn: Callable[[str], object]
    """What a person should hear of any rank."""


@contextlib.contextmanager
def bare_stdlib() -> Iterator[Style]:
    with plain_group() as (rank, barrier):
        logging.basicConfig(level=logging.INFO)
        log = logging.getLogger("train")
        yield Style(rank, barrier, log.info, log.warning)


@contextlib.contextmanager
def loguru() -> Iterator[Style]:
    from loguru import logger

    with plain_group() as (rank, barrier):
        yield Style(rank, barrier, logger.info, logger.warning)


@contextlib.contextmanager
def rankwise() -> Iterator[Style]:
    import rankwise

    log = rankwise.get_logger("train")
    with rankwise.init(device_type="cpu") as session:
        yield Style(session.identity.rank, rankwise.barrier, log.info, log.warning)


@contextlib.contextmanager
def accelerate(every_rank: bool = False) -> Iterator[Style]:
    from accelerate import PartialState
    from accelerate.logging import get_logger

    state = PartialState(cpu=True)
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    log = get_logger("train")

    def warn(text: str) -> None:
        log.warning(text, main_process_only=not every_rank)

    yield Style(state.process_index, state.wait_for_everyone, log.info, warn)
    state.destroy_process_group()


def accelerate_every_rank() -> contextlib.AbstractContextManager[Style]:
    return accelerate(every_rank=True)


@contextlib.contextmanager
def fabric(every_rank: bool = False) -> Iterator[Style]:
    import torch
    from lightning_fabric import Fabric
    from lightning_fabric.utilities.rank_zero import rank_prefixed_message, rank_zero_info, rank_zero_warn

    module = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
    module.launch()

    def warn(text: str) -> None:
        if every_rank:
            warnings.warn(rank_prefixed_message(text, module.global_rank), stacklevel=2)
        else:
            rank_zero_warn(text)

    yield Style(module.global_rank, module.barrier, rank_zero_info, warn)
    torch.distributed.destroy_process_group()


def fabric_every_rank() -> contextlib.AbstractContextManager[Style]:
    return fabric(every_rank=True)


STYLES: dict[str, Callable[[], contextlib.AbstractContextManager[Style]]] = {
    make.__name__: make
    for make in (bare_stdlib, rankwise, accelerate, accelerate_every_rank, fabric, fabric_every_rank, loguru)
}


@contextlib.contextmanager
def plain_group() -> Iterator[tuple[int, Callable[[], object]]]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    yield dist.get_rank(), dist.barrier
    dist.destroy_process_group()


def main() -> None:
    with STYLES[sys.argv[1]]() as style:
        style.barrier()
        for number in range(NUM_LINES):
            style.info(LINE % number)
        style.barrier()
        style.warn(ALIKE)
        if style.rank == SPEAKER:
            style.warn(OWN)
        style.barrier()


if __name__ == "__main__":
    main()
