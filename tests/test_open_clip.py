"""CLIP in open_clip's layout: both towers against independent ones, and one line for what is wrong with a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from dsd.config import Params
from dsd.engine.session import Folders, Session
from dsd.errors import CheckpointError
from dsd.models import load, load_clip
from dsd.models.checkpoint import family_of, remote
from dsd.models.clip_heads import Projections
from dsd.models.open_clip import Model, OpenClip, Origin, Towers
from dsd.training.loop import Training, train
from tests.hubserver import COMMIT, Hub, connected, files_of
from tests.test_single_file import in_open_clip
from tests.tiny import row, save_tokenizer

CPU = torch.device("cpu")
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TEXTS = ["a red circle", "", "a blue star left of a green ring"]
MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
RN50 = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    "quick_gelu": True,
}
VIT = {**RN50, "embed_dim": 512, "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}}
LAYERS, WIDTH, JOINT = (1, 2, 1, 1), 8, 24
Tensors = dict[str, Tensor]


# What a ResNet is, by the names of its published files.


def shapes(layers: tuple[int, ...] = LAYERS, width: int = WIDTH, joint: int = JOINT, side: int = 2) -> dict[str, Any]:
    """Every tensor of `visual` and its shape."""
    found: dict[str, tuple[int, ...]] = {}

    def layer(conv: str, norm: str, out: int, inner: int, size: int) -> None:
        found[f"{conv}.weight"] = (out, inner, size, size)
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{norm}.{part}"] = (out,)
        found[f"{norm}.num_batches_tracked"] = ()

    for number, (out, inner) in enumerate([(width // 2, 3), (width // 2, width // 2), (width, width // 2)], start=1):
        layer(f"conv{number}", f"bn{number}", out, inner, 3)
    inner = width
    for stage, depth in enumerate(layers, start=1):
        narrow = width * 2 ** (stage - 1)
        for block in range(depth):
            name = f"layer{stage}.{block}"
            layer(f"{name}.conv1", f"{name}.bn1", narrow, inner, 1)
            layer(f"{name}.conv2", f"{name}.bn2", narrow, narrow, 3)
            layer(f"{name}.conv3", f"{name}.bn3", 4 * narrow, narrow, 1)
            if not block:
                layer(f"{name}.downsample.0", f"{name}.downsample.1", 4 * narrow, inner, 1)
            inner = 4 * narrow
    found["attnpool.positional_embedding"] = (side**2 + 1, inner)
    for part, out in (("q", inner), ("k", inner), ("v", inner), ("c", joint)):
        found[f"attnpool.{part}_proj.weight"], found[f"attnpool.{part}_proj.bias"] = (out, inner), (out,)
    return {f"visual.{name}": shape for name, shape in found.items()}


def drawn(generator: torch.Generator, name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    values = torch.randn(shape, generator=generator)
    if name.endswith("running_var"):
        return values.square() + 0.5
    return values * (2 / values[0].numel()) ** 0.5 if values.ndim > 1 else 1 + 0.3 * values


def resnet(t: Tensors, pixels: Tensor, layers: tuple[int, ...] = LAYERS) -> Tensor:
    """The image tower written out: normalised pixels [B, 3, P, P] to features before `c_proj`."""

    def step(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight = t[f"visual.{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, variance, scale, shift = (
            t[f"visual.{norm}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def halved(x: Tensor) -> Tensor:
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4

    x = step(pixels, "conv1", "bn1", stride=2).clamp(min=0)
    x = step(x, "conv2", "bn2").clamp(min=0)
    x = halved(step(x, "conv3", "bn3").clamp(min=0))
    for stage, depth in enumerate(layers, start=1):
        for block in range(depth):
            name, first = f"layer{stage}.{block}", block == 0
            smaller: Callable[[Tensor], Tensor] = halved if first and stage > 1 else lambda y: y
            y = step(x, f"{name}.conv1", f"{name}.bn1").clamp(min=0)
            y = smaller(step(y, f"{name}.conv2", f"{name}.bn2").clamp(min=0))
            y = step(y, f"{name}.conv3", f"{name}.bn3")
            beside = step(smaller(x), f"{name}.downsample.0", f"{name}.downsample.1") if first else x
            x = (y + beside).clamp(min=0)
    return pooled(t, x, heads=x.shape[1] // 64)


def pooled(t: Tensors, maps: Tensor, heads: int) -> Tensor:
    """softmax(QKᵀ/√d)V, head by head, of the mean of all places over itself and all places."""
    places = torch.einsum("bfhw->bhwf", maps).reshape(len(maps), -1, maps.shape[1])
    places = torch.cat([places.mean(1, keepdim=True), places], 1) + t["visual.attnpool.positional_embedding"]

    def projected(part: str) -> Tensor:
        weight, bias = (t[f"visual.attnpool.{part}_proj.{side}"] for side in ("weight", "bias"))
        return (torch.einsum("blf,gf->blg", places, weight) + bias).reshape(*places.shape[:2], heads, -1)

    query, key, value = (projected(part) for part in "qkv")
    attention = torch.einsum("bqhd,bkhd->bhqk", query, key).div(query.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", attention, value)[:, 0].flatten(1)


def scaled(images: np.ndarray) -> Tensor:
    pixels = (torch.from_numpy(images).float() / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    return pixels.permute(0, 3, 1, 2)


# Folders as they are published.


def reference(tokens: int, end: int, act: str = "quick_gelu") -> CLIPModel:
    """transformers' own model, with random weights."""
    text = CLIPTextConfig(
        vocab_size=tokens, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, eos_token_id=end, hidden_act=act,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, image_size=24,
        patch_size=8, hidden_act=act,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=JOINT))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)  # its own are so small that an activation could be any
    return model.eval().requires_grad_(False)


