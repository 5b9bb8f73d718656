"""Locate checkpoints and open their components.

Every defect raises CheckpointError, with one line that names the place and the component.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import filter_repo_objects

from dsd.config import BackboneParams
from dsd.config.models import PICKLES
from dsd.data.hub import hub_errors
from dsd.errors import CheckpointError, brief
from dsd.models.settings import component_settings, read_settings
from dsd.models.weights import check_finite, check_stored, unexpected
from dsd.store import digest, file_digest

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

log = logging.getLogger(__name__)

# The files that are read, and so digested. A repository may also hold model cards, images, and gigabytes of the same
# weights in other layouts and precisions.
PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
SETTINGS = (
    *("config.json", "merges.txt", "model_index.json", "preprocessor_config.json", "processor_config.json"),
    "special_tokens_map.json",
    *("tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *(f"{part}/*{suffix}" for part in PARTS for suffix in (".json", ".txt")),
)
WEIGHTS = ("model.safetensors*", "model-*.safetensors", *(f"{part}/*.safetensors" for part in PARTS))
# The files of open_clip's layout; a repository may also hold the same model in the layout of transformers.
OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
OPEN_CLIP = (
    *(OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS),
    *("merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
)
# Copies of the weights that are read only where there are no others, in this order.
VARIANTS = {name: f"*.{name}*.safetensors*" for name in ("fp16", "bf16", "non_ema")}
SHORTEST = 3  # a text in tokens: begin, one, end
OLD_END = 2  # eos_token_id in configs of CLIPs of before transformers 4.31
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(name: str) -> torch.device:
    """Return the device of a name: auto (CUDA if it is available, else the CPU), cpu, cuda, cuda:N or mps.

    Raises:
        CheckpointError: there is no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?|mps", name):
        raise CheckpointError(f"device {name!r}: must be auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if (device.index or 0) >= count:
        raise CheckpointError(f"device {name}: torch has {count or 'no'} {device.type.upper()} device; use auto or cpu")
    return device


def one_file(row: BackboneParams) -> Path | None:
    """Return the path of a single-file checkpoint, or None for a folder."""
    path = Path(row.source)
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path}: a pickle, which is never opened; convert it to .safetensors")
    if path.suffix != ".safetensors":
        if row.config is not None:
            config = row.config
            raise CheckpointError(f"{row.source}: config is for one file .safetensors; set it to null, not {config}")
        return None
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise CheckpointError(f"{brief(path)}: no such file")
    if row.config is None:
        raise CheckpointError(f"{path}: one file needs config: a folder or hub id of the same architecture")
    return path


def folder_of(row: BackboneParams) -> Path:
    """Return the checkpoint's folder (for a single file, the folder of its settings), downloaded if necessary.

    A downloaded folder is named by its commit.
    """
    source, patterns = _source_and_patterns(row)
    if _is_local(source):
        return Path(source)
    options: dict[str, Any] = {"revision": row.revision, "allow_patterns": patterns}
    with hub_errors(source, row.revision, error=CheckpointError):
        folder = Path(snapshot_download(source, ignore_patterns=list(VARIANTS.values()), **options))
        parts = [part for part in PARTS if (folder / part / "config.json").exists()]
        bare = [part for part in parts if not list(folder.glob(f"{part}/*.safetensors"))]
        if bare and one_file(row) is None:
            options["allow_patterns"] = [f"{part}/*.safetensors*" for part in bare]  # their variants, all there is
            return Path(snapshot_download(source, **options))
        return folder


def variant_of(names: Iterable[str]) -> str | None:
    """Return the variant to read of the weights of one component, by their file names; None if there are plain ones."""
    files = [name for name in names if ".safetensors" in name]
    if not files or any(not any(fnmatch(name, pattern) for pattern in VARIANTS.values()) for name in files):
        return None
    return next(variant for variant, pattern in VARIANTS.items() if any(fnmatch(name, pattern) for name in files))


def identify(row: BackboneParams) -> str:
    """Return the digest of a checkpoint, see `locate`."""
    return locate(row)[1]


