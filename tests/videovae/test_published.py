"""Weights that others trained: what their trainers and diffusers write, and what is damaged or hostile."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import videovae
from videovae.errors import WeightsError
from videovae.models.discriminator import DiscriminatorConfig, NLayerDiscriminator3D
from videovae.models.folder import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from videovae.models.wfvae import WFVAEModel
from videovae.models.wfvae_config import WFVAEConfig
from videovae.published import BIN_INDEX_NAME, BIN_NAME, WAVELETS, choose_weights, import_weights

TINY = WFVAEConfig(
    latent_dim=2,
    base_channels=4,
    encoder_num_resblocks=1,
    encoder_energy_flow_hidden_size=4,
    decoder_num_resblocks=1,
    decoder_energy_flow_hidden_size=4,
    norm_type="layernorm",
)
STEP = 3


def write_config(folder: Path, **changes: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps({"_class_name": "WFVAEModel"} | TINY.to_dict() | changes))


def trained_names(model: WFVAEModel) -> list[str]:
    """What the public trainers average: what has gradients when the average begins, so no wavelet."""
    return [name for name, _ in model.named_parameters()]


def trainer_checkpoint(model: WFVAEModel, average: WFVAEModel | None) -> dict[str, Any]:
    """What `save_checkpoint` of the public trainers writes, after a step of both optimizers."""
    discriminator = NLayerDiscriminator3D(DiscriminatorConfig(base_channels=4, num_layers=2))
    optimizers = {}
    for name, module in (("gen_optimizer", model), ("disc_optimizer", discriminator)):
        optimizer = torch.optim.AdamW(module.parameters())
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizers[name] = optimizer.state_dict()
    judge = {f"discriminator.{name}": tensor for name, tensor in discriminator.state_dict().items()}
    values = {} if average is None else average.state_dict()
    return {
        "epoch": 0,
        "current_step": STEP,
        "optimizer_state": optimizers,
        "state_dict": {
            "gen_model": model.state_dict(),
            "dics_model": judge | {"logvar": torch.zeros(()), "perceptual_loss.lin0.model.1.weight": torch.ones(1, 2)},
        },
        "ema_state_dict": {f"module.{name}": values[name] for name in trained_names(model) if average is not None},
        "scaler_state": torch.amp.GradScaler("cpu").state_dict(),
        "sampler_state": {"epoch": 0, "seed": 0, "current_index": STEP},
    }


@pytest.fixture
def raw() -> WFVAEModel:
    torch.manual_seed(1)
    return WFVAEModel(TINY)


@pytest.fixture
def average() -> WFVAEModel:
    torch.manual_seed(2)
    return WFVAEModel(TINY)


@pytest.fixture
def checkpoint(raw: WFVAEModel, average: WFVAEModel, tmp_path: Path) -> Path:
    """A checkpoint of a public trainer, with the config beside it."""
    write_config(tmp_path / "trained")
    path = tmp_path / "trained" / f"checkpoint-{STEP}.ckpt"
    torch.save(trainer_checkpoint(raw, average), path)
    return path


def edit(path: Path, change: Any) -> None:
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


def assert_same(model: nn.Module, weights: dict[str, Tensor]) -> None:
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_averaged_weights_of_a_checkpoint_are_taken(checkpoint: Path, average: WFVAEModel, tmp_path: Path) -> None:
    for number, (choice, source) in enumerate((("auto", checkpoint), ("ema", checkpoint.parent))):
        found = import_weights(source, tmp_path / str(number), weights=choice)  # type: ignore[arg-type]
        assert (found.kind, found.step) == ("ema", STEP)
        assert_same(videovae.load(tmp_path / str(number)), average.state_dict())


def test_raw_weights_of_a_checkpoint_are_taken(checkpoint: Path, raw: WFVAEModel, tmp_path: Path) -> None:
    assert import_weights(checkpoint, tmp_path / "out", weights="raw").kind == "raw"
    assert_same(videovae.load(tmp_path / "out"), raw.state_dict())


def test_raw_weights_are_taken_where_there_is_no_average(checkpoint: Path, raw: WFVAEModel, tmp_path: Path) -> None:
    edit(checkpoint, lambda saved: saved.update(ema_state_dict={}))
    assert import_weights(checkpoint, tmp_path / "out").kind == "raw"
    assert_same(videovae.load(tmp_path / "out"), raw.state_dict())
    with pytest.raises(WeightsError, match=r"has no averaged weights \(ema_state_dict\)\. Give --weights raw"):
        import_weights(checkpoint, tmp_path / "other", weights="ema")


def test_what_an_average_leaves_out_comes_from_the_raw_weights(
    checkpoint: Path, raw: WFVAEModel, average: WFVAEModel, tmp_path: Path
) -> None:
    """As with a frozen encoder; the public code leaves random weights there."""

    def forget_encoder(saved: dict[str, Any]) -> None:
        for name in [name for name in saved["ema_state_dict"] if name.startswith("module.encoder.")]:
            del saved["ema_state_dict"][name]

    edit(checkpoint, forget_encoder)
    import_weights(checkpoint, tmp_path / "out")
    expected = {name: (raw if name.startswith("encoder.") else average).state_dict()[name] for name in raw.state_dict()}
    assert_same(videovae.load(tmp_path / "out"), expected)


def test_an_average_that_was_saved_alone_is_enough(checkpoint: Path, average: WFVAEModel, tmp_path: Path) -> None:
    edit(checkpoint, lambda saved: saved.pop("state_dict"))
    import_weights(checkpoint, tmp_path / "out")
    assert_same(videovae.load(tmp_path / "out"), average.state_dict())
    with pytest.raises(WeightsError, match="holds averaged weights alone"):
        import_weights(checkpoint, tmp_path / "other", weights="raw")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("nested", [True, False])
def test_names_of_wrappers_are_removed(
    prefix: str, nested: bool, raw: WFVAEModel, checkpoint: Path, tmp_path: Path
) -> None:
    named = {f"{prefix}{name}": tensor for name, tensor in raw.state_dict().items()}
    torch.save({"state_dict": named} if nested else named, checkpoint)
    import_weights(checkpoint, tmp_path / "out")
    assert_same(videovae.load(tmp_path / "out"), raw.state_dict())


def test_names_of_wrappers_amid_a_name_are_removed(raw: WFVAEModel, checkpoint: Path, tmp_path: Path) -> None:
    named = {name.replace("encoder.", "encoder._orig_mod."): tensor for name, tensor in raw.state_dict().items()}
    torch.save({"state_dict": {"gen_model": named}}, checkpoint)
    import_weights(checkpoint, tmp_path / "out")
    assert_same(videovae.load(tmp_path / "out"), raw.state_dict())


def test_a_weight_with_and_without_a_prefix_is_refused(raw: WFVAEModel, checkpoint: Path, tmp_path: Path) -> None:
    torch.save(raw.state_dict() | {"module.decoder.conv_out.bias": torch.zeros(24)}, checkpoint)
    with pytest.raises(WeightsError, match="holds 1 weights twice"):
        import_weights(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("layout", ["one", "sharded", "bin", "bin sharded"])
def test_folders_of_diffusers_are_read(layout: str, raw: WFVAEModel, tmp_path: Path) -> None:
    source, weights = tmp_path / "published", raw.state_dict()
    write_config(source)
    names = sorted(weights)
    halves = {"part-1": {name: weights[name] for name in names[::2]}, "part-2": {n: weights[n] for n in names[1::2]}}
    save, one, index = (
        (torch.save, BIN_NAME, BIN_INDEX_NAME) if "bin" in layout else (save_file, WEIGHTS_NAME, INDEX_NAME)
    )
    if "sharded" in layout:
        for file_name, half in halves.items():
            save(half, source / file_name)
        weight_map = {name: file_name for file_name, half in halves.items() for name in half}
        (source / index).write_text(json.dumps({"weight_map": weight_map}))
    else:
        save(weights, source / one)
    assert import_weights(source, tmp_path / "out").kind is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert_same(videovae.load(tmp_path / "out"), weights)
    with pytest.raises(WeightsError, match=r"Leave --weights away|has no averaged weights"):
        import_weights(source, tmp_path / "other", weights="ema")


def test_half_precision_becomes_float32(raw: WFVAEModel, checkpoint: Path, tmp_path: Path) -> None:
    torch.save({name: tensor.bfloat16() for name, tensor in raw.state_dict().items()}, checkpoint)
    import_weights(checkpoint, tmp_path / "out")
    written = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert torch.equal(
        written["decoder.conv_out.weight"], raw.state_dict()["decoder.conv_out.weight"].bfloat16().float()
    )


def test_a_config_elsewhere_can_be_given(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint.parent / CONFIG_NAME).rename(tmp_path / "model.json")
    with pytest.raises(WeightsError, match=r"no config\.json is beside .*Give --config FILE"):
        import_weights(checkpoint, tmp_path / "out")
    import_weights(checkpoint, tmp_path / "out", config=tmp_path / "model.json")
    assert videovae.load(tmp_path / "out").config == TINY


CASES = ("wfvae_ln_z4_trilinear_attn", "wfvae_ln_z8_nearest_noattn", "wfvae_gn_z8_nearest_attn_recipe")


@pytest.mark.parametrize("case", [*CASES, "wf_wfvae_ln_z4_8x_temporal_tiled"])
@torch.no_grad()
def test_imported_weights_give_the_outputs_of_the_public_models(case: str, shared_dir: Path, tmp_path: Path) -> None:
    record, tensors, weights = read_golden(shared_dir / "golden", case)
    source = tmp_path / "trained"
    source.mkdir()
    (source / CONFIG_NAME).write_text(json.dumps(record["config"]))
    noise = {f"module.{name}": torch.randn_like(tensor) for name, tensor in weights.items()}
    torch.save({"state_dict": {"gen_model": noise}, "ema_state_dict": weights}, source / "model.ckpt")
    import_weights(source, tmp_path / "out")
    model = videovae.load(tmp_path / "out")
    for index in range(len(record["inputs"])):
        expected = {
            name: tensors[f"in{index}/{name}"].float() for name in ("input", "moments", "mean", "decode_of_mean")
        }
        moments = model.encode(expected["input"]).latent_dist.parameters
        recon = model.decode(expected["mean"]).sample
        for actual, wanted in ((moments, expected["moments"]), (recon, expected["decode_of_mean"])):
            assert (actual - wanted).abs().max() <= 5e-5 * wanted.abs().max()


def read_golden(folder: Path, case: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    record = json.loads((folder / f"{case}.json").read_text())
    tensors = load_file(folder / f"{case}.safetensors")
    spec = importlib.util.spec_from_file_location("golden_recipe", folder / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    weights = {}
    for name, shape in record["weight_keys"].items():
        stored = tensors.get(f"weights/{name}")
        weights[name] = stored.float() if stored is not None else recipe.recipe_tensor(name, shape, record["seed"])
    return record, tensors, weights


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", ["checkpoint.ckpt", BIN_NAME])
def test_a_checkpoint_with_code_is_refused_and_nothing_is_run(name: str, raw: WFVAEModel, tmp_path: Path) -> None:
    mark, source = tmp_path / "was-run", tmp_path / "hostile"
    write_config(source)
    torch.save({"state_dict": {"gen_model": raw.state_dict()}, "callbacks": Hostile(mark)}, source / name)
    with pytest.raises(WeightsError, match="it may run code, so it is refused, and nothing of it was run"):
        import_weights(source, tmp_path / "out")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "model.safetensors", "checkpoint.ckpt"])
def test_a_pickle_under_any_name_is_refused_and_not_run(name: str, tmp_path: Path) -> None:
    mark, source = tmp_path / "was-run", tmp_path / "hostile"
    write_config(source)
    (source / name).write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(WeightsError, match=r"is cut off or no safetensors file|is no file that torch\.save wrote"):
        import_weights(source / name, tmp_path / "out")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gen: gen.pop("decoder.conv_out.bias"), r"1 missing: decoder\.conv_out\.bias"),
        (lambda gen: gen.pop("encoder.wavelet_transform_in.h_conv.conv.weight"), r"1 missing: encoder\.wavelet"),
        (lambda gen: gen.update(extra=torch.zeros(1)), r"1 unknown: extra"),
        (
            lambda gen: gen.update({"decoder.conv_out.bias": torch.zeros(5)}),
            r"1 of another shape: decoder\.conv_out\.bias \(5,\) instead of \(24,\)",
        ),
        (lambda gen: gen.update({"decoder.conv_out.bias": None}), r"holds decoder\.conv_out\.bias: NoneType"),
        (
            lambda gen: gen.update({"decoder.conv_out.bias": torch.full((24,), torch.nan)}),
            r"no finite numbers in 1 tensors, decoder\.conv_out\.bias",
        ),
    ],
)
def test_a_weight_that_is_not_the_models_is_named(
    change: Any, message: str, raw: WFVAEModel, checkpoint: Path, tmp_path: Path
) -> None:
    edit(checkpoint, lambda saved: change(saved["state_dict"]["gen_model"]))
    with pytest.raises(WeightsError, match=message):
        import_weights(checkpoint, tmp_path / "out", weights="raw")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "CausalVAEModel"}, "holds a 'CausalVAEModel'; known models are"),
        ({"base_channels": 8}, "of another shape"),
        ({"encoder_num_resblocks": 10**9}, "encoder_num_resblocks is 1000000000, but the weights have only"),
        ({"latent_dim": 10**9}, "latent_dim is 1000000000, but the weights have only"),
        ({"norm_type": 3}, "norm_type=3 must be str"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    changes: dict[str, object], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    write_config(checkpoint.parent, **changes)
    with pytest.raises(WeightsError, match=message):
        import_weights(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([1, 2], "holds a list; a checkpoint or a state dict"),
        ({}, "its keys are: none"),
        ({"epoch": 3, "model": {}}, "is no checkpoint with state_dict or ema_state_dict; its keys are: epoch, model"),
        ({"state_dict": [1]}, "holds a list under state_dict"),
        ({"state_dict": {"gen_model": 3}}, "holds a int under gen_model"),
        ({"state_dict": {"gen_model": {3: torch.ones(1)}}}, "holds 3: Tensor"),
        ({"state_dict": {}, "ema_state_dict": None}, "is no checkpoint with state_dict or ema_state_dict"),
    ],
)
def test_what_is_no_trainers_checkpoint_is_told(saved: object, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        choose_weights(saved, "auto", origin="x.ckpt")


def test_a_truncated_checkpoint_is_told(checkpoint: Path, tmp_path: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"checkpoint-3\.ckpt is cut off or damaged"):
        import_weights(checkpoint, tmp_path / "out")


def test_sources_without_weights_are_told(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere does not exist\. Give a checkpoint, or a folder"):
        import_weights(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(WeightsError, match="It looks like a run folder: those are exported"):
        import_weights(tmp_path / "run", tmp_path / "out")
    WFVAEModel(TINY).save_pretrained(tmp_path / "pipeline" / "vae")
    with pytest.raises(WeightsError, match=r"Did you mean .*pipeline/vae\?"):
        import_weights(tmp_path / "pipeline", tmp_path / "out")


def test_a_folder_with_several_sets_of_weights_is_asked_about(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint.parent / "checkpoint-4.ckpt").write_bytes(checkpoint.read_bytes())
    with pytest.raises(WeightsError, match=r"holds 2 sets of weights: checkpoint-3\.ckpt, checkpoint-4\.ckpt"):
        import_weights(checkpoint.parent, tmp_path / "out")


def test_a_folder_that_holds_something_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    for target in (checkpoint.parent, checkpoint):
        with pytest.raises(WeightsError, match="is not empty"):
            import_weights(checkpoint, target)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == [checkpoint.name, CONFIG_NAME]


def test_wavelets_of_a_source_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    """They are constants, but the ones that the weights were trained with count."""
    name = "encoder.wavelet_transform_in.h_conv.conv.weight"
    edit(checkpoint, lambda saved: saved["state_dict"]["gen_model"][name].mul_(1.001))
    import_weights(checkpoint, tmp_path / "out")
    model = videovae.load(tmp_path / "out")
    fresh = WFVAEModel(TINY).state_dict()[name]
    assert torch.allclose(model.state_dict()[name], fresh * 1.001)
    assert not torch.equal(model.state_dict()[name], fresh)


def test_every_buffer_of_the_model_is_a_wavelets(raw: WFVAEModel) -> None:
    owners = [module for module in raw.modules() if isinstance(module, WAVELETS)]
    assert sum(len(list(owner.buffers())) for owner in owners) == len(list(raw.buffers())) > 0


def test_load_without_the_extra_says_what_to_install() -> None:
    program = "import sys; sys.modules['einops'] = None; import videovae; videovae.load"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.endswith(
        "ImportError: videovae.load needs einops, which is not installed: pip install 'rankwise[videovae]'\n"
    )