def part(model: CLIPModel, prefix: str) -> Tensors:
    return {k.removeprefix(prefix): tensor for k, tensor in model.state_dict().items() if k.startswith(prefix)}


def open_clip_names(tower: Tensors) -> Tensors:
    return {key.removeprefix(".model."): tensor for key, tensor in in_open_clip(tower, "", unused=0).items()}


def in_transformer(model: CLIPModel) -> Tensors:
    """The vision transformer's tensors: its blocks are named as those of the text tower are."""
    vision = part(model, "vision_model.")
    blocks = {key: tensor for key, tensor in vision.items() if key.startswith("encoder")}
    named = open_clip_names(blocks | {"final_layer_norm.weight": vision["post_layernorm.weight"]})
    made = {key: tensor for key, tensor in named.items() if key.startswith("transformer.")}
    made |= {
        "class_embedding": vision["embeddings.class_embedding"],
        "conv1.weight": vision["embeddings.patch_embedding.weight"],
        "positional_embedding": vision["embeddings.position_embedding.weight"],
        "proj": model.visual_projection.weight.T.contiguous(),
        **{f"ln_pre.{side}": vision[f"pre_layrnorm.{side}"] for side in ("weight", "bias")},
        **{f"ln_post.{side}": vision[f"post_layernorm.{side}"] for side in ("weight", "bias")},
    }
    return {f"visual.{key}": tensor for key, tensor in made.items()}


def save(folder: Path, *, tower: str = "resnet", quick: bool = True) -> CLIPModel:
    """A tiny checkpoint, all files that are published; returns the model that its text tower, and a transformer, is."""
    tokens = save_tokenizer(folder, "<|endoftext|>", 24)
    model = reference(len(tokens), tokens.eos_token_id, "quick_gelu" if quick else "gelu")
    tensors = open_clip_names(part(model, "text_model.") | {"text_projection.weight": model.text_projection.weight})
    vision: dict[str, Any] = {"image_size": 64, "layers": list(LAYERS), "width": WIDTH, "patch_size": None}
    if tower == "resnet":
        generator = torch.Generator().manual_seed(1)
        tensors |= {name: drawn(generator, name, shape) for name, shape in shapes().items()}
    else:
        tensors |= in_transformer(model)
        vision = {"image_size": 24, "layers": 2, "width": 128, "patch_size": 8, "head_width": 32, "mlp_ratio": 1.5}
    text = {"context_length": 24, "vocab_size": len(tokens), "width": 32, "heads": 4, "layers": 2}
    config = {"embed_dim": JOINT, "vision_cfg": vision, "text_cfg": text} | ({"quick_gelu": True} if quick else {})
    pixels = {"mean": MEAN, "std": DEVIATION, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPModel]:
    folder = tmp_path_factory.mktemp("open-clip") / "resnet"
    return folder, save(folder)


