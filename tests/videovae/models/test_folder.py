import json
import os

import pytest
import torch
from safetensors.torch import save_file

from videovae.errors import WeightsError
from videovae.models import folder
from videovae.models.folder import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    holds_weights,
    read_config,
    read_weights,
    write_folder,
)

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


def test_weights_in_several_files_are_read_as_one(tmp_path):
    write_shards(tmp_path, {"one.safetensors": ["a.weight"], "two.safetensors": ["b"]})
    weights = read_weights(tmp_path)
    assert holds_weights(tmp_path)
    assert weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)


def test_a_file_that_an_index_names_and_that_is_missing_is_told(tmp_path):
    write_shards(tmp_path, {"one.safetensors": ["a.weight"], "two.safetensors": ["b"]})
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"cannot read .*two\.safetensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "has no weight_map"),
        ({}, "has no weight_map"),
        ([1], "has no weight_map"),
        ({"a.weight": "../one.safetensors"}, r"names the file '\.\./one.safetensors'; all files have to be in its own"),
        ({"a.weight": "/etc/passwd"}, "all files have to be in its own folder"),
        ({"a.weight": "one\0.safetensors"}, "all files have to be in its own folder"),
        ({"a.weight": ".."}, "all files have to be in its own folder"),
        ({"a.weight": 3}, "cannot read .*3"),
        ({"a.weight": "one.safetensors", "c": "one.safetensors"}, r"differs .* in 1 tensors: c is not in it"),
        ({"c": "one.safetensors"}, r"differs .* in 2 tensors: a.weight is in it"),
    ],
)
def test_index_that_does_not_fit_the_files_is_refused(weight_map, message, tmp_path):
    write_shards(tmp_path, {"one.safetensors": ["a.weight"]})
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path)


def test_a_deeply_nested_config_is_told(tmp_path):
    (tmp_path / CONFIG_NAME).write_text("[" * 100_000)
    with pytest.raises(WeightsError, match=r"config\.json is not JSON"):
        read_config(tmp_path)


def test_a_claim_of_a_petabyte_is_told(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**48], "data_offsets": [0, 2**50]}}).encode()
    (tmp_path / WEIGHTS_NAME).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(WeightsError, match=f"{WEIGHTS_NAME} is cut off or no safetensors file"):
        read_weights(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes((2**60).to_bytes(8, "little") + header)
    with pytest.raises(WeightsError, match=f"{WEIGHTS_NAME} is cut off or no safetensors file"):
        read_weights(tmp_path)


def write_shards(folder, names):
    for file_name, tensors in names.items():
        save_file({name: WEIGHTS[name] for name in tensors}, folder / file_name)
    weight_map = {name: file_name for file_name, tensors in names.items() for name in tensors}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
