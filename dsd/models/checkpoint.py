"""Finds a checkpoint and opens its components; every defect is one line that names the place and the component."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from dsd.config import BackboneParams
from dsd.data.hub import hub_errors
from dsd.errors import CheckpointError
from dsd.store import digest, file_digest

transformers_logging.disable_progress_bar()  # a bar for each component would drown those of the stages

# What is read of a checkpoint, and so its identity. Beside it lie cards and pictures, and on the hub the same weights
# in other layouts and precisions, many gigabytes of them.
PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
SETTINGS = (
    *("config.json", "merges.txt", "model_index.json", "preprocessor_config.json", "special_tokens_map.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *(f"{part}/*{suffix}" for part in PARTS for suffix in (".json", ".txt")),
)
WEIGHTS = ("model.safetensors*", "model-*.safetensors", *(f"{part}/*.safetensors" for part in PARTS))
# Of open_clip's layout, beside which a repository may hold the same model in that of transformers.
OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
OPEN_CLIP = (
    *(OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS),
    *("merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
)
VARIANTS = ("*.fp16*.safetensors*", "*.bf16*.safetensors*", "*.non_ema*.safetensors*")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(name: str) -> torch.device:
    """ "auto" is CUDA where there is one; asking for CUDA where there is none is a user's error."""
    if name == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("runtime.device: cuda, but torch sees no CUDA device; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def one_file(row: BackboneParams) -> Path | None:
    """The file of a checkpoint that is one file of weights; None where it is a folder.

    Raises:
        CheckpointError: a pickle, a file that is not there, or one without the `config` that it needs.
    """
    path = Path(row.source)
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path}: a pickle, which is never opened; convert it to .safetensors")
    if path.suffix != ".safetensors":
        if row.config is not None:
            raise CheckpointError(
                f"{row.source}: config is for one file .safetensors; set it to null, not {row.config}"
            )
        return None
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if row.config is None:
        raise CheckpointError(f"{path}: one file needs config: a folder or hub id of the same architecture")
    return path


def folder_of(row: BackboneParams) -> Path:
    """The checkpoint's folder, of one file that of its settings; from the hub no more is fetched than is read."""
    source, patterns = _read_of(row)
    return Path(source) if _is_local(source) else _fetch(source, row.revision, patterns)


def locate(row: BackboneParams) -> tuple[Path, str]:
    """The checkpoint's folder (see `folder_of`) and its digest.

    The digest is of the files where it is local, of id and commit on the hub; and of the LoRA and of what the U-Net is
    said to predict, where the row has them: with others it is another checkpoint.

    Raises:
        CheckpointError: it is not there, or is not the one that the row's digest names.
    """
    folder, (source, patterns) = folder_of(row), _read_of(row)
    if Path(source).is_dir():
        names = {file: file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()}
        read = {file: name for file, name in names.items() if _matches(name, patterns) and not _matches(name, VARIANTS)}
        identity = digest({name: file_digest(file) for file, name in read.items()})
    else:
        identity = f"{source}@{folder.name}"  # which is the commit
    if file := one_file(row):
        identity = digest(file_digest(file), identity)
    if row.lora is not None:
        if not Path(row.lora).is_file():
            raise CheckpointError(f"{row.lora}: no such LoRA file")
        identity = digest(identity, file_digest(Path(row.lora)))
    if row.prediction is not None:
        identity = digest(identity, row.prediction)
    if row.digest not in (None, identity):
        raise CheckpointError(f"{row.source}: is not the checkpoint of digest {row.digest}, but {identity}")
    return folder, identity


def digest_of(row: BackboneParams) -> str:
    """The digest that the backbone of a row has once it is open."""
    _, identity = locate(row)
    # Of a CLIP the features are stored, and are other numbers in other arithmetic.
    return digest(identity, row.dtype) if row.family in ("clip", "open-clip") and row.dtype != "float32" else identity


def _read_of(row: BackboneParams) -> tuple[str, tuple[str, ...]]:
    """Where the settings are, and which files are read there."""
    if one_file(row):
        return str(row.config), SETTINGS
    return row.source, OPEN_CLIP if row.family == "open-clip" else (*SETTINGS, *WEIGHTS)