@pytest.fixture
def folder(saved: tuple[Path, CLIPModel], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "resnet"))


def opened(folder: Path, **changes: object) -> OpenClip:
    clip = load_clip(row(folder, "open-clip", **changes), CPU)
    assert isinstance(clip, OpenClip)
    return clip


def images_of(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (2, side, side, 3), dtype=np.uint8)


# The towers.


def test_the_resnet_is_the_published_one_written_out(saved: tuple[Path, CLIPModel]) -> None:
    clip, tensors = opened(saved[0]), load_file(saved[0] / WEIGHTS)
    expected = resnet(tensors, scaled(images_of(64)))
    assert expected.std() > 0.1 and expected.shape == (2, 256)
    assert torch.allclose(clip.image_features(images_of(64)), expected, atol=1e-4)
    projected = expected @ tensors["visual.attnpool.c_proj.weight"].T + tensors["visual.attnpool.c_proj.bias"]
    assert torch.allclose(clip.model.visual_projection(clip.image_features(images_of(64))), projected, atol=1e-4)


def test_attention_over_places_is_torchs_own_with_the_projection_as_its_last_map(folder: Path) -> None:
    clip, tensors = opened(folder), load_file(folder / WEIGHTS)
    maps = torch.randn(3, 256, 2, 2, generator=torch.Generator().manual_seed(2))
    places = maps.flatten(2).permute(2, 0, 1)
    places = (
        torch.cat([places.mean(0, keepdim=True), places]) + tensors["visual.attnpool.positional_embedding"][:, None]
    )
    weights, biases = ([tensors[f"visual.attnpool.{p}_proj.{side}"] for p in "qkvc"] for side in ("weight", "bias"))
    expected, _ = F.multi_head_attention_forward(
        places[:1], places, places, 256, 4, None, torch.cat(biases[:3]), None, None, False, 0.0, weights[3], biases[3],
        training=False, use_separate_proj_weight=True, q_proj_weight=weights[0], k_proj_weight=weights[1],
        v_proj_weight=weights[2],
    )  # fmt: skip
    found = clip.model.visual_projection(clip.model.vision_model.attnpool(maps))
    assert torch.allclose(found, expected[0], atol=1e-5)


@pytest.mark.parametrize("quick", [True, False])
def test_the_text_tower_is_that_of_transformers(quick: bool, tmp_path: Path) -> None:
    model = save(tmp_path / "clip", quick=quick)
    clip = opened(tmp_path / "clip")
    ids = [clip.tokenizer(text).input_ids for text in TEXTS]
    padded = torch.tensor([row + [0] * (24 - len(row)) for row in ids])  # as open_clip pads
    with torch.inference_mode():
        expected = model.text_model(input_ids=padded).pooler_output
    assert torch.allclose(clip.text_features(TEXTS), expected, atol=1e-5)
    assert torch.allclose(
        clip.model.text_projection(clip.text_features(TEXTS)), model.text_projection(expected), atol=1e-5
    )
    assert (clip.max_tokens, clip.resolution) == (24, 64)


def test_the_activation_is_what_the_config_says(tmp_path: Path) -> None:
    save(tmp_path / "clip")
    before = opened(tmp_path / "clip")
    edit(tmp_path / "clip", "model_cfg", quick_gelu=False)
    after = opened(tmp_path / "clip")
    assert not torch.allclose(before.text_features(TEXTS), after.text_features(TEXTS), atol=1e-3)
    assert before.digest != after.digest


