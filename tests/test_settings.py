"""Settings, tokenizers and weights of a checkpoint that would give wrong scores are refused, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel

from dsd.errors import CheckpointError
from dsd.models import load, load_clip
from dsd.models.checkpoint import locate, tokenizer
from dsd.models.clip import normalisation
from dsd.models.noise_process import noise_schedule
from dsd.models.settings import check_settings, read_settings
from tests.tiny import row

CPU = torch.device("cpu")
COLOURS = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "embedded", tmp_path / "checkpoint"))


@pytest.fixture
def clip(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "embedded-clip", tmp_path / "clip"))


def edit(file: Path, section: str | None = None, **changes: object) -> None:
    content = json.loads(file.read_text())
    (content[section] if section else content).update(changes)
    file.write_text(json.dumps(content))


def refused(attempt: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as error:
        attempt()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN is no finite number"),
        (b'{"a": -Infinity}', "-Infinity is no finite number"),
        (b'{"a": 1e999}', "1e999 is no finite number"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "has more than 64 bits"),
        (b'{"a": 9223372036854775808}', "has more than 64 bits"),
        ("{}".encode("utf-16"), "can't decode byte"),
        (b"[]", "not an object but list"),
        (b"", "Expecting value"),
        (None, "Is a directory"),
    ],
)
def test_what_is_no_settings(content: bytes | None, line: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.mkdir() if content is None else file.write_bytes(content)
    message = refused(lambda: read_settings(file))
    assert message.startswith(f"{file}: does not load: ") and line in message


@pytest.mark.parametrize(
    ("kind", "settings", "line"),
    [
        (UNet2DConditionModel, {"_class_name": "UNet3DConditionModel"}, "only UNet2DConditionModel is supported"),
        (UNet2DConditionModel, {"_class_name": ["UNet2DConditionModel"]}, "only UNet2DConditionModel is supported"),
        (UNet2DConditionModel, {"flip_sin_to_cos": "false"}, "flip_sin_to_cos 'false': must be true or false"),
        (UNet2DConditionModel, {"only_cross_attention": [True, 0]}, "only_cross_attention [True, 0]: must be true"),
        (UNet2DConditionModel, {"norm_eps": "1e-5"}, "norm_eps '1e-5': must be a number"),
        (UNet2DConditionModel, {"attention_head_dim": [5, True]}, "attention_head_dim [5, True]: must be a number"),
        (AutoencoderKL, {"_class_name": "AutoencoderTiny"}, "only AutoencoderKL is supported"),
        (AutoencoderKL, {"scaling_factor": True}, "scaling_factor True: must be a number"),
        (AutoencoderKL, {"use_quant_conv": 0}, "use_quant_conv 0: must be true or false"),
        (CLIPTextModel, {"model_type": "t5"}, "model_type 't5': only clip_text_model is supported"),
        (CLIPModel, {"model_type": "siglip"}, "model_type 'siglip': only clip is supported"),
        (CLIPTextModel, {"use_attention_mask": True}, "use_attention_mask: must be false"),
    ],
)
def test_settings_of_another_class_or_type(kind: Any, settings: dict[str, Any], line: str) -> None:
    message = refused(lambda: check_settings(settings, kind, "config.json"))
    assert message.startswith("config.json: ") and line in message


def test_settings_as_they_are_published() -> None:
    published = {
        "upcast_attention": None,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
    }
    check_settings({"_class_name": "UNet2DConditionModel", **published}, UNet2DConditionModel, "config.json")
    for name in ("clip_text_model", "clip"):
        check_settings({"model_type": name}, CLIPTextModel, "config.json")


@pytest.mark.parametrize(
    ("component", "change"),
    [
        ("unet", {"flip_sin_to_cos": "false"}),
        ("vae", {"use_quant_conv": "false"}),
        ("text_encoder", {"model_type": "t5"}),
    ],
)
def test_settings_are_checked_before_weights_are_read(component: str, change: dict[str, Any], folder: Path) -> None:
    edit(folder / component / "config.json", **change)
    next((folder / component).glob("*.safetensors")).write_bytes(b"no tensors")
    assert f"{component}/config.json: {next(iter(change))}" in refused(lambda: load(row(folder), CPU))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"shift_factor": "0.1"}, "shift_factor '0.1': must be a number"),
        ({"shift_factor": [0.1] * 4}, "must be a number"),
        ({"latents_mean": 0.1, "latents_std": 1.0}, "latents_mean and latents_std: must be 4 numbers"),
        ({"latents_mean": ["a"] * 4, "latents_std": [1.0] * 4}, "latents_mean and latents_std: must be 4 numbers"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "must be above 0"),
    ],
)
def test_statistics_of_latents_are_numbers(change: dict[str, Any], line: str, folder: Path) -> None:
    edit(folder / "vae/config.json", **change)
    backbone: Any = load(row(folder), CPU, lazy=True)
    assert line in refused(lambda: backbone._latent_statistics)


@pytest.mark.parametrize(
    "change",
    [
        {"beta_start": 0.9, "beta_end": 0.9},
        {"num_train_timesteps": 1, "rescale_betas_zero_snr": True},
        {"trained_betas": [0.5] * 1000},
    ],
)
def test_noise_that_leaves_no_signal(change: dict[str, Any], folder: Path) -> None:
    edit(folder / "scheduler/scheduler_config.json", **change)
    assert "no signal is left before the last timestep" in refused(lambda: noise_schedule(folder))


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_texts_start_in_the_first_position_whatever_the_tokenizer_states(side: str, folder: Path) -> None:
    before = tokenizer(folder, "tokenizer")
    edit(folder / "tokenizer/tokenizer_config.json", **{side: "left"})
    options: dict[str, Any] = dict(padding="max_length", max_length=6, truncation=True)
    texts = ["a red circle", "a red circle left of a blue star"]
    assert tokenizer(folder, "tokenizer")(texts, **options).input_ids == before(texts, **options).input_ids


@pytest.mark.parametrize("length", ["24", 0, 1, 2, -1, 4.5, True])
def test_a_tokenizer_leaves_room_for_a_token(length: object, folder: Path) -> None:
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=length)
    assert f"model_max_length {length!r}: must be a whole" in refused(lambda: tokenizer(folder, "tokenizer"))


@pytest.mark.parametrize("kind", ["T5Tokenizer", "BertTokenizer", "PreTrainedTokenizerFast", 1])
def test_a_tokenizer_of_another_class(kind: object, folder: Path) -> None:
    edit(folder / "tokenizer/tokenizer_config.json", tokenizer_class=kind)
    line = f"{folder}/tokenizer/tokenizer_config.json: tokenizer_class {kind!r}: only CLIPTokenizer is supported"
    assert refused(lambda: tokenizer(folder, "tokenizer")) == line


def test_a_tokenizer_of_another_kind_that_does_not_name_its_class(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece

    words = WordPiece({"[UNK]": 0, "red": 1, "circle": 2}, unk_token="[UNK]")
    Tokenizer(words).save(str(folder / "tokenizer/tokenizer.json"))
    edit(folder / "tokenizer/tokenizer_config.json", tokenizer_class=None)
    line = f"{folder}/tokenizer/tokenizer.json: model.type 'WordPiece': that of a CLIP is BPE"
    assert refused(lambda: tokenizer(folder, "tokenizer")) == line


def test_the_noise_is_also_that_of_the_list_of_components(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    noise_schedule(folder)  # one noise process, whatever the sampler
    edit(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    message = refused(lambda: noise_schedule(folder))
    assert (
        "scheduler 'FlowMatchEulerDiscreteScheduler', but scheduler/scheduler_config.json has 'DDPMScheduler'"
        in message
    )


def test_links_without_an_end_are_no_weights(folder: Path) -> None:
    (folder / "unet/other.safetensors").symlink_to("other.safetensors")
    (folder / "unet/another.safetensors").symlink_to("nowhere")
    load(row(folder), CPU)


def test_a_tokenizer_can_pad(folder: Path) -> None:
    edit(folder / "tokenizer/tokenizer_config.json", pad_token=None)
    assert refused(lambda: tokenizer(folder, "tokenizer")) == f"{folder}/tokenizer: tokenizer has no pad_token"


@pytest.mark.parametrize("end", [5, -1, None, [656], True, "absent"])
def test_a_clip_pools_texts_at_the_end_token(end: object, clip: Path) -> None:
    edit(clip / "config.json", "text_config", eos_token_id=end)
    if end == "absent":
        content = json.loads((clip / "config.json").read_text())
        del content["text_config"]["eos_token_id"]
        (clip / "config.json").write_text(json.dumps(content))
    message = refused(lambda: load_clip(row(clip, "clip"), CPU, lazy=True).tokenizer)
    assert message.startswith(f"{clip}/config.json: ") and "eos_token_id" in message


def test_an_older_clip_states_another_end_token_and_pools_at_the_highest(clip: Path, models: Path) -> None:
    edit(clip / "config.json", "text_config", eos_token_id=2)
    texts = ["a red circle", "a blue star left of a ring"]
    old, new = (load_clip(row(source, "clip"), CPU) for source in (clip, models / "embedded-clip"))
    assert torch.equal(old.text_features(texts), new.text_features(texts))


def test_a_token_beyond_the_vocabulary_of_a_clip(clip: Path) -> None:
    content = json.loads((clip / "tokenizer/tokenizer.json").read_text())
    content["model"]["vocab"]["zork"] = 9999
    (clip / "tokenizer/tokenizer.json").write_text(json.dumps(content))
    message = refused(lambda: load_clip(row(clip, "clip"), CPU, lazy=True).tokenizer)
    assert message.startswith(f"{clip}/tokenizer: has the token 9999, but text_config has")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"do_normalize": False}, "do_normalize"),
        ({"do_rescale": False}, "do_rescale"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"image_mean": [122.7, 116.6, 104.0]}, "image_mean.0"),
        ({"image_mean": [True, False, True]}, "image_mean.0"),
        ({"image_mean": [0.5, 0.5]}, "image_mean.2"),
        ({"image_mean": ["0.5", "0.5", "0.5"]}, "image_mean.0"),
        ({"image_std": [0.5]}, "image_std.1"),
        ({"image_std": 0.5}, "image_std"),
        ({"image_std": [[1, 1, 1]] * 3}, "image_std.0"),
        ({"image_std": [1e-300, 0.2, 0.2]}, "image_std.0"),
    ],
)
def test_pixels_that_would_be_normalised_otherwise(change: dict[str, Any], key: str, tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**COLOURS, **change}))
    assert refused(lambda: normalisation(tmp_path)).startswith(f"{file}: {key}: ")
    file.rename(tmp_path / "processor_config.json")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {**COLOURS, **change}}))
    assert refused(lambda: normalisation(tmp_path)).startswith(f"{tmp_path}/processor_config.json: {key}: ")


def test_two_files_agree_on_pixels(tmp_path: Path) -> None:
    first, second = tmp_path / "preprocessor_config.json", tmp_path / "processor_config.json"
    first.write_text(json.dumps({**COLOURS, "do_normalize": True, "rescale_factor": 0.00392156862745098}))
    for content in ({"image_processor": COLOURS}, {"processor_class": "CLIPProcessor"}):
        second.write_text(json.dumps(content))
        assert normalisation(tmp_path)[0] == tuple(COLOURS["image_mean"])
    second.write_text(json.dumps({"image_processor": {**COLOURS, "image_std": [0.5] * 3}}))
    message = refused(lambda: normalisation(tmp_path))
    assert first.name in message and second.name in message and "disagree" in message


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_in_the_model(component: str, folder: Path) -> None:
    file = next((folder / component).glob("*.safetensors"))
    save_file({**load_file(file), "extra": torch.zeros(2)}, file, {"format": "pt"})
    line = f"{folder}/{component}: 1 tensors are not in the model of config.json, the first extra"
    assert refused(lambda: load(row(folder), CPU)) == line


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_are_stored_in_floating_point(dtype: torch.dtype, folder: Path) -> None:
    file = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    save_file({**tensors, "conv_in.weight": tensors["conv_in.weight"].to(dtype)}, file, {"format": "pt"})
    assert f"{file}: conv_in.weight is stored as " in refused(lambda: load(row(folder), CPU))


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
def test_a_clip_with_more_layers_than_its_config(section: str, clip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(clip / "config.json", section, num_hidden_layers=0)
    assert "tensors are not in the model of config.json" in refused(lambda: load_clip(row(clip, "clip"), CPU))
    assert capfd.readouterr().err == ""


def test_parts_of_a_whole_clip_are_left_out_of_a_text_encoder(folder: Path) -> None:
    file = next((folder / "text_encoder").glob("*.safetensors"))
    others = {name: torch.zeros(1) for name in ("logit_scale", "text_projection.weight", "vision_model.post.weight")}
    save_file({**load_file(file), **others}, file, {"format": "pt"})
    load(row(folder), CPU)


def test_only_the_files_of_a_checkpoint_are_read(folder: Path, tmp_path: Path) -> None:
    before = locate(row(folder))[1]
    (folder / "unet/deeper").mkdir()
    (folder / "unet/deeper/config.json").write_text("{}")
    assert locate(row(folder))[1] == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.md").write_text("no checkpoint")
    line = f"{tmp_path}/other: no checkpoint of family stable-diffusion: has none of its files"
    assert refused(lambda: locate(row(tmp_path / "other"))) == line


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + ".safetensors", "/" + "x" * 5000])
def test_a_name_that_is_too_long(name: str, models: Path) -> None:
    assert "no such" in refused(lambda: locate(row(Path(name))))
    lora = row(models / "embedded", lora=name)
    assert "no such LoRA file" in refused(lambda: locate(lora))
