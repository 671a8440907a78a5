import json
import os

import pytest
import torch

from videovae.errors import WeightsError
from videovae.models import folder
from videovae.models.folder import CONFIG_NAME, WEIGHTS_NAME, read_config, read_weights, write_folder

WEIGHTS = {"a.weight": torch.randn(3, 4), "b": torch.arange(4)}


def test_written_folder_reads_back_equal(tmp_path):
    write_folder(tmp_path / "new" / "model", "Model", {"width": 3}, WEIGHTS)
    assert sorted(path.name for path in (tmp_path / "new" / "model").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    config = read_config(tmp_path / "new" / "model")
    assert config == {"_class_name": "Model", "_diffusers_version": "0.30.3", "width": 3}
    weights = read_weights(tmp_path / "new" / "model")
    assert weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)


def test_strided_weights_are_written_by_value(tmp_path):
    weight = torch.randn(3, 4).T
    write_folder(tmp_path, "Model", {}, {"weight": weight})
    assert torch.equal(read_weights(tmp_path)["weight"], weight)


def test_weights_may_be_read_by_whoever_may_read_the_config(tmp_path):
    write_folder(tmp_path, "Model", {}, WEIGHTS)
    assert (tmp_path / WEIGHTS_NAME).stat().st_mode == (tmp_path / CONFIG_NAME).stat().st_mode


def test_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WeightsError, match=r"is not empty\. Give a new or an empty folder"):
        write_folder(tmp_path, "Model", {}, WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_path_of_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WeightsError, match=r"cannot write the model to .*file"):
        write_folder(tmp_path / "file", "Model", {}, WEIGHTS)


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder.os, "fsync", full)
    with pytest.raises(WeightsError, match=r"cannot write the model to .*: No space left on device"):
        write_folder(tmp_path, "Model", {}, WEIGHTS)
    assert os.listdir(tmp_path) == []


def test_missing_folder_says_what_a_model_folder_holds(tmp_path):
    with pytest.raises(WeightsError, match=r"cannot read .*nowhere.*A model folder holds config.json and"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"\xff\xfe\x00", "is not JSON"), (b"[1]", "holds a list")],
)
def test_broken_config_is_named(tmp_path, content, message):
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(WeightsError, match=f"config.json {message}"):
        read_config(tmp_path)


def test_missing_weights_file_is_named(tmp_path):
    (tmp_path / CONFIG_NAME).write_text(json.dumps({}))
    with pytest.raises(WeightsError, match=f"cannot read .*{WEIGHTS_NAME}"):
        read_weights(tmp_path)


def test_truncated_weights_file_is_named(tmp_path):
    write_folder(tmp_path, "Model", {}, WEIGHTS)
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(WeightsError, match=f"{WEIGHTS_NAME} is cut off or no safetensors file"):
        read_weights(tmp_path)