def test_the_vision_transformer_is_that_of_transformers(tmp_path: Path) -> None:
    model = save(tmp_path / "clip", tower="transformer")
    clip = opened(tmp_path / "clip")
    with torch.inference_mode():
        expected = model.vision_model(pixel_values=scaled(images_of(24))).pooler_output
    assert torch.allclose(clip.image_features(images_of(24)), expected, atol=1e-4)
    assert torch.allclose(clip.model.visual_projection(expected), model.visual_projection(expected), atol=1e-4)


@pytest.mark.parametrize(("config", "parameters"), [(RN50, 102_007_137), (VIT, 151_277_313)])
def test_the_published_configurations_have_as_many_parameters_as_are_published(
    config: dict[str, Any], parameters: int
) -> None:
    with torch.device("meta"):
        towers = Towers(Model.model_validate(config), 49407)
    assert sum(weight.numel() for weight in towers.parameters()) == parameters


def test_the_published_resnet_has_all_tensors_of_its_file_and_no_others() -> None:
    with torch.device("meta"):
        towers = Towers(Model.model_validate(RN50), 49407)
    text = open_clip_names({k.removeprefix("text_model."): t for k, t in towers.state_dict().items() if "text_" in k})
    expected = shapes((3, 4, 6, 3), 64, 1024, 7) | {name: tuple(tensor.shape) for name, tensor in text.items()}
    origins = {key: Origin.of(key, resnet=True) for key in towers.state_dict()}
    found = {
        o.name: o.shape(tensor.shape) for o, tensor in zip(origins.values(), towers.state_dict().values(), strict=True)
    }
    assert found == expected
    assert {"visual.layer4.2.bn3.running_var", "transformer.resblocks.11.attn.in_proj_bias", "logit_scale"} <= set(
        found
    )


@pytest.mark.slow
def test_a_resnet_50_of_the_published_size(tmp_path: Path) -> None:
    """102 M random weights through the same code: the file is as large as the published one."""
    folder, generator = tmp_path / "clip", torch.Generator().manual_seed(1)
    save_tokenizer(folder, "<|endoftext|>", 77, size=49408)
    towers = Towers(Model.model_validate(RN50), 49407)
    text = open_clip_names({k.removeprefix("text_model."): t for k, t in towers.state_dict().items() if "text_" in k})
    visual = {name: drawn(generator, name, shape) for name, shape in shapes((3, 4, 6, 3), 64, 1024, 7).items()}
    save_file(text | visual, folder / WEIGHTS)
    assert 408 <= (folder / WEIGHTS).stat().st_size / 1e6 < 409
    pixels = {"mean": MEAN, "std": DEVIATION, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / CONFIG).write_text(json.dumps({"model_cfg": RN50, "preprocess_cfg": pixels}))
    clip = opened(folder)
    expected = resnet(visual, scaled(images_of(224)), (3, 4, 6, 3))
    assert torch.allclose(clip.image_features(images_of(224)), expected, rtol=1e-3, atol=1e-4 * expected.abs().max())
    assert (clip.resolution, clip.max_tokens, expected.shape[1]) == (224, 77, 2048)
    assert clip.text_features(TEXTS).shape == (3, 512)


def test_weights_in_half_precision_are_read_in_the_arithmetic_of_the_row(folder: Path) -> None:
    full, tensors = opened(folder), load_file(folder / WEIGHTS)
    save_file({k: t.half() if t.is_floating_point() else t for k, t in tensors.items()}, folder / WEIGHTS)
    half, low = opened(folder), opened(folder, dtype="bfloat16")
    assert half.text_features(TEXTS).dtype == half.image_features(images_of(64)).dtype == torch.float32
    assert torch.allclose(half.text_features(TEXTS), full.text_features(TEXTS), atol=1e-2)
    assert half.digest != low.digest
    exact, near = (clip.image_features(images_of(64)) for clip in (half, low))
    assert 0 < (near - exact).abs().max() < 0.1 * exact.abs().max()


# What learns.


