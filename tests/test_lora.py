"""LoRA checkpoints: merged as they act, and every defect of a file is one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from dsd.config import BackboneParams, Params
from dsd.errors import CheckpointError
from dsd.models import load, load_diffusion
from dsd.models.lora import mistakes, projections
from dsd.models.prompts import AttentionPrompt
from dsd.models.stable_diffusion import StableDiffusion
from tests.test_released import SD21

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


def tensors_for(unet: UNet2DConditionModel, rank: int = 4) -> Tensors:
    """A LoRA at random for every projection of the U-Net, in the names of the published ones."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, linear in projections(unet).items():
        made[f"{name}.down.weight"] = torch.randn(rank, linear.in_features, generator=generator) / 4
        made[f"{name}.up.weight"] = torch.randn(linear.out_features, rank, generator=generator) / 4
    return made


def with_lora(params: Params, path: Path) -> BackboneParams:
    return params.backbones["embedded"].model_copy(update={"lora": str(path)})


@pytest.fixture(scope="module")
def backbone(params: Params) -> StableDiffusion:
    return load_diffusion(params.backbones["embedded"], CPU)


@pytest.fixture(scope="module")
def tensors(backbone: StableDiffusion) -> Tensors:
    return tensors_for(backbone.unet)


def test_stable_diffusion_has_256_tensors() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD21)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_for(unet).items()}
    assert len(shapes) == 256
    start = "down_blocks.0.attentions.1.transformer_blocks.0"
    assert shapes[f"{start}.attn1.processor.to_q_lora.down.weight"] == (4, 320)
    assert shapes[f"{start}.attn2.processor.to_k_lora.down.weight"] == (4, 1024)
    assert shapes["mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.up.weight"] == (1280, 4)
    assert shapes["up_blocks.3.attentions.2.transformer_blocks.0.attn1.processor.to_v_lora.up.weight"] == (320, 4)


