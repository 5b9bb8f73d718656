"""Check the weights of a checkpoint: stored as floating-point numbers, finite, and all of them used.

Every defect raises CheckpointError, with one line that names the place and the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dsd.errors import CheckpointError, brief

# The types that weights may be stored in, and their names in safetensors; others need scales that are not known here.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STORED = ("F16", "BF16", "F32", "F64")
# Parts of a whole CLIP, in files of its text encoder alone.
OTHER_PARTS = ("logit_scale", "text_projection", "vision_model.", "visual_projection")


def unexpected(names: Iterable[str], kind: Any) -> list[str]:
    """Return those of the unused tensors of a model of class `kind` that are not known to be harmless."""
    harmless = OTHER_PARTS if kind.__name__.startswith("CLIPText") else ()
    return sorted(name for name in names if not name.startswith(harmless) and not name.endswith("position_ids"))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a file in safetensors."""
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a file in safetensors ({brief(error)})") from None


def check_stored(file: Path) -> None:
    """Check the type of every tensor of a file in safetensors, without reading the tensors."""
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            stored = opened.get_slice(name).get_dtype()
            if stored not in STORED and not name.endswith("position_ids"):
                raise CheckpointError(f"{file}: {name} is stored as {stored}: must be one of {', '.join(STORED)}")


def check_finite(weights: nn.Module, place: str) -> None:
    """Raise CheckpointError if a weight is NaN or infinite."""
    check_tensors({name: weight for name, weight in weights.state_dict().items() if weight.is_floating_point()}, place)


def check_tensors(tensors: Mapping[str, Tensor], place: str) -> None:
    """Raise CheckpointError if a tensor is no dense tensor of floating-point numbers, or has NaN or infinite values."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
            stored = f"{tensor.dtype}, {tensor.layout}".replace("torch.", "")
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise CheckpointError(f"{place}: {name} is stored as {stored}: must be dense, of {expected}")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{place}: {name} has values that are not finite (NaN or infinite); damaged")