@pytest.mark.parametrize("method", ["clip-finetune", "clip-prompt"])
def test_few_shot_training_runs_on_it(
    method: str, saved: tuple[Path, CLIPModel], params: Params, prepared: Path, tmp_path: Path
) -> None:
    rows = {**params.backbones, "embedded-clip": row(saved[0], "open-clip")}
    changed = params.model_copy(update={"backbones": rows})
    session = Session("scenes-com", changed, Folders(prepared, tmp_path / "cache", tmp_path))
    curve = list(train(session, Training(method)))
    assert len(curve) == 4 and all(np.isfinite(point["loss"]) for point in curve)
    [learned] = (load_file(file) for file in (tmp_path / method).glob("*.safetensors"))
    if method == "clip-finetune":
        before = opened(saved[0]).model.visual_projection
        assert learned["image.bias"].shape == (JOINT,) and not torch.equal(learned["image.bias"], before.bias)
        assert not torch.equal(learned["image.weight"], before.weight)


def test_a_lazy_clip_is_opened_at_its_first_use(saved: tuple[Path, CLIPModel]) -> None:
    eager, lazy = opened(saved[0]), load_clip(row(saved[0], "open-clip"), CPU, lazy=True)
    assert lazy.digest == eager.digest and "_opened" not in vars(lazy)
    assert torch.equal(lazy.text_features(TEXTS), eager.text_features(TEXTS)) and "_opened" in vars(lazy)


def test_cosines_are_of_what_both_projections_make(saved: tuple[Path, CLIPModel]) -> None:
    clip = opened(saved[0])
    features = (clip.image_features(images_of(64)), clip.text_features(TEXTS))
    head = Projections(clip, None, None).requires_grad_(False)  # type: ignore[arg-type]
    images, texts = head.image(features[0]), head.text(features[1])
    tensors = load_file(saved[0] / WEIGHTS)
    expected = features[0] @ tensors["visual.attnpool.c_proj.weight"].T + tensors["visual.attnpool.c_proj.bias"]
    assert torch.allclose(images, expected, atol=1e-5)
    assert torch.allclose(texts, features[1] @ tensors["text_projection"], atol=1e-5)


# What is wrong with a folder.