@torch.inference_mode()
def predict(backbone: StableDiffusion) -> Tensor:
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    text = backbone.encode_texts(["a red circle", "a blue star"]).hidden
    return backbone.predict_noise(latents, torch.tensor([100, 700]), text)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_merged_weights_act_as_low_rank_layers_beside_them(
    suffix: str, params: Params, backbone: StableDiffusion, tensors: Tensors, tmp_path: Path
) -> None:
    """Each projection's output plus up(down(input)), as the published implementation computes it."""
    path = tmp_path / f"lora{suffix}"
    torch.save(tensors, path) if suffix == ".bin" else save_file(tensors, path)

    def beside(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        down, up = tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"]
        return lambda _, args, out: out + args[0] @ down.T @ up.T

    before = predict(backbone)
    hooks = [linear.register_forward_hook(beside(name)) for name, linear in projections(backbone.unet).items()]
    expected = predict(backbone)
    for hook in hooks:
        hook.remove()
    merged = load_diffusion(with_lora(params, path), CPU)
    assert torch.allclose(predict(merged), expected, atol=1e-4)
    assert not torch.allclose(expected, before, atol=1e-2)
    assert torch.equal(predict(backbone), before)


def test_a_lora_is_merged_when_the_denoiser_is_opened(
    params: Params, backbone: StableDiffusion, tensors: Tensors, tmp_path: Path, opened: list[str]
) -> None:
    save_file(tensors, tmp_path / "lora.safetensors")
    eager = load_diffusion(with_lora(params, tmp_path / "lora.safetensors"), CPU)
    opened.clear()
    lazy = load_diffusion(with_lora(params, tmp_path / "lora.safetensors"), CPU, lazy=True)
    assert lazy.digest == eager.digest != backbone.digest and opened == []
    assert torch.equal(predict(lazy), predict(eager)) and not torch.equal(predict(lazy), predict(backbone))
    save_file({"weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    other = load_diffusion(with_lora(params, tmp_path / "lora.safetensors"), CPU, lazy=True)
    for _ in range(2):  # a U-Net without its LoRA is never left behind
        with pytest.raises(CheckpointError, match="not a LoRA of this U-Net"):
            predict(other)


def test_a_lora_is_part_of_the_identity(
    params: Params, backbone: StableDiffusion, tensors: Tensors, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "one.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, tmp_path / "two.safetensors")
    save_file(tensors, tmp_path / "copy.safetensors")
    one, two, copy = (
        load_diffusion(with_lora(params, tmp_path / f"{name}.safetensors"), CPU).digest
        for name in ("one", "two", "copy")
    )
    assert one == copy and len({one, two, backbone.digest}) == 3
    prompt = AttentionPrompt(32, backbone.layer_widths, 4, rank=2, conditional=False, seed=0)
    prompt.save(tmp_path / "prompt.safetensors", one)
    AttentionPrompt.load(tmp_path / "prompt.safetensors", copy)
    with pytest.raises(CheckpointError, match=f"belongs to backbone {one}, not to {backbone.digest}"):
        AttentionPrompt.load(tmp_path / "prompt.safetensors", backbone.digest)


@given(st.integers(1, 9), st.integers(1, 9))
def test_any_rank_fits_that_both_sides_have(down: int, up: int) -> None:
    linear = nn.Linear(5, 7, device="meta")
    found = mistakes(
        {"to_q_lora": linear},
        {"to_q_lora.down.weight": torch.empty(down, 5), "to_q_lora.up.weight": torch.empty(7, up)},
    )
    assert (found == []) == (down == up)


def refused(params: Params, path: Path) -> str:
    """The message, which is one line."""
    with pytest.raises(CheckpointError) as error:
        load(with_lora(params, path), CPU)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_every_kind_of_mistake_is_named_and_counted_in_one_line(
    params: Params, tensors: Tensors, tmp_path: Path
) -> None:
    names = sorted(tensors)
    wrong = {name: tensor for name, tensor in tensors.items() if name not in names[:5]}
    wrong["conv_in.weight"] = torch.zeros(1)
    wrong[names[-1]] = torch.zeros(2, 2)
    path = tmp_path / "wrong.safetensors"
    save_file(wrong, path)
    message = refused(params, path)
    assert f"of {len(tensors)} tensors; 5 missing: {names[0]}, {names[1]}, {names[2]} and 2 more" in message
    assert "; 1 unexpected: conv_in.weight;" in message
    assert f"misshapen: {names[-1]} [2, 2] for [" in message


def test_a_lora_of_another_backbone_is_refused(params: Params, tmp_path: Path) -> None:
    with torch.device("meta"):
        other = {name: tensor.shape for name, tensor in tensors_for(UNet2DConditionModel(**SD21)).items()}
    path = tmp_path / "other.bin"
    torch.save({name: torch.zeros(shape) for name, shape in other.items()}, path)
    message = refused(params, path)
    assert " missing: " in message and " unexpected: " in message and " misshapen: " in message
    assert len(message) < 2000


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_a_pickle_with_code_is_refused_unread(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Code()}, tmp_path / "evil.bin")
    assert "nothing else is opened" in refused(params, tmp_path / "evil.bin")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("lora.safetensors", b"no tensors", "not a file of tensors alone"),
        ("lora.bin", b"no tensors", "not a file of tensors alone"),
        ("lora.bin", b"", "not a file of tensors alone"),
        ("lora.ckpt", b"", "a LoRA is a file .safetensors or .bin"),
        ("lora.bin", None, "no such LoRA file"),
    ],
)
def test_what_is_no_lora_is_said(params: Params, tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert said in refused(params, tmp_path / name)


def test_a_file_of_something_else_is_said(params: Params, tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.bin")
    assert "not a table of tensors by name" in refused(params, tmp_path / "list.bin")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, None])
def test_a_lora_is_stored_in_floating_point(
    dtype: torch.dtype | None, params: Params, tensors: Tensors, tmp_path: Path
) -> None:
    name = sorted(tensors)[0]
    stored = tensors[name].to_sparse() if dtype is None else tensors[name].to(dtype)
    torch.save({**tensors, name: stored}, tmp_path / "lora.bin")
    assert f"{name} is stored as" in refused(params, tmp_path / "lora.bin")


def test_clip_takes_no_lora(params: Params) -> None:
    row = params.backbones["embedded-clip"].model_copy(update={"lora": "some.bin"})
    with pytest.raises(CheckpointError, match="family clip takes no lora"):
        load(row, CPU)
