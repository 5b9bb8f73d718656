"""A checkpoint that is one file: the same model as the folder that it was made of, and one line for what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsd import Matcher
from dsd.errors import CheckpointError
from dsd.models import load, load_diffusion, single_file
from tests.test_backbones import description
from tests.test_released import SD21
from tests.tiny import row

CPU = torch.device("cpu")
TEXTS = ["a red circle", "a green ring left of a pink bolt"]
Tensors = dict[str, Tensor]

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def renamed(name: str, names: Mapping[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def original_unet(tensors: Tensors, depth: int = 1) -> Tensors:
    """The names of the original implementation: blocks are numbered through, `depth` residual layers at each level."""

    def name(key: str) -> str:
        if found := re.match(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key
        ):
            side, block, kind, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            if kind == "downsamplers":
                return f"input_blocks.{(block + 1) * (depth + 1)}.0.{rest.replace('conv', 'op')}"
            if kind == "upsamplers":
                second = any(other.startswith(f"up_blocks.{block}.attentions") for other in tensors)
                return f"output_blocks.{block * (depth + 1) + depth}.{2 if second else 1}.{rest}"
            place = f"input_blocks.{1 + block * (depth + 1) + number}"
            place = place if side == "down" else f"output_blocks.{block * (depth + 1) + number}"
            return f"{place}.1.{rest}" if kind == "attentions" else f"{place}.0.{renamed(rest, RESNET)}"
        if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
            if found[1] == "attentions":
                return f"middle_block.1.{found[3]}"
            return f"middle_block.{2 * int(found[2])}.{renamed(found[3], RESNET)}"
        return renamed(key, ENDS)

    return {f"model.diffusion_model.{name(key)}": tensor for key, tensor in tensors.items()}


def original_vae(tensors: Tensors) -> Tensors:
    levels = 1 + max(int(found[1]) for key in tensors if (found := re.match(r"decoder\.up_blocks\.(\d+)", key)))
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    made = {}
    for key, tensor in tensors.items():
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", key)
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"(down|up)samplers\.0", r"\1sample", name.replace("resnets", "block"))
        name = renamed(name, {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"})
        if "mid_block.attentions.0" in name:
            name = renamed(name.replace("mid_block.attentions.0", "mid.attn_1"), attention)
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor  # a convolution, there
        made[f"first_stage_model.{name}"] = tensor.contiguous()
    return made


def bare(tensors: Tensors) -> Tensors:
    return {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}


def in_transformers(tensors: Tensors, prefix: str) -> Tensors:
    """As 1.x and the first encoder of XL are published, positions included."""
    made = {f"{prefix}.transformer.text_model.{key}": tensor for key, tensor in bare(tensors).items()}
    return made | {f"{prefix}.transformer.text_model.embeddings.position_ids": torch.arange(24)[None]}


def in_open_clip(tensors: Tensors, prefix: str, unused: int) -> Tensors:
    """As 2.x and the second encoder of XL are published: projections in one matrix, and `unused` layers on top."""
    tensors, made = bare(tensors), {}
    width = tensors["final_layer_norm.weight"].shape[0]
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    layers = sorted({int(key.split(".")[2]) for key in tensors if key.startswith("encoder.layers.")})
    for key, tensor in tensors.items():
        if key in names:
            made[names[key]] = tensor
        elif found := re.match(r"encoder\.layers\.(\d+)\.(?!self_attn\.[qkv]_proj)(.*)", key):
            rest = renamed(found[2], {**OPEN_CLIP, "self_attn": "attn"})
            made[f"transformer.resblocks.{found[1]}.{rest}"] = tensor
    for layer in layers:
        for side in ("weight", "bias"):
            parts = [tensors[f"encoder.layers.{layer}.self_attn.{part}_proj.{side}"] for part in "qkv"]
            made[f"transformer.resblocks.{layer}.attn.in_proj_{side}"] = torch.cat(parts)
    for extra in range(unused):
        top = len(layers) + extra
        below = {key: made[key] for key in made if key.startswith(f"transformer.resblocks.{layers[-1]}.")}
        made |= {key.replace(f".{layers[-1]}.", f".{top}.", 1): 2 * tensor for key, tensor in below.items()}
    projection = tensors.get("text_projection.weight", torch.zeros(width, width))
    made |= {"text_projection": projection.T.contiguous(), "logit_scale": torch.tensor(4.6)}
    return {f"{prefix}.model.{key}": tensor for key, tensor in made.items()}


def test_the_names_are_those_of_the_published_files() -> None:
    """Of Stable Diffusion 2: where its file has attention, down- and upsampling, and back to diffusers' names."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD21)
    there = original_unet(unet.state_dict(), depth=2)
    names = {key.removeprefix("model.diffusion_model.") for key in there}

    def blocks(pattern: str) -> list[int]:
        return sorted({int(found[1]) for name in names if (found := re.match(pattern, name))})

    assert blocks(r"input_blocks\.(\d+)\.1\.transformer_blocks\.0\.attn2\.to_k\.weight") == [1, 2, 4, 5, 7, 8]
    assert blocks(r"output_blocks\.(\d+)\.1\.transformer_blocks\.0\.attn2\.to_k\.weight") == list(range(3, 12))
    assert blocks(r"input_blocks\.(\d+)\.0\.op\.weight") == [3, 6, 9]
    assert blocks(r"output_blocks\.(\d+)\.1\.conv\.weight") == [2]
    assert blocks(r"output_blocks\.(\d+)\.2\.conv\.weight") == [5, 8]
    assert {"time_embed.2.bias", "middle_block.2.out_layers.3.weight", "input_blocks.0.0.weight", "out.2.bias"} <= names
    assert len(names) == len(unet.state_dict()) == 686
    back = convert_ldm_unet_checkpoint(there, unet.config)
    assert {key: t.shape for key, t in back.items()} == {key: t.shape for key, t in unet.state_dict().items()}