def edit(folder: Path, where: str, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    node = config
    for key in where.split("."):
        node = node[key]
    node.update(changes)
    (folder / CONFIG).write_text(json.dumps(config))


def change(folder: Path, **changes: Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), f": no {CONFIG}: not in open_clip's layout"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), f"/{CONFIG}: does not load: "),
    "no text tower": (
        lambda f: (f / CONFIG).write_text('{"model_cfg": {"embed_dim": 2}}'),
        f"/{CONFIG}: model_cfg.vision_cfg: Field required",
    ),
    "another tower": (
        lambda f: edit(f, "model_cfg.vision_cfg", timm_model_name="convnext_base"),
        f"/{CONFIG}: model_cfg.vision_cfg.timm_model_name: a setting that is not supported",
    ),
    "two towers": (
        lambda f: edit(f, "model_cfg.vision_cfg", patch_size=16),
        f"/{CONFIG}: model_cfg.vision_cfg: Value error, layers must be four numbers and patch_size null, or one",
    ),
    "heads": (
        lambda f: edit(f, "model_cfg.vision_cfg", head_width=100),
        f"/{CONFIG}: model_cfg.vision_cfg: Value error, head_width 100 must divide the 256 features of the tower",
    ),
    "heads of the text": (lambda f: edit(f, "model_cfg.text_cfg", heads=5), f"/{CONFIG}: no valid CLIP (Class valid"),
    "no deviation": (
        lambda f: edit(f, "preprocess_cfg", std=[0, 1, 1]),
        f"/{CONFIG}: preprocess_cfg.std.0: Input should be greater than 0",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f": no {WEIGHTS}"),
    "a pickle": (
        lambda f: (f / WEIGHTS).rename(f / "open_clip_pytorch_model.bin"),
        f": no {WEIGHTS}, only open_clip_pytorch_model.bin, a pickle; convert it to safetensors",
    ),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"PK" * 50), f"/{WEIGHTS}: not a file in safetensors ("),
    "a missing tensor": (
        lambda f: change(f, visual__attnpool__c_proj__bias=None),
        f"/{WEIGHTS}: 1 tensors do not fit the model of {CONFIG}; visual.attnpool.c_proj.bias is missing",
    ),
    "a missing matrix of three": (
        lambda f: change(f, transformer__resblocks__1__attn__in_proj_weight=None),
        "; transformer.resblocks.1.attn.in_proj_weight is missing",
    ),
    "a misshapen tensor": (
        lambda f: change(f, text_projection=torch.zeros(JOINT, 32)),
        f"; text_projection is [{JOINT}, 32] and not [32, {JOINT}]",
    ),
    "a misshapen matrix of three": (
        lambda f: change(f, transformer__resblocks__0__attn__in_proj_bias=torch.zeros(95)),
        "; transformer.resblocks.0.attn.in_proj_bias is [95] and not [96]",
    ),
    "a larger tower": (
        lambda f: change(f, visual__layer3__1__conv1__weight=torch.zeros(32, 128, 1, 1)),
        "; visual.layer3.1.conv1.weight is unexpected",
    ),
    "no tokenizer": (lambda f: (f / "vocab.json").unlink(), ": no tokenizer (tokenizer.json, or vocab.json"),
    "another tokenizer": (
        lambda f: edit(f, "model_cfg.text_cfg", vocab_size=49408), " tokens, but vocab_size is 49408"
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_one_line(defect: str, folder: Path) -> None:
    spoil, said = DEFECTS[defect]
    spoil(folder)
    with pytest.raises(CheckpointError) as error:
        opened(folder)
    assert str(error.value).startswith(str(folder)) and said in str(error.value) and "\n" not in str(error.value)


def test_families_are_told_apart(folder: Path, models: Path) -> None:
    with pytest.raises(CheckpointError, match=r"of family open-clip, and not clip; correct family"):
        load(row(folder, "clip"), CPU)
    with pytest.raises(CheckpointError, match=r"of family open-clip: of family clip; correct family"):
        load(row(models / "embedded-clip", "open-clip"), CPU)
    with pytest.raises(CheckpointError, match=r"a file, but family open-clip is opened by its folder"):
        load(row(folder / WEIGHTS, "open-clip", config=None), CPU)


def test_one_folder_may_have_both_layouts(folder: Path, models: Path) -> None:
    """As many a repository has; each row reads its own files, and these alone are its identity."""
    alone = opened(folder).digest
    shutil.copytree(models / "embedded-clip", folder, dirs_exist_ok=True)
    assert family_of(folder) == "clip"
    assert opened(folder).digest == alone
    assert load_clip(row(folder, "clip"), CPU).resolution == 24


def test_no_more_of_a_repository_is_fetched_than_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = files_of(folder)
    beside = ("open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin", "config.json", "README.md")
    served = Hub({"timm/resnet": read | dict.fromkeys(beside, b"never read")})
    with connected(served, tmp_path, monkeypatch):
        clip = opened(Path("timm/resnet"), revision=COMMIT)
        assert sorted(served.fetched()) == sorted(read)
        assert clip.digest == f"timm/resnet@{COMMIT}"
        assert remote(row(Path("timm/resnet"), "open-clip")) == sum(map(len, read.values()))
        del served.repositories["timm/resnet"][WEIGHTS]
        with pytest.raises(CheckpointError, match=r"timm/resnet: has no weights in safetensors for family open-clip"):
            remote(row(Path("timm/resnet"), "open-clip"))
    assert torch.equal(clip.text_features(TEXTS), opened(folder).text_features(TEXTS))


def test_a_gated_repository_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Hub({"timm/resnet": files_of(folder)}, gated={"timm/resnet"})
    with connected(served, tmp_path, monkeypatch), pytest.raises(CheckpointError) as error:
        opened(Path("timm/resnet"), revision=COMMIT)
    assert str(error.value) == (
        f"timm/resnet is gated: accept its terms at {served.url}/timm/resnet, then log in with `hf auth login` or set "
        "HF_TOKEN"
    )
