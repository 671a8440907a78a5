import dataclasses
import importlib.util
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _find_tensors

from videovae.errors import ConfigError
from videovae.models.wfvae import TILE_LATENT_FRAMES, WFVAEModel
from videovae.models.wfvae_config import SPACE_AND_TIME, WFVAEConfig

CASES = [
    "wfvae_gn_z8_nearest_attn_recipe",
    "wfvae_ln_z16_res1_con2",
    "wfvae_ln_z4_8x_temporal",
    "wfvae_ln_z4_trilinear_attn",
    "wfvae_ln_z8_nearest_noattn",
    "wf_wfvae_ln_z4_8x_temporal_tiled",
]
# Tiled decodes that the reference got wrong; see the README beside the tensors.
WRONG_TILED_DECODES = {("wfvae_ln_z16_res1_con2", 1), ("wfvae_ln_z4_8x_temporal", 0)}
TINY = WFVAEConfig(
    latent_dim=2,
    base_channels=4,
    encoder_num_resblocks=1,
    encoder_energy_flow_hidden_size=4,
    decoder_num_resblocks=1,
    decoder_energy_flow_hidden_size=4,
    norm_type="layernorm",
    t_interpolation="trilinear",
)
EIGHTFOLD = dataclasses.replace(
    TINY,
    l1_dowmsample_block=SPACE_AND_TIME[0],
    l1_downsample_wavelet=SPACE_AND_TIME[1],
    l1_upsample_block=SPACE_AND_TIME[2],
    l1_upsample_wavelet=SPACE_AND_TIME[3],
)
GROUPS = dataclasses.replace(
    TINY,
    norm_type="groupnorm",
    base_channels=32,
    encoder_energy_flow_hidden_size=32,
    decoder_energy_flow_hidden_size=32,
)


@pytest.fixture(autouse=True)
def _same_weights_each_time():
    torch.manual_seed(0)


def video(num_frames, height=16, width=24, batch=1):
    return torch.rand(batch, 3, num_frames, height, width) * 2.0 - 1.0