def locate(row: BackboneParams) -> tuple[Path, str]:
    """Return the checkpoint's folder (see `folder_of`) and its digest, which must equal the row's digest if it has one.

    The digest covers the files of a local checkpoint, or the id and commit of one on the hub, and the row's LoRA and
    prediction if they are set.
    """
    folder, (source, patterns) = folder_of(row), _source_and_patterns(row)
    if _is_local(source):
        names = {file.relative_to(folder).as_posix() for pattern in patterns for file in folder.glob(pattern)}
        read = _names_read(sorted(name for name in names if (folder / name).is_file()), patterns)
        if not read:
            actual = family_of(folder)
            reason = f"of family {actual}; correct family" if actual else "has none of its files"
            raise CheckpointError(f"{source}: no checkpoint of family {row.family}: {reason}")
        try:
            identity = digest({name: file_digest(folder / name) for name in read})
        except OSError as error:
            raise CheckpointError(f"{source}: cannot be read: {brief(error)}") from None
    else:
        identity = f"{source}@{folder.name}"
    if file := one_file(row):
        identity = digest(file_digest(file), identity)
    if row.lora is not None:
        if not os.path.isfile(row.lora):
            raise CheckpointError(f"{brief(row.lora)}: no such LoRA file")
        identity = digest(identity, file_digest(Path(row.lora)))
    if row.prediction is not None:
        identity = digest(identity, row.prediction)
    # A row may load known files as another family. open_clip has its own files, maybe in the folder of a CLIP.
    if patterns is not OPEN_CLIP and family_of(folder) not in (None, row.family):
        identity = digest(identity, row.family)
    if row.digest not in (None, identity):
        raise CheckpointError(f"{row.source}: is not the checkpoint of digest {row.digest}, but {identity}")
    return folder, identity


def _source_and_patterns(row: BackboneParams) -> tuple[str, tuple[str, ...]]:
    """Return the source of the settings and the patterns of the files that are read there."""
    if one_file(row):
        return str(row.config), SETTINGS
    return row.source, OPEN_CLIP if row.family == "open-clip" else (*SETTINGS, *WEIGHTS)


def _is_local(source: str) -> bool:
    """Return whether the source is a local folder; otherwise it must have the form of a hub id."""
    if os.path.isdir(source):  # Path.is_dir raises for a name that is too long
        return True
    if Path(source).is_absolute() or source.startswith(".") or source.count("/") != 1:
        raise CheckpointError(f"{brief(source)}: no such checkpoint folder")
    if Path(source).parts[0] == "models":
        remedy = "the stage `pretrain` makes the embedded ones"
        raise CheckpointError(f"{brief(source)}: no such checkpoint folder; {remedy}")
    return False


