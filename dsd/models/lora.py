"""Merge the published LoRA checkpoints of Discriminative Stable Diffusion into the weights of a U-Net.

A checkpoint has a matrix `down` [rank, in] and a matrix `up` [out, rank] for each projection (q, k, v, out) of every
self- and cross-attention layer: W' = W + up · down, at scale 1 (Hu et al. 2021, section 4.1). These are 256 tensors for
Stable Diffusion 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from torch import Tensor, nn

from dsd.errors import CheckpointError, brief
from dsd.models.weights import check_tensors

SHOWN = 3  # names in a message per kind of mistake


def projections(unet: UNet2DConditionModel) -> dict[str, nn.Linear]:
    """Return the layers that a LoRA changes, by prefix of its tensors: `<attention>.processor.to_{q,k,v,out}_lora`."""
    layers: dict[str, nn.Linear] = {}
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name.endswith(("attn1", "attn2")):
            parts = {"q": module.to_q, "k": module.to_k, "v": module.to_v, "out": module.to_out[0]}
            layers |= {f"{name}.processor.to_{part}_lora": linear for part, linear in parts.items()}
    return layers


def read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file in safetensors, or of a .bin that holds nothing else; code in a pickle is not run.

    Raises:
        CheckpointError: the file is damaged or of another kind.
    """
    if path.suffix not in (".safetensors", ".bin"):
        raise CheckpointError(f"{path}: a LoRA is a file .safetensors or .bin")
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = brief(error, 120)
        raise CheckpointError(f"{path}: not a file of tensors alone, and nothing else is opened ({reason})") from None
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not (named and all(isinstance(tensor, Tensor) for tensor in tensors.values())):
        raise CheckpointError(f"{path}: not a table of tensors by name")
    return tensors


def mistakes(expected: dict[str, nn.Linear], tensors: dict[str, Tensor]) -> list[str]:
    """Describe missing, unexpected and misshapen tensors; any rank is right that `up` and `down` share."""
    names = {f"{name}.{side}.weight" for name in expected for side in ("down", "up")}
    misshapen = []
    for name, linear in expected.items():
        down, up = (tensors.get(f"{name}.{side}.weight") for side in ("down", "up"))
        ranks = [side.shape[dim] for side, dim in ((down, 0), (up, 1)) if side is not None and side.ndim == 2]
        rank = ranks[0] if ranks and ranks[0] > 0 else "rank"
        shapes = {"down": (down, [rank, linear.in_features]), "up": (up, [linear.out_features, rank])}
        for side, (tensor, shape) in shapes.items():
            if tensor is not None and list(tensor.shape) != shape:
                misshapen.append(f"{name}.{side}.weight {list(tensor.shape)} for [{shape[0]}, {shape[1]}]")
    kinds = {"missing": sorted(names - set(tensors)), "unexpected": sorted(set(tensors) - names)}
    return [_listed(kind, names) for kind, names in {**kinds, "misshapen": misshapen}.items() if names]


def _listed(kind: str, names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{f' and {rest} more' if rest > 0 else ''}"


def merge(unet: UNet2DConditionModel, path: Path) -> None:
    """Add up · down to the weight of every projection of the U-Net, in float32.

    Raises:
        CheckpointError: the file cannot be read (see `read`), or is not a LoRA of this U-Net.
    """
    expected, tensors = projections(unet), read(path)
    if wrong := mistakes(expected, tensors):
        raise CheckpointError(f"{path}: not a LoRA of this U-Net, of {2 * len(expected)} tensors; {'; '.join(wrong)}")
    check_tensors(tensors, str(path))
    with torch.no_grad():
        for name, linear in expected.items():
            down, up = (tensors[f"{name}.{side}.weight"].to(linear.weight.device).float() for side in ("down", "up"))
            linear.weight.copy_(linear.weight.float() + up @ down)