def weights(folder: Path, name: str) -> Tensors:
    return load_file(next((folder / name).glob("*.safetensors")))


def original(folder: Path, texts: Tensors) -> Tensors:
    schedule = {"alphas_cumprod": torch.zeros(1000), "model_ema.decay": torch.tensor(0.9999)}
    return original_unet(weights(folder, "unet")) | original_vae(weights(folder, "vae")) | texts | schedule


@pytest.fixture
def settings(models: Path, tmp_path: Path) -> Path:
    """The folder of configs, tokenizer and scheduler, without any weights."""
    folder = Path(shutil.copytree(models / "embedded", tmp_path / "settings"))
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


@pytest.fixture
def tensors(models: Path) -> Tensors:
    folder = models / "embedded"
    return original(folder, in_transformers(weights(folder, "text_encoder"), "cond_stage_model"))


def same_scores(folder: Path, file: Path, config: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    for method in ("cross-attention", "denoising"):
        expected = Matcher.from_pretrained(folder, method=method, levels=(0.3, 0.8)).score(image, TEXTS)
        one = Matcher.from_pretrained(file, method=method, config=config, levels=(0.3, 0.8))
        assert torch.allclose(one.score(image, TEXTS), expected, atol=1e-6) and expected.std() > 0


def test_a_file_in_the_layout_of_1x_scores_as_its_folder(
    models: Path, settings: Path, tensors: Tensors, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "one.safetensors")
    same_scores(models / "embedded", tmp_path / "one.safetensors", settings)


def test_a_file_in_the_layout_of_2x_scores_as_its_folder(models: Path, settings: Path, tmp_path: Path) -> None:
    texts = in_open_clip(weights(models / "embedded", "text_encoder"), "cond_stage_model", unused=1)
    save_file(original(models / "embedded", texts), tmp_path / "two.safetensors")
    same_scores(models / "embedded", tmp_path / "two.safetensors", settings)


def test_a_file_in_the_layout_of_xl_scores_as_its_folder(xl: Path, tmp_path: Path) -> None:
    texts = in_transformers(weights(xl, "text_encoder"), "conditioner.embedders.0")
    texts |= in_open_clip(weights(xl, "text_encoder_2"), "conditioner.embedders.1", unused=0)
    save_file(original(xl, texts), tmp_path / "xl.safetensors")
    same_scores(xl, tmp_path / "xl.safetensors", xl)


def test_weights_and_settings_are_its_identity(settings: Path, tensors: Tensors, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_file({key: tensor.half() for key, tensor in tensors.items()}, file)  # as most are published
    opened = load_diffusion(row(file, config=str(settings)), CPU)
    assert opened.unet.dtype == torch.float32
    copy = Path(shutil.copytree(settings, tmp_path / "copy"))
    assert load_diffusion(row(file, config=str(copy)), CPU).digest == opened.digest
    schedule = copy / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"beta_end": 0.02}))
    assert load_diffusion(row(file, config=str(copy)), CPU).digest != opened.digest
    save_file({key: tensor * 1.01 for key, tensor in tensors.items()}, file)
    assert load_diffusion(row(file, config=str(settings)), CPU).digest != opened.digest


