"""One file of the main process: whole, or what was there before, and all ranks know which."""

import errno
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import rankwise
from rankwise import save_on_main
from rankwise.checkpoint import one_file
from rankwise.errors import CheckpointError
from rankwise.testing import on_ranks


def test_file_is_what_torch_loads_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "net.pt"
    save_on_main({"w": torch.arange(3)}, path)
    save_on_main({"w": torch.arange(4)}, str(path))
    assert torch.load(path, weights_only=True)["w"].tolist() == [0, 1, 2, 3]
    assert os.listdir(path.parent) == ["net.pt"]


@on_ranks(2)
def test_what_the_other_ranks_pass_is_ignored(tmp_path: Path) -> None:
    is_main = dist.get_rank() == 0
    path: Any = tmp_path / "net.pt" if is_main else None
    save_on_main("main" if is_main else lambda: None, path)
    assert os.listdir(tmp_path) == ["net.pt"]
    assert torch.load(tmp_path / "net.pt", weights_only=True) == "main"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_that_refuses_leaves_what_was_there_and_no_rest(tmp_path: Path, call: str) -> None:
    path = tmp_path / "net.pt"
    save_on_main("first", path)
    refuse = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with mock.patch.object(os, call, refuse), pytest.raises(CheckpointError) as raised:
        save_on_main("second", path)
    assert str(raised.value).startswith(f"{path} was not saved on the main process: [Errno 28] No space left")
    assert os.listdir(tmp_path) == ["net.pt"]
    assert torch.load(path, weights_only=True) == "first"


def test_disk_that_only_refuses_to_confirm_the_new_name_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    save_on_main("first", path)
    refuse = mock.Mock(side_effect=OSError(errno.EIO, "Input/output error"))
    with mock.patch.object(one_file, "fsync_directory", refuse), pytest.raises(CheckpointError) as raised:
        save_on_main("second", path)
    assert str(raised.value).startswith(f"{path} is new and whole, but the disk refused to confirm its name")
    assert torch.load(path, weights_only=True) == "second"


def test_what_does_not_pickle_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"net.pt was not saved on the main process: \w+: .*lambda"):
        save_on_main(lambda: None, tmp_path / "net.pt")
    assert os.listdir(tmp_path) == []


def test_interrupt_stays_itself_and_leaves_no_rest(tmp_path: Path) -> None:
    with mock.patch.object(os, "fsync", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        save_on_main("x", tmp_path / "net.pt")
    assert os.listdir(tmp_path) == []


@on_ranks(2)
def test_main_process_alone_writes_and_its_failure_reaches_all(tmp_path: Path) -> None:
    rank = dist.get_rank()
    save_on_main({"rank": rank}, tmp_path / "net.pt")
    assert torch.load(tmp_path / "net.pt", weights_only=True) == {"rank": 0}  # on return it is there for all
    rankwise.barrier()
    save_on_main(None if rank == 0 else (lambda: None), tmp_path / "net.pt")  # what the others pass is ignored
    rankwise.barrier()
    blocked = tmp_path / "file"
    if rank == 0:
        blocked.touch()
    with pytest.raises(CheckpointError, match=r"was not saved on the main process: .*File exists") as raised:
        save_on_main(1, blocked / "net.pt")
    assert raised.value.on_every_rank