def _is_local(source: str) -> bool:
    """Whether it is a folder here; if not, it must be an id on the hub.

    Raises:
        CheckpointError: it can be neither.
    """
    local = Path(source)
    if not local.is_dir() and (local.is_absolute() or source.startswith(".") or source.count("/") != 1):
        raise CheckpointError(f"{source}: no such checkpoint folder")
    if not local.is_dir() and local.parts[0] == "models":
        raise CheckpointError(f"{source}: no such checkpoint folder; the stage `pretrain` makes the embedded ones")
    return local.is_dir()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _fetch(source: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The files of a repository on the hub, as a folder named by its commit; what was fetched is not fetched again."""
    with hub_errors(source, revision, error=CheckpointError):
        kept = snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=list(VARIANTS))
    return Path(kept)


def remote(row: BackboneParams) -> int:
    """The bytes of a checkpoint that are fetched from the hub where none of them is here yet; 0 of a local one.

    Raises:
        CheckpointError: it cannot be had; one line.
    """
    source, patterns = _read_of(row)
    if _is_local(source):
        return 0
    with hub_errors(source, row.revision, error=CheckpointError):
        info = HfApi().model_info(source, revision=row.revision, files_metadata=True)
        if info.gated:  # all may read what there is, and not all what is in it
            HfApi().auth_check(source)
    files = info.siblings or []
    read = [f for f in files if _matches(f.rfilename, patterns) and not _matches(f.rfilename, VARIANTS)]
    if not one_file(row) and not any(file.rfilename.endswith(".safetensors") for file in read):
        raise CheckpointError(
            f"{source}: has no weights in safetensors for family {row.family}; pickles are not opened"
        )
    return sum(file.size or 0 for file in read)


def commit(row: BackboneParams) -> str | None:
    """The commit that a row's source on the hub is at today; None of a local one.

    Raises:
        CheckpointError: it cannot be had; one line.
    """
    source, _ = _read_of(row)
    if _is_local(source):
        return None
    with hub_errors(source, None, error=CheckpointError):
        return str(HfApi().model_info(source).sha)


def component_config(row: BackboneParams, component: str) -> dict[str, Any]:
    """The configuration of a component, without its weights.

    Raises:
        CheckpointError: there is none, or it is no JSON; one line.
    """
    source, _ = _read_of(row)
    name = f"{component}/config.json"
    if _is_local(source):
        path = Path(source) / name
    else:
        with hub_errors(source, row.revision, error=CheckpointError):
            path = Path(hf_hub_download(source, name, revision=row.revision))
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}/{name}: does not load: {' '.join(str(error).split())[:160]}") from None


def family_of(folder: Path) -> str | None:
    """The family that the folder's content says, None where it does not."""
    if (folder / "unet").is_dir():
        return "stable-diffusion-xl" if (folder / "text_encoder_2").is_dir() else "stable-diffusion"
    if '"vision_config"' in _text(folder / "config.json"):
        return "clip"
    return "open-clip" if (folder / OPEN_CLIP_CONFIG).is_file() else None


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""


def require(folder: Path, family: str, components: Sequence[str], *, weights: bool = True) -> None:
    """The folder is of this family, every component is there, and its weights are safetensors: a pickle is never
    opened."""
    if (found := family_of(folder)) not in (None, family):
        raise CheckpointError(f"{folder}: of family {found}, and not {family}; correct family")
    for component in components:
        place = folder / component
        if not place.is_dir():
            raise CheckpointError(f"{folder}: lacks the component {component}/ (needed: {', '.join(components)})")
        if weights and (place / "config.json").exists() and not list(place.glob("*.safetensors")):
            pickles = [file.name for file in sorted(place.iterdir()) if file.suffix in PICKLES]
            found = f"only {pickles[0]}, a pickle; convert it to safetensors" if pickles else "no weights"
            raise CheckpointError(f"{place}: {found}")


def prediction_of(folder: Path, row: BackboneParams) -> str:
    """What the U-Net predicts, "epsilon" or "v_prediction": by the row, else by the scheduler, else (the oldest have no
    word on it) ε.

    Raises:
        CheckpointError: row and scheduler disagree, or the scheduler says something else.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    try:
        said = json.loads(file.read_text()).get("prediction_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: does not load: {' '.join(str(error).split())[:160]}") from None
    if said not in (None, "epsilon", "v_prediction"):
        raise CheckpointError(f"{file}: prediction_type {said!r} is neither epsilon nor v_prediction")
    if None not in (said, row.prediction) and said != row.prediction:
        raise CheckpointError(
            f"{row.source}: prediction of its row is {row.prediction}, but its scheduler says {said}; null takes {said}"
        )
    return str(row.prediction or said or "epsilon")


def tokenizer(folder: Path, name: str) -> CLIPTokenizer:
    """The tokenizer in `<folder>/<name>`. transformers makes one of three tokens where it finds no file."""
    place = folder / name
    if not any((place / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{place}: no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    try:
        return CLIPTokenizer.from_pretrained(place)
    except Exception as error:  # the reader of tokenizer.json raises nothing more exact
        raise CheckpointError(f"{place}: tokenizer does not load: {' '.join(str(error).split())[:160]}") from None


def longer(tokens: CLIPTokenizer, texts: Iterable[str], limit: int) -> Iterator[tuple[str, int]]:
    """The texts of more tokens than the limit, each with its number of tokens, begin and end among them."""
    # No token of ASCII is less than a letter, so a short text need not be cut into tokens: of millions most are short.
    doubtful = (text for text in texts if not (text.isascii() and len(text) + 2 <= limit))
    while batch := list(islice(doubtful, 4096)):
        counted = zip(batch, map(len, tokens(batch).input_ids), strict=True)
        yield from ((text, count) for text, count in counted if count > limit)


def component(folder: Path, kind: Any, name: str, dtype: torch.dtype) -> Any:
    """`kind.from_pretrained`, refusing weights that do not fill the model exactly; name "" is the folder itself."""
    place = folder / name
    options: dict[str, Any] = {"subfolder": name} if name else {}
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