def assert_agree(actual, expected, tolerance=5e-5):
    """The largest difference, relative to the largest value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(params=CASES)
def golden(request, shared_dir):
    """Name, model with the published weights, and the tensors of every input."""
    folder = shared_dir / "golden"
    case = json.loads((folder / f"{request.param}.json").read_text())
    tensors = load_file(folder / f"{request.param}.safetensors")
    spec = importlib.util.spec_from_file_location("recipe", folder / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    weights = {}
    for name, shape in case["weight_keys"].items():
        stored = tensors.get(f"weights/{name}")
        weights[name] = recipe.recipe_tensor(name, shape, case["weights"]["seed"]) if stored is None else stored.float()
    model = WFVAEModel.from_config(case["config"]).eval()
    model.load_state_dict(weights, strict=True)
    inputs = [
        {key.split("/")[1]: value.float() for key, value in tensors.items() if key.startswith(f"in{index}/")}
        for index in range(len(case["inputs"]))
    ]
    return request.param, model, inputs


@torch.no_grad()
def test_golden_outputs_agree(golden):
    _, model, inputs = golden
    for expected in inputs:
        posterior, encoder_coefficients = model.encode(expected["input"])
        assert_agree(posterior.parameters, expected["moments"])
        assert_agree(posterior.mean, expected["mean"])
        assert_agree(posterior.logvar, expected["logvar"])
        recon, decoder_coefficients = model.decode(expected["mean"])
        assert_agree(recon, expected["decode_of_mean"])
        if "enc_coeffs_l1" in expected:
            assert_agree(encoder_coefficients[0], expected["enc_coeffs_l1"])
            assert_agree(encoder_coefficients[1], expected["enc_coeffs_l2"])
            assert_agree(decoder_coefficients[0], expected["dec_coeffs_0"])
            assert_agree(decoder_coefficients[1], expected["dec_coeffs_1"])


@torch.no_grad()
def test_golden_outputs_agree_when_tiled(golden):
    name, model, inputs = golden
    if model.config.norm_type == "groupnorm":
        with pytest.raises(ConfigError, match="groupnorm"):
            model.enable_tiling()
        return
    model.enable_tiling()
    for index, expected in enumerate(inputs):
        posterior, coefficients = model.encode(expected["input"])
        assert coefficients is None
        assert_agree(posterior.parameters, expected["moments"])
        assert_agree(posterior.parameters, expected["tiled_moments"])
        recon, coefficients = model.decode(expected["mean"])
        assert coefficients is None
        assert_agree(recon, expected["decode_of_mean"])
        if "tiled_decode_of_mean" in expected and (name, index) not in WRONG_TILED_DECODES:
            assert_agree(recon, expected["tiled_decode_of_mean"])


@pytest.mark.parametrize(
    "name", ["osp_on_wfvae-large-16chn", "osp_wfvae_4dim", "wf_on_osp_wfvae_4dim", "wf_wfvae-large-16chn"]
)
def test_released_models_have_the_same_names_and_shapes(name, shared_dir):
    published = json.loads((shared_dir / "golden" / "keys" / f"{name}.json").read_text())
    with torch.device("meta"):
        model = WFVAEModel.from_config(published["config"])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published["state_dict"]


@pytest.mark.parametrize("config", [TINY, EIGHTFOLD], ids=["4x", "8x"])
@pytest.mark.parametrize("t_interpolation", ["nearest", "trilinear"])
@torch.no_grad()
def test_tiled_equals_whole(config, t_interpolation):
    model = WFVAEModel(dataclasses.replace(config, t_interpolation=t_interpolation)).eval()
    for num_latent_frames in (1, 2, 3, 4, 5, 6, 7, 9, 12):
        x = video(1 + (num_latent_frames - 1) * model.temporal_factor, 8, 16)
        model.disable_tiling()
        moments = model.encode(x).latent_dist.parameters
        z = torch.randn(1, 2, num_latent_frames, 1, 2)
        recon = model.decode(z).sample
        assert recon.shape == x.shape
        model.enable_tiling()
        assert_agree(model.encode(x).latent_dist.parameters, moments, 1e-5)
        assert_agree(model.decode(z).sample, recon, 1e-5)


@torch.no_grad()
def test_tiled_pass_that_fails_leaves_nothing_behind():
    model = WFVAEModel(TINY).eval()
    z = torch.randn(1, 2, 8, 2, 3)
    recon = model.decode(z).sample
    model.enable_tiling()
    chunks = []

    def fail_at_the_second_chunk(module, args, output):
        chunks.append(args[0].shape[2])
        if len(chunks) == 2:
            raise RuntimeError("out of memory")

    handle = model.decoder.conv_out.register_forward_hook(fail_at_the_second_chunk)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.decode(z)
    handle.remove()
    assert_agree(model.decode(z).sample, recon, 1e-5)
    model.disable_tiling()
    assert torch.equal(model.decode(z).sample, recon)


@torch.no_grad()
def test_tiling_never_gives_the_decoder_more_than_its_share():
    model = WFVAEModel(TINY)
    model.enable_tiling()
    seen = []
    model.decoder.conv_in.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[2]))
    model.decode(torch.randn(1, 2, 8, 1, 1))
    assert seen == [1 + TILE_LATENT_FRAMES, 2, 2, 1]


@pytest.mark.parametrize("config", [TINY, EIGHTFOLD], ids=["4x", "8x"])
@torch.no_grad()
def test_latent_frame_ignores_frames_after_its_own_group(config):
    model = WFVAEModel(config).eval()
    x = video(1 + 3 * model.temporal_factor)
    later = x.clone()
    later[:, :, 1 + model.temporal_factor :] *= -0.5
    first, second = (model.encode(clip).latent_dist.mean for clip in (x, later))
    assert_agree(first[:, :, :2], second[:, :, :2], 1e-5)
    assert (first[:, :, 2] - second[:, :, 2]).abs().max() > 1e-3


@torch.no_grad()
def test_image_is_encoded_as_the_first_frame_of_its_video():
    model = WFVAEModel(TINY).eval()
    x = video(9)
    image = model.encode(x[:, :, :1]).latent_dist.mean
    assert_agree(image, model.encode(x).latent_dist.mean[:, :, :1], 1e-5)


@pytest.mark.parametrize("config", [TINY, EIGHTFOLD, GROUPS], ids=["4x", "8x", "groups"])
def test_haar_kernels_stay_frozen_through_training(config):
    model = WFVAEModel(config)
    kernels = {name: value.clone() for name, value in model.named_buffers()}
    assert "encoder.wavelet_transform_in.h_conv.conv.weight" in kernels
    assert "decoder.inverse_wavelet_transform_out.gh_v" in kernels
    model.requires_grad_(False)
    model.requires_grad_(True)
    assert not any("wavelet" in name for name, _ in model.named_parameters())
    model(video(9)).recon.abs().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for name, value in model.named_buffers():
        assert not value.requires_grad
        assert value.grad is None
        assert torch.equal(value, kernels[name])


def test_same_seed_gives_the_same_weights():
    first, second = (WFVAEModel(TINY) for _ in range(2) if torch.manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_output_names_what_the_losses_need():
    model = WFVAEModel(TINY)
    x = video(9, batch=2)
    output = model(x, sample_posterior=False)
    assert output.recon.shape == x.shape
    assert output.recon.is_contiguous()
    assert output.posterior.mean.shape == (2, 2, 3, 2, 3)
    for ours, theirs in zip(output.encoder_coefficients, output.decoder_coefficients, strict=True):
        assert ours.shape == theirs.shape
    (gradient,) = torch.autograd.grad(output.recon.sum(), model.last_layer)
    assert gradient.shape == model.decoder.conv_out.weight.shape


def test_forward_samples_only_when_asked():
    model, x = WFVAEModel(TINY), video(5)
    modes = [model(x, sample_posterior=False).recon for _ in range(2)]
    samples = [model(x, generator=torch.Generator().manual_seed(seed)).recon for seed in (1, 1, 2)]
    assert torch.equal(modes[0], modes[1])
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert not torch.equal(samples[0], modes[0])


def test_input_is_left_as_it_was():
    model, x, z = WFVAEModel(TINY), video(5), torch.randn(1, 2, 2, 2, 3)
    x_before, z_before = x.clone(), z.clone()
    model.encode(x)
    model.decode(z)
    assert torch.equal(x, x_before)
    assert torch.equal(z, z_before)


def test_gradients_through_the_decoder_are_exact():
    model = WFVAEModel(dataclasses.replace(TINY, base_channels=2)).double()
    z = torch.randn(1, 2, 2, 1, 1, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: model.decode(z).sample.square().mean(), z)


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("config", [TINY, EIGHTFOLD], ids=["4x", "8x"])
def test_ddp_finds_every_output_and_copies_no_gradient(one_rank, config):
    model = WFVAEModel(config)
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # DDP warns once of gradients whose strides are not those of the weights
        for _ in range(2):
            output = replica(video(9))
            (output.recon.mean() + output.posterior.kl().mean()).backward()
    found = {id(tensor) for tensor in _find_tensors(output)}
    coefficients = (*output.encoder_coefficients, *output.decoder_coefficients)
    assert found == {id(tensor) for tensor in (output.recon, output.posterior.parameters, *coefficients)}
    assert all(parameter.grad.stride() == parameter.stride() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 5, 8, 8), r"shape \(1, 1, 5, 8, 8\); this model encodes \(b, 3, t, h, w\)"),
        ((1, 3, 0, 8, 8), r"shape \(1, 3, 0, 8, 8\)"),
        ((1, 3, 6, 8, 8), "6 frames; this model takes 1 [+] a multiple of 4"),
        ((1, 3, 5, 12, 8), "frames of 12 x 8 pixels; .* divisible by 8"),
        ((1, 3, 5, 8, 20), "frames of 8 x 20 pixels; .* divisible by 8"),
    ],
)
def test_video_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(ConfigError, match=message):
        WFVAEModel(TINY).encode(torch.zeros(shape))


def test_eightfold_model_takes_other_frame_counts():
    with pytest.raises(ConfigError, match=r"5 frames; this model takes 1 \+ a multiple of 8"):
        WFVAEModel(EIGHTFOLD).encode(video(5))


def test_latents_of_another_model_are_refused():
    with pytest.raises(ConfigError, match=r"shape \(1, 3, 2, 1, 1\); this model decodes \(b, 2, t, h, w\)"):
        WFVAEModel(TINY).decode(torch.zeros(1, 3, 2, 1, 1))


def test_group_norm_cannot_be_tiled_and_says_why():
    model = WFVAEModel(GROUPS)
    with pytest.raises(ConfigError, match="statistics over all frames"):
        model.enable_tiling()
    model.enable_tiling(False)
    assert not model.use_tiling