@pytest.mark.parametrize("layout", ["1.x", "xl"])
def test_a_lazy_file_is_described_without_weights_and_opened_as_a_whole_once(
    layout: str, models: Path, xl: Path, settings: Path, tensors: Tensors, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file, config, folder, family = tmp_path / "one.safetensors", settings, models / "embedded", "stable-diffusion"
    if layout == "xl":
        texts = in_transformers(weights(xl, "text_encoder"), "conditioner.embedders.0")
        texts |= in_open_clip(weights(xl, "text_encoder_2"), "conditioner.embedders.1", unused=0)
        tensors, config, folder, family = original(xl, texts), xl, xl, "stable-diffusion-xl"
    save_file(tensors, file)
    reads: list[Path] = []
    monkeypatch.setattr(single_file, "read_tensors", lambda path: (reads.append(path), load_file(path))[1])
    expected = load_diffusion(row(folder, family), CPU)
    lazy = load_diffusion(row(file, family, config=str(config)), CPU, lazy=True)
    assert description(lazy) == description(expected) and reads == []
    lazy.open()
    assert description(lazy) == description(expected) and reads == [file]
    assert all(torch.equal(weight, lazy.unet.state_dict()[key]) for key, weight in expected.unet.state_dict().items())
    alone = load_diffusion(row(file, family, config=str(config)), CPU, lazy=True)
    assert torch.equal(alone.encode_texts(TEXTS).hidden, expected.encode_texts(TEXTS).hidden)
    assert not {"unet", "vae"} & vars(alone).keys()


def refused(file: Path, config: Path | None, **changes: object) -> str:
    with pytest.raises(CheckpointError) as error:
        load(row(file, config=None if config is None else str(config), **changes), CPU)
    assert "\n" not in str(error.value) and str(file) in str(error.value)
    return str(error.value)


def test_what_does_not_fill_the_model_is_named(settings: Path, tensors: Tensors, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    first = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != first}, file)
    assert re.search(r": 1 of \d+ tensors of unet missing, .* the first is conv_in\.weight", refused(file, settings))
    save_file({**tensors, first: torch.zeros(8, 4, 3, 3)}, file)
    assert "of unet missing, or misshapen for" in refused(file, settings)
    for start, name in (("first_stage_model", "vae"), ("cond_stage_model", "text_encoder")):
        save_file({key: tensor for key, tensor in tensors.items() if not key.startswith(start)}, file)
        assert f"tensors of {name} missing" in refused(file, settings)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("unet", "model.diffusion_model.middle_block.1.transformer_blocks.1.attn1.to_q.weight"),
        ("text_encoder", "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias"),
        ("vae", "first_stage_model.encoder.down.4.block.0.conv1.weight"),
    ],
)
def test_layers_that_the_settings_lack_are_refused(
    name: str, key: str, settings: Path, tensors: Tensors, tmp_path: Path
) -> None:
    file = tmp_path / "one.safetensors"
    save_file({**tensors, key: torch.zeros(1)}, file)
    message = refused(file, settings)
    assert name in message and "tensors" in message and "not in the model" in message


def test_weights_are_stored_in_floating_point(settings: Path, tensors: Tensors, tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({**tensors, key: tensors[key].to(torch.int8)}, tmp_path / "one.safetensors")
    assert "unet: conv_in.weight is stored as int8" in refused(tmp_path / "one.safetensors", settings)


def test_nothing_is_logged(settings: Path, tensors: Tensors, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_file(tensors, tmp_path / "one.safetensors")
    load(row(tmp_path / "one.safetensors", config=str(settings)), CPU)
    assert capfd.readouterr().err == ""


def test_a_file_that_is_no_checkpoint_is_one_line(
    models: Path, settings: Path, tensors: Tensors, tmp_path: Path
) -> None:
    file = tmp_path / "one.safetensors"
    assert "no such file" in refused(file, settings)
    file.write_bytes(b"no tensors")
    assert "not a file in safetensors" in refused(file, settings)
    save_file(tensors, file)
    assert "one file needs config: a folder or hub id" in refused(file, None)
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint folder"):
        load(row(file, config=str(tmp_path / "nowhere")), CPU)
    (settings / "unet" / "config.json").unlink()
    assert "unet does not load as UNet2DConditionModel with the config in" in refused(file, settings)
    assert "config is for one file .safetensors" in refused(models / "embedded", settings)


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "bin"])
def test_a_pickle_is_never_opened(suffix: str, settings: Path, tmp_path: Path) -> None:
    file = tmp_path / f"model.{suffix}"
    torch.save({"state_dict": {}}, file)
    assert "a pickle, which is never opened; convert it to .safetensors" in refused(file, settings)


def test_the_family_is_that_of_its_settings(xl: Path, settings: Path, tensors: Tensors, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="of family stable-diffusion, and not stable-diffusion-xl"):
        load(row(file, "stable-diffusion-xl", config=str(settings)), CPU)
    assert "does not load as UNet2DConditionModel with the config in" in refused(file, xl, family="stable-diffusion-xl")
    with pytest.raises(CheckpointError, match="family clip takes no config"):
        load(row(file, "clip", config=str(settings)), CPU)
    with pytest.raises(CheckpointError, match="a file, but family clip is opened by its folder"):
        load(row(file, "clip"), CPU)
