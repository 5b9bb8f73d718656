"""The published LoRA checkpoints of Discriminative Stable Diffusion, merged into the weights of a U-Net.

One of them holds, for the projections q, k, v and out of every self- and cross-attention, a matrix `down` [rank, in]
and a matrix `up` [out, rank]: W' = W + up · down, at scale 1 (Hu et al. 2021, section 4.1). For the U-Net of Stable
Diffusion 2.1 these are 256 tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from torch import Tensor, nn

from dsd.errors import CheckpointError

SHOWN = 3  # names a message gives of each kind of mistake; it counts them all


def projections(unet: UNet2DConditionModel) -> dict[str, nn.Linear]:
    """What a LoRA changes, by the name that its tensors begin with: `<attention>.processor.to_{q,k,v,out}_lora`."""
    found: dict[str, nn.Linear] = {}
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name.endswith(("attn1", "attn2")):
            parts = {"q": module.to_q, "k": module.to_k, "v": module.to_v, "out": module.to_out[0]}
            found |= {f"{name}.processor.to_{part}_lora": linear for part, linear in parts.items()}
    return found


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file in safetensors, or of a .bin that holds tensors and nothing else.

    Raises:
        CheckpointError: the file is damaged, of another kind, or a pickle with code in it, which is not run.
    """
    if path.suffix not in (".safetensors", ".bin"):
        raise CheckpointError(f"{path}: a LoRA is a file .safetensors or .bin")
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a damaged or hostile pickle leads it to
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: not a file of tensors alone, and nothing else is opened ({reason})") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise CheckpointError(f"{path}: not a table of tensors by name")
    return tensors


def mistakes(expected: dict[str, nn.Linear], tensors: dict[str, Tensor]) -> list[str]:
    """What is missing, unexpected or misshapen, in words; nothing where all fit. Any rank does that both sides have."""
    names = {f"{name}.{side}.weight" for name in expected for side in ("down", "up")}
    misshapen = []
    for name, linear in expected.items():
        down, up = (tensors.get(f"{name}.{side}.weight") for side in ("down", "up"))
        ranks = [side.shape[dim] for side, dim in ((down, 0), (up, 1)) if side is not None and side.ndim == 2]
        rank = ranks[0] if ranks and ranks[0] > 0 else "rank"
        shapes = {"down": (down, [rank, linear.in_features]), "up": (up, [linear.out_features, rank])}
        for side, (found, shape) in shapes.items():
            if found is not None and list(found.shape) != shape:
                misshapen.append(f"{name}.{side}.weight {list(found.shape)} for [{shape[0]}, {shape[1]}]")
    kinds = {"missing": sorted(names - set(tensors)), "unexpected": sorted(set(tensors) - names)}
    return [_listed(kind, found) for kind, found in {**kinds, "misshapen": misshapen}.items() if found]


def _listed(kind: str, names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{f' and {rest} more' if rest > 0 else ''}"


def merge(unet: UNet2DConditionModel, path: Path) -> None:
    """W' = W + up · down in every projection of the U-Net, computed in float32.

    Raises:
        CheckpointError: the file cannot be read (see `read`), or is not a LoRA of this very U-Net.
    """
    expected, tensors = projections(unet), read(path)
    if wrong := mistakes(expected, tensors):
        raise CheckpointError(f"{path}: not a LoRA of this U-Net, of {2 * len(expected)} tensors; {'; '.join(wrong)}")
    with torch.no_grad():
        for name, linear in expected.items():
            down, up = (tensors[f"{name}.{side}.weight"].to(linear.weight.device).float() for side in ("down", "up"))
            linear.weight.copy_(linear.weight.float() + up @ down)
