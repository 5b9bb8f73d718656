"""Opens the components of a checkpoint folder; every defect is one line that names the folder and the component."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers.utils import logging as transformers_logging

from dsd.errors import CheckpointError
from dsd.params import BackboneParams
from dsd.store import digest, file_digest

transformers_logging.disable_progress_bar()  # a bar for each component would drown those of the stages

# What a checkpoint is made of; its card, curve and sample pictures are not part of its identity.
SUFFIXES = (".safetensors", ".json", ".txt", ".model")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(name: str) -> torch.device:
    """ "auto" is CUDA where there is one; asking for CUDA where there is none is a user's error."""
    if name == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("runtime.device: cuda, but torch sees no CUDA device; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def locate(row: BackboneParams) -> tuple[Path, str]:
    """The checkpoint's folder and its digest: of the files where it is local, of id and revision on the hub, and of
    the LoRA where it has one: with another LoRA it is another checkpoint."""
    folder, identity = _locate(row)
    if row.lora is None:
        return folder, identity
    if not Path(row.lora).is_file():
        raise CheckpointError(f"{row.lora}: no such LoRA file")
    return folder, digest(identity, file_digest(Path(row.lora)))


def _locate(row: BackboneParams) -> tuple[Path, str]:
    local = Path(row.source)
    if local.is_dir():
        files = (file for file in sorted(local.rglob("*")) if file.suffix in SUFFIXES)
        return local, digest({file.relative_to(local).as_posix(): file_digest(file) for file in files})
    if local.is_absolute() or row.source.startswith(".") or row.source.count("/") != 1:
        raise CheckpointError(f"{row.source}: no such checkpoint folder")
    if local.parts[0] == "models":
        raise CheckpointError(f"{row.source}: no such checkpoint folder; the stage `pretrain` makes the embedded ones")
    try:
        patterns = [f"*{suffix}" for suffix in SUFFIXES]
        folder = Path(snapshot_download(row.source, revision=row.revision, allow_patterns=patterns))
        return folder, f"{row.source}@{row.revision}"
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{row.source}: neither a folder nor reachable on the hub ({reason})") from None


def require(folder: Path, components: Sequence[str]) -> None:
    """Every component is there, and its weights are safetensors: a pickle is never opened."""
    for component in components:
        place = folder / component
        if not place.is_dir():
            raise CheckpointError(f"{folder}: lacks the component {component}/ (needed: {', '.join(components)})")
        if (place / "config.json").exists() and not list(place.glob("*.safetensors")):
            pickles = [*place.glob("*.bin"), *place.glob("*.ckpt"), *place.glob("*.pt")]
            found = f"only {pickles[0].name}, a pickle; convert it to safetensors" if pickles else "no weights"
            raise CheckpointError(f"{place}: {found}")


def component(kind: Any, folder: Path, subfolder: str, dtype: torch.dtype) -> Any:
    """`kind.from_pretrained`, refusing weights that do not fill the model exactly."""
    place = folder / subfolder if subfolder else folder
    options: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
    if kind.__module__.startswith("diffusers"):
        options |= {"torch_dtype": dtype, "low_cpu_mem_usage": False}
    else:
        options |= {"dtype": dtype}
    try:
        model, info = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except Exception as error:  # each library has its own family of errors; all mean that this folder does not load
        raise CheckpointError(
            f"{place}: does not load as {kind.__name__}: {' '.join(str(error).split())[:200]}"
        ) from None
    wrong = [*info.get("mismatched_keys", ()), *info.get("missing_keys", ())]
    if wrong:
        raise CheckpointError(f"{place}: {len(wrong)} tensors missing or misshapen, the first {wrong[0]}")
    return model.eval().requires_grad_(False)
