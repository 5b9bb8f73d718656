"""What a checkpoint states is read or refused; no setting, weight or default of the process gives a wrong score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from dsd import Matcher
from dsd.errors import CheckpointError, DsdError, ImageError, ParamsError, TextError
from dsd.models import device_of, load, load_clip
from dsd.models.noise_process import declared, noise_schedule
from dsd.models.single_file import check_marks
from tests.tiny import row

CPU = torch.device("cpu")
TEXTS = ["a red circle", "a blue star"]
SCHEDULER = "scheduler/scheduler_config.json"
PLAIN = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "embedded", tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def scores(source: Path, images: list[Any], **options: Any) -> torch.Tensor:
    return Matcher.from_pretrained(source, method="denoising", levels=(0.3, 0.6), **options).score(images, TEXTS)


def scheduler(folder: Path, config: object) -> Path:
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / SCHEDULER).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "_class_name 'EDMEulerScheduler': not the discrete"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name 'FlowMatchEulerDiscreteScheduler': not"),
        ({"_class_name": None}, "_class_name None: not"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type 'continuous': must"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas True: must be False"),
        ({"beta_start": None}, "beta_start None: must be a number between 0 and 1"),
        ({"beta_end": 1.5}, "beta_end 1.5: must be a number between 0 and 1"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid': must be one of linear"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0: must be a whole number above 0"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps 10.5: must"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas: must be 1000 numbers between 0 and 1"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction' is neither"),
        ({"prediction_type": "sample", "trained_betas": [0.001] * 1000}, "prediction_type 'sample' is neither"),
        ({"_class_name": ["DDIMScheduler"]}, "_class_name ['DDIMScheduler']: not"),
        ({"rescale_betas_zero_snr": "false"}, "rescale_betas_zero_snr 'false': must be true or false"),
        ({"rescale_betas_zero_snr": 1}, "rescale_betas_zero_snr 1: must be true or false"),
        ({"beta_start": 0.02, "beta_end": 0.01}, "beta_start 0.02 is above beta_end 0.01"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps 1000000000: must be"),
    ],
)
def test_another_noise_process_is_refused(change: dict[str, object], line: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        declared(scheduler(tmp_path, {**PLAIN, **change}))
    assert str(error.value).startswith(f"{tmp_path / SCHEDULER}: {line}") and "\n" not in str(error.value)


@pytest.mark.parametrize("config", [{}, [], "x", None])
def test_a_config_that_declares_nothing_is_refused(config: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: "):
        declared(scheduler(tmp_path, config))


@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize(
    "betas",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(0.001, 0.01, 50).tolist(), "num_train_timesteps": 50},
    ],
)
def test_the_noise_is_that_of_the_declared_sampler(kind: Any, betas: dict[str, Any], tmp_path: Path) -> None:
    sampler = kind(**{"num_train_timesteps": 100, **betas})
    sampler.save_pretrained(tmp_path / "scheduler")
    assert torch.equal(noise_schedule(tmp_path).alphas_cumprod, sampler.alphas_cumprod)


def test_zero_terminal_snr_is_that_of_ddim(tmp_path: Path) -> None:
    sampler = DDIMScheduler(rescale_betas_zero_snr=True, beta_schedule="scaled_linear")
    sampler.save_pretrained(tmp_path / "scheduler")
    assert torch.equal(noise_schedule(tmp_path).alphas_cumprod, sampler.alphas_cumprod)


def marked(tmp_path: Path, keys: tuple[str, ...] = (), **metadata: str) -> Path:
    named = {f"modelspec.{name}": value for name, value in metadata.items()}
    save_file({key: torch.zeros(0) for key in ("weight", *keys)}, tmp_path / "one.safetensors", named)
    return tmp_path / "one.safetensors"


@pytest.mark.parametrize(
    ("keys", "metadata", "line"),
    [
        (("v_pred",), {}, "marked as v_prediction, but {} or the row has epsilon"),
        ((), {"prediction_type": "v"}, "marked as v_prediction, but {} or the row has epsilon"),
        (("v_pred",), {"prediction_type": "epsilon"}, "the key v_pred and modelspec.prediction_type epsilon disagree"),
        (("ztsnr",), {}, "marked ztsnr, but {} has no rescale_betas_zero_snr: true"),
        (("edm_mean", "edm_std"), {}, "the key edm_mean marks an EDM model, whose noise process is not supported"),
        ((), {"prediction_type": "flow"}, "modelspec.prediction_type 'flow': neither epsilon nor v"),
        ((), {"architecture": "stable-diffusion-xl-v1-base"}, "modelspec.architecture is stable-diffusion-xl-v1-base,"),
        ((), {"architecture": "flux-1-dev"}, "modelspec.architecture is flux-1-dev, the settings are of {}"),
    ],
)
def test_marks_of_a_file_that_disagree_with_its_settings(
    keys: tuple[str, ...], metadata: dict[str, str], line: str, tmp_path: Path
) -> None:
    file = marked(tmp_path, keys, **metadata)
    with pytest.raises(CheckpointError) as error:
        check_marks(file, tmp_path, r"stable-diffusion-v[12](-.*)?", prediction="epsilon", zero_snr=False)
    assert str(error.value).startswith(f"{file}: {line.format(tmp_path)}")


def test_marks_that_agree(tmp_path: Path) -> None:
    file = marked(tmp_path, ("v_pred", "ztsnr"), prediction_type="v", architecture="stable-diffusion-v2-768-v")
    check_marks(file, tmp_path, r"stable-diffusion-v[12](-.*)?", prediction="v_prediction", zero_snr=True)


def test_statistics_of_latents_are_those_of_the_published_pipelines(folder: Path, images: list[np.ndarray]) -> None:
    def latents() -> torch.Tensor:
        backbone = load(row(folder), CPU)
        encoded = backbone.encode_images(np.stack(images))  # type: ignore[union-attr]
        decoded = backbone.decode_images(encoded)  # type: ignore[union-attr]
        assert np.array_equal(decoded, expected) if expected is not None else decoded.any()
        decodings.append(decoded)
        return encoded

    expected, decodings = None, list[np.ndarray]()
    edit(folder / "vae/config.json", scaling_factor=1.0)
    plain, file = latents(), folder / "vae/config.json"
    expected = decodings[0]
    mean, deviation = [0.5, -1.0, 0.25, 2.0], [2.0, 0.5, 1.0, 4.0]
    edit(file, scaling_factor=0.5, latents_mean=mean, latents_std=deviation)
    mean_C, deviation_C = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, deviation))
    assert torch.allclose(latents(), (plain - mean_C) * 0.5 / deviation_C, atol=1e-5)
    edit(file, latents_mean=None, latents_std=None, shift_factor=0.25)
    assert torch.allclose(latents(), (plain - 0.25) * 0.5, atol=1e-6)
    for change in ({"latents_mean": mean}, {"scaling_factor": 0}, {"latents_mean": [1.0], "latents_std": [1.0]}):
        edit(file, **{"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None, "latents_std": None, **change})
        with pytest.raises(CheckpointError, match=r"vae/config\.json: "):
            latents()


def test_another_autoencoder_is_refused(folder: Path) -> None:
    edit(folder / "vae/config.json", _class_name="AutoencoderTiny")
    with pytest.raises(CheckpointError, match=r"vae/config\.json: _class_name 'AutoencoderTiny': only AutoencoderKL"):
        load(row(folder), CPU)


def test_the_scale_of_latents_is_stated_or_that_of_the_first_models(folder: Path, models: Path, tmp_path: Path) -> None:
    file = folder / "vae/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "scaling_factor"}))
    assert load(row(folder), CPU).vae.config.scaling_factor == 0.18215  # type: ignore[union-attr]
    (folder / "text_encoder_2").mkdir()
    (folder / "tokenizer_2").mkdir()
    with pytest.raises(CheckpointError, match=r"no scaling_factor; that of family stable-diffusion-xl"):
        load(row(folder, "stable-diffusion-xl"), CPU)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(component: str, value: float, folder: Path) -> None:
    file = next((folder / component).glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{component}: {name} has values that are not finite"):
        load(row(folder), CPU)


def test_evidence_that_overflows_is_refused(folder: Path, images: list[np.ndarray]) -> None:
    matcher = Matcher.from_pretrained(folder, method="denoising", levels=(0.3,))
    with torch.no_grad():
        matcher.backbone.unet.conv_out.weight.fill_(1e38)
    with pytest.raises(CheckpointError, match="evidence in float32 is NaN or infinite; the checkpoint"):
        matcher.score(images, TEXTS)


@pytest.mark.parametrize("method", ["cross-attention", "denoising"])
def test_defaults_of_the_process_change_no_score(method: str, folder: Path, images: list[np.ndarray]) -> None:
    expected = Matcher.from_pretrained(folder, method=method, levels=(0.3,)).score(images, TEXTS)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found = Matcher.from_pretrained(folder, method=method, levels=(0.3,)).score(images, TEXTS)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(found.float(), expected)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "", "cpu:0", "xpu"])
def test_a_name_that_is_no_device(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"must be auto, cpu, cuda, cuda:N or mps"):
        device_of(name)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of("cuda:0") == torch.device("cuda:0")
    with pytest.raises(CheckpointError, match="device cuda:1: torch has 1 CUDA device; use auto or cpu"):
        device_of("cuda:1")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep': must be None"),
        ({"num_class_embeds": 10}, "num_class_embeds 10: must be None"),
        (
            {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
            "addition_embed_type 'text': must be None",
        ),
        ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 32}, "encoder_hid_dim_type 'image_proj': must be"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim 8: must be None"),
        ({"only_cross_attention": True}, "only_cross_attention True: must be false"),
        ({"only_cross_attention": [False, True]}, "only_cross_attention [False, True]: must be false"),
        ({"dual_cross_attention": True}, "dual_cross_attention True: must be false"),
        (
            {"down_block_types": ["CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"]},
            "down_block_types has 'SimpleCrossAttnDownBlock2D': must be of CrossAttnDownBlock2D, DownBlock2D",
        ),
        (
            {"up_block_types": ["KCrossAttnUpBlock2D", "CrossAttnUpBlock2D"]},
            "up_block_types has 'KCrossAttnUpBlock2D': must be of",
        ),
        (
            {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
            "mid_block_type has 'UNetMidBlock2DSimpleCrossAttn': must be of",
        ),
        (
            {
                "down_block_types": ["DownBlock2D"] * 2,
                "mid_block_type": "UNetMidBlock2D",
                "up_block_types": ["UpBlock2D"] * 2,
            },
            "no block has cross-attention, so the text would not matter",
        ),
        ({"sample_size": None}, "sample_size None: must be n or [n, n]"),
        ({"sample_size": [8, 16]}, "sample_size [8, 16]: must be n or [n, n]"),
    ],
)
def test_a_unet_that_needs_more_than_latent_time_and_text(
    change: dict[str, object], line: str, folder: Path, models: Path
) -> None:
    from diffusers import UNet2DConditionModel

    config = json.loads((folder / "unet/config.json").read_text())
    UNet2DConditionModel.from_config({**config, **change}).save_pretrained(folder / "unet")
    with pytest.raises(CheckpointError) as error:
        Matcher.from_pretrained(folder)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_square_sample_size_as_a_list(folder: Path, images: list[np.ndarray]) -> None:
    expected = scores(folder, images)
    size = json.loads((folder / "unet/config.json").read_text())["sample_size"]
    edit(folder / "unet/config.json", sample_size=[size, size])
    assert torch.equal(scores(folder, images), expected)


def test_a_token_beyond_the_text_encoder(folder: Path) -> None:
    file = folder / "text_encoder/config.json"
    config = json.loads(file.read_text())
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    save_file({**tensors, name: tensors[name][:-1].clone()}, weights, {"format": "pt"})
    edit(file, vocab_size=config["vocab_size"] - 1)
    with pytest.raises(CheckpointError, match=r"tokenizer: has the token \d+, but text_encoder has \d+ tokens"):
        load(row(folder), CPU)


def test_a_variant_is_read_where_there_is_nothing_else(
    folder: Path, images: list[np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    expected, plain = scores(folder, images), load(row(folder), CPU).digest
    for component in ("unet", "vae", "text_encoder"):
        file = next((folder / component).glob("*.safetensors"))
        shutil.copy(file, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert load(row(folder), CPU).digest == plain and not caplog.messages  # the plain weights take precedence
    for component in ("unet", "vae", "text_encoder"):
        next(f for f in (folder / component).glob("*.safetensors") if ".fp16." not in f.name).unlink()
    assert torch.equal(scores(folder, images), expected)
    assert load(row(folder), CPU).digest != plain
    assert f"{folder / 'unet'}: reads the variant fp16, the only weights" in caplog.messages


def test_a_clip_of_transformers_5_is_normalised_by_its_processor(models: Path, tmp_path: Path) -> None:
    clip = Path(shutil.copytree(models / "embedded-clip", tmp_path / "clip"))
    image = np.random.default_rng(0).integers(0, 255, (1, 24, 24, 3), dtype=np.uint8)
    values = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (clip / "preprocessor_config.json").write_text(json.dumps(values))
    old = load_clip(row(clip, "clip"), CPU)
    (clip / "preprocessor_config.json").unlink()
    (clip / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    new = load_clip(row(clip, "clip"), CPU)
    assert torch.equal(new.image_features(image), old.image_features(image))
    assert len({old.digest, new.digest, load_clip(row(models / "embedded-clip", "clip"), CPU).digest}) == 3
    (clip / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match="has neither preprocessor_config"):
        load_clip(row(clip, "clip"), CPU)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"dtype": "fp16"}, "dtype: "),
        ({"prediction": "v"}, "prediction: "),
        ({"levels": (250, 500)}, "levels: "),
        ({"levels": ()}, "levels: needs at least one value"),
        ({"levels": None}, "levels: "),
        ({"scale": 100.0}, "scale: "),
        ({"scale": 0.01}, "scale: Input should be greater than or equal to 1"),
        ({"scale": "x"}, "scale: "),
        ({"draws_per_level": 0}, "draws_per_level: "),
        ({"parity": 0}, "parity: must be a whole number above 0, found 0"),
        ({"parity": 10**6}, "parity: must be at most 4096 pixels, found 1000000"),
        ({"batch_size": 0}, "batch_size: must"),
        ({"batch_size": None}, "batch_size: must"),
        ({"seed": "x"}, "seed: must be a whole number"),
        ({"seed": 2**40}, "seed: must be a whole number from 0 to 4294967295"),
        ({"device": None}, "device: must be a name"),
        ({"device": 0}, "device: must be a name"),
        ({"levels": (0.5, 0.5000001)}, "levels: levels must differ by at least 1e-06"),
        ({"scale": True}, "scale: must not be yes, no, true or false"),
        ({"method": 5}, "method: unknown method '5'"),
        ({"prompt": ""}, "prompt: must be a path"),
        ({"prompt": 5}, "prompt: must be a path"),
    ],
)
def test_a_wrong_option_is_one_line(options: dict[str, Any], line: str, models: Path) -> None:
    with pytest.raises(ParamsError) as error:
        Matcher.from_pretrained(models / "embedded", **options)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def matcher(models: Path) -> Matcher:
    return Matcher.from_pretrained(models / "embedded", method="denoising", levels=(0.3,))


def test_arrays_tensors_and_batches_are_accepted(matcher: Matcher, images: list[np.ndarray]) -> None:
    batch = np.stack(images)
    expected = matcher.score(images, TEXTS)
    tensor = torch.from_numpy(batch)
    opaque = np.concatenate([batch, np.full((*batch.shape[:3], 1), 255, np.uint8)], 3)
    sources: list[Any] = [batch, tensor, tensor.permute(0, 3, 1, 2), list(tensor), opaque, batch / 255, tuple(images)]
    for source in sources:
        assert torch.allclose(matcher.score(source, TEXTS), expected, atol=1e-6)
    assert torch.allclose(matcher.score(tensor[0].permute(2, 0, 1), TEXTS), expected[:1], atol=1e-6)
    assert matcher.score((tensor / 255).to(torch.bfloat16), TEXTS).isfinite().all()
    transparent = np.zeros((32, 32, 4), np.uint8)
    assert torch.equal(matcher.score(transparent, TEXTS), matcher.score(Image.new("RGB", (32, 32), "white"), TEXTS))


def test_nothing_to_score_has_a_shape(matcher: Matcher, images: list[np.ndarray]) -> None:
    assert matcher.score([], TEXTS).shape == (0, 2) and matcher.score(images, []).shape == (2, 0)


ODD_TENSORS = [
    torch.zeros(3, 8, 8).to_sparse(),
    torch.zeros(3, 8, 8, device="meta"),
    torch.zeros(3, 8, 8, dtype=torch.complex64),
    torch.zeros(3, 8, 3),  # channels first or last?
]


@pytest.mark.parametrize("images", [None, 5, [None], [5], [[1, 2]], {"a": 1}, {"a.png"}, object(), *ODD_TENSORS])
def test_what_is_no_image(images: Any, matcher: Matcher) -> None:
    with pytest.raises(ImageError) as error:
        matcher.score(images, TEXTS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("image", [None, 3, ["a.png", "b.png"], []])
def test_a_heat_map_is_of_one_image(image: Any, matcher: Matcher) -> None:
    with pytest.raises(ImageError) as error:
        matcher.heatmap(image, "a red circle")
    assert "\n" not in str(error.value)


def test_the_autocast_of_the_session_changes_no_score(matcher: Matcher, images: list[np.ndarray]) -> None:
    expected = matcher.score(images, TEXTS)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(matcher.score(images, TEXTS), expected)


@pytest.mark.parametrize("scores", [[[1.0]], 3, torch.tensor([[float("nan")]]), torch.zeros(2)])
def test_shares_are_of_scores(scores: Any, matcher: Matcher) -> None:
    with pytest.raises(ParamsError, match="scores: must be those of `score`"):
        matcher.shares(scores)


@pytest.mark.parametrize(
    "texts", [{"a", "b"}, None, 5, [None], ["a", 5], [["a"]], "", [" "], "\ud800", ["<|endoftext|>"], "\0"]
)
def test_what_is_no_text(texts: Any, matcher: Matcher, images: list[np.ndarray]) -> None:
    with pytest.raises(TextError) as error:
        matcher.score(images, texts)
    assert "\n" not in str(error.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(images=ANYTHING, texts=ANYTHING)
@settings(max_examples=60, deadline=None)
def test_scores_are_finite_or_refused(images: Any, texts: Any, matcher: Matcher) -> None:
    attempt: Callable[[], torch.Tensor] = lambda: matcher.score(images, texts)  # noqa: E731
    try:
        found = attempt()
    except DsdError as error:
        assert "\n" not in str(error)
    else:
        assert found.ndim == 2 and bool(found.isfinite().all())