def _names_read(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the files that are read: those of the patterns; variants of weights only where there are no others."""
    allowed = list(filter_repo_objects(names, allow_patterns=list(patterns)))
    by_folder: dict[str, list[str]] = {}
    for name in allowed:
        by_folder.setdefault(name.rpartition("/")[0], []).append(name)
    read = {folder: VARIANTS.get(variant_of(files) or "") for folder, files in by_folder.items()}

    def is_read(name: str) -> bool:
        variants = [pattern for pattern in VARIANTS.values() if fnmatch(name, pattern)]
        return not variants or read[name.rpartition("/")[0]] in variants

    return [name for name in allowed if is_read(name)]


def remote(row: BackboneParams) -> int:
    """Return the bytes to download from the hub if nothing is cached; 0 for a local checkpoint."""
    source, patterns = _source_and_patterns(row)
    if _is_local(source):
        return 0
    with hub_errors(source, row.revision, error=CheckpointError):
        info = HfApi().model_info(source, revision=row.revision, files_metadata=True)
        if info.gated:  # its file list is public, its files are not
            HfApi().auth_check(source)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    files = _names_read(sizes, patterns)
    if not one_file(row) and not any(file.endswith(".safetensors") for file in files):
        raise CheckpointError(
            f"{source}: has no weights in safetensors for family {row.family}; pickles are not opened"
        )
    return sum(sizes[file] for file in files)


def commit(row: BackboneParams) -> str | None:
    """Return the current commit of a row's source on the hub, or None for a local source."""
    source, _ = _source_and_patterns(row)
    if _is_local(source):
        return None
    with hub_errors(source, None, error=CheckpointError):
        return str(HfApi().model_info(source).sha)


def component_config(row: BackboneParams, component: str) -> dict[str, Any]:
    """Read the configuration of a component, without its weights."""
    source, _ = _source_and_patterns(row)
    name = f"{component}/config.json"
    if _is_local(source):
        path = Path(source) / name
    else:
        with hub_errors(source, row.revision, error=CheckpointError):
            path = Path(hf_hub_download(source, name, revision=row.revision))
    return read_settings(path)


def family_of(folder: Path) -> str | None:
    """Return the family that the folder's files imply, or None if they imply none."""
    if (folder / "unet").is_dir():
        return "stable-diffusion-xl" if (folder / "text_encoder_2").is_dir() else "stable-diffusion"
    config = folder / "config.json"
    if config.is_file() and '"vision_config"' in config.read_text(errors="replace"):
        return "clip"
    return "open-clip" if (folder / OPEN_CLIP_CONFIG).is_file() else None


def require(folder: Path, family: str, components: Sequence[str], *, weights: bool = True) -> None:
    """Check that the folder is of this family and has every component, with weights in safetensors."""
    if (actual := family_of(folder)) not in (None, family):
        raise CheckpointError(f"{folder}: of family {actual}, and not {family}; correct family")
    for component in components:
        place = folder / component
        if not place.is_dir():
            raise CheckpointError(f"{folder}: lacks the component {component}/ (needed: {', '.join(components)})")
        if weights and (place / "config.json").exists() and not list(place.glob("*.safetensors")):
            raise CheckpointError(f"{place}: {pickle_note(place) or 'no weights'}")


def pickle_note(folder: Path) -> str:
    """Return what to do about a pickle in a folder that lacks safetensors, "" if there is none."""
    pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
    return f"only {pickles[0]}, a pickle; convert it to safetensors" if pickles else ""


def tokenizer(folder: Path, name: str) -> CLIPTokenizer:
    """Load the tokenizer in `<folder>/<name>`."""
    place = folder / name
    # Without a file, transformers makes a tokenizer of three tokens.
    if not any((place / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{place}: no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    _check_tokenizer(place)
    from transformers import CLIPTokenizer  # takes seconds

    try:
        tokens = CLIPTokenizer.from_pretrained(place)
    except Exception as error:  # the reader of tokenizer.json raises nothing more specific
        raise CheckpointError(f"{place}: tokenizer does not load: {brief(error)}") from None
    # CLIPs are trained on texts that start in the first position, whatever the settings for other uses.
    tokens.padding_side = tokens.truncation_side = "right"
    if tokens.pad_token_id is None:
        raise CheckpointError(f"{place}: tokenizer has no pad_token")
    if type(tokens.model_max_length) is not int or tokens.model_max_length < SHORTEST:
        problem = f"model_max_length {tokens.model_max_length!r}: must be a whole number from {SHORTEST}"
        raise CheckpointError(f"{place}: {problem}, for a token between begin and end")
    return tokens


def _check_tokenizer(place: Path) -> None:
    """Check that the files in `place` are of a CLIP's tokenizer, as which transformers reads any vocabulary."""
    file = place / "tokenizer_config.json"
    kind = read_settings(file).get("tokenizer_class") if file.is_file() else None
    if kind not in (None, "CLIPTokenizer", "CLIPTokenizerFast"):
        raise CheckpointError(f"{file}: tokenizer_class {kind!r}: only CLIPTokenizer is supported")
    file = place / "tokenizer.json"
    model = read_settings(file).get("model") if file.is_file() else {}
    kind = model.get("type", "BPE") if isinstance(model, dict) else model  # the oldest files do not name it
    if kind != "BPE":
        raise CheckpointError(f"{file}: model.type {kind!r}: that of a CLIP is BPE")


def check_vocabulary(tokens: CLIPTokenizer, size: int, place: Path, encoder: str) -> None:
    """Check that the tokenizer in `place` has no token beyond the `size` embeddings of the text encoder."""
    if (last := max(tokens.get_vocab().values())) >= size:
        raise CheckpointError(f"{place}: has the token {last}, but {encoder} has {size} tokens, from 0")


def check_end(tokens: CLIPTokenizer, end: object, file: Path) -> None:
    """Check `end`, the eos_token_id in `file`: a text is pooled at this token, so it must be the tokenizer's.

    With 2, the value of all older checkpoints, transformers pools at the highest token, which must be the end token.
    """
    own, highest = tokens.eos_token_id, max(tokens.get_vocab().values())
    if type(end) is not int or (own != highest if end == OLD_END else own != end):
        raise CheckpointError(f"{file}: eos_token_id {end!r}: texts must be pooled at {own}, the tokenizer's end token")


def token_ids(tokens: CLIPTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, with begin and end, whatever their number.

    Not verbose: of a text over the limit transformers says that it leads to indexing errors; here it is cut first.
    """
    return [list(ids) for ids in tokens(list(texts), verbose=False).input_ids]


def over_limit(tokens: CLIPTokenizer, texts: Iterable[str], limit: int) -> Iterator[tuple[str, int]]:
    """Yield the texts with more tokens than the limit, and their numbers of tokens including begin and end."""
    # A token of ASCII text is at least one character, so short texts, most of millions, need no tokenizing.
    doubtful = (text for text in texts if not (text.isascii() and len(text) + 2 <= limit))
    while batch := list(islice(doubtful, 4096)):
        counted = zip(batch, map(len, token_ids(tokens, batch)), strict=True)
        yield from ((text, count) for text, count in counted if count > limit)


def component(folder: Path, kind: Any, name: str, dtype: torch.dtype) -> Any:
    """Call `kind.from_pretrained` and check that the weights are those of the settings; name "" is the folder itself.

    Raises:
        CheckpointError: the settings are of another kind, or a weight is missing, unexpected, misshapen, stored in a
            type that is not supported, or not finite.
    """
    place = folder / name
    component_settings(folder, name, kind)
    options: dict[str, Any] = {"subfolder": name} if name else {}
    if kind.__module__.startswith("diffusers"):
        options |= {"torch_dtype": dtype, "low_cpu_mem_usage": False}
    else:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a bar for each component would hide those of the stages
        options |= {"dtype": dtype, "ignore_mismatched_sizes": True}  # they are refused below
    files = [file.name for file in place.glob("*.safetensors*") if file.is_file()]  # no link without an end
    if variant := variant_of(files):
        log.warning("%s: reads the variant %s, the only weights", place, variant)
        options |= {"variant": variant}
    silence()
    try:
        model, info = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except Exception as error:  # each library has its own family of errors
        raise CheckpointError(f"{place}: does not load as {kind.__name__}: {brief(error, 200)}") from None
    if wrong := [*info.get("mismatched_keys", ()), *info.get("missing_keys", ())]:
        first = wrong[0] if isinstance(wrong[0], str) else "{} {} for {}".format(wrong[0][0], *map(list, wrong[0][1:]))
        raise CheckpointError(f"{place}: {len(wrong)} tensors missing or misshapen, the first {first}")
    if rest := unexpected(info.get("unexpected_keys", ()), kind):
        raise CheckpointError(f"{place}: {len(rest)} tensors are not in the model of config.json, the first {rest[0]}")
    root = "" if not name else f"{name}/"
    for path in _names_read([f"{root}{file}" for file in files if file.endswith(".safetensors")], WEIGHTS):
        check_stored(folder / path)
    check_finite(model, str(place))
    return model.eval().requires_grad_(False)


def silence() -> None:
    """Turn off the libraries' reports on weights and configurations, of many lines: a defect is one line of ours.

    By a filter, because transformers logs more if the level is raised.
    """
    for name in ("diffusers.models.modeling_utils", "transformers.modeling_utils", "transformers.configuration_utils"):
        logging.getLogger(name).addFilter(_drop)


def _drop(record: logging.LogRecord) -> bool:
    return False


@contextmanager
def config_errors(place: Path) -> Iterator[None]:
    """Raise CheckpointError if a configuration does not load."""
    silence()
    try:
        yield
    except Exception as error:  # each library has its own errors for settings that do not fit
        raise CheckpointError(f"{place}/config.json: does not load: {brief(error)}") from None
