"""The checkpoints of `watch.sources`, each with its row of `backbones` and the key of its evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from dsd.config import BackboneParams, FolderSource, HubSource, Params
from dsd.config.models import PICKLES
from dsd.errors import CheckpointError, DsdError, brief
from dsd.store import digest, write_json
from flows import absolute
from flows.registry.registry import Version, evaluation_key

HOME = Path(".watch")
NO_DIFFUSION = "no diffusion model in the diffusers layout (no unet/)"
Key = Callable[[str], str]  # the evaluation key of a checkpoint's digest


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a source; `problem` is why it cannot be opened, or "".

    key: of its evaluation; of a checkpoint that cannot be opened, its `signature`.
    own: whether it is the backbone of the workspace.
    """

    name: str
    row: BackboneParams
    key: str
    problem: str = ""
    own: bool = False


def own_backbone(params: Params) -> Checkpoint:
    """The backbone of the workspace. Raises CheckpointError if it is not available."""
    from dsd.models.checkpoint import identify  # it imports torch

    row = params.backbones[params.backbone]
    identity = identify(row)
    row = row.model_copy(update={"digest": identity})
    return Checkpoint(params.backbone, row, evaluation_key(params, identity), own=True)


def checkpoints(params: Params, versions: Sequence[Version], errors: dict[str, str]) -> list[Checkpoint]:
    """The checkpoints of all sources, one per key; `errors` gets a line for each source that cannot be read."""
    tested, key = params.backbones[params.backbone], partial(evaluation_key, params)
    by_key: dict[str, Checkpoint] = {}
    for name, source in params.watch.sources.items():
        try:
            listed: Iterable[Checkpoint]
            if source.kind == "folder":
                listed = _in_folder(cast(FolderSource, source), tested, key)
            elif source.kind == "hub":
                listed = [_on_hub(cast(HubSource, source), tested, key)]
            else:
                listed = _registered(versions, tested, key)
            for checkpoint in listed:
                by_key.setdefault(checkpoint.key, checkpoint)
        except DsdError as error:
            errors[name] = str(error)
    return list(by_key.values())


def _in_folder(source: FolderSource, tested: BackboneParams, key: Key) -> Iterator[Checkpoint]:
    """The checkpoints of a folder, which may not exist; at the end raise the error of a config on the hub."""
    file, missing = HOME / f"{digest(source)}.json", None
    # A cache by `signature`: reading all files of all checkpoints at each tick would be slow.
    stored: dict[str, list[str]] = json.loads(file.read_text()) if file.exists() else {}
    used: dict[str, list[str]] = {}
    for path in sorted(Path(source.path).resolve().glob("[!.]*")):
        row = _row(tested, source=str(path), family="stable-diffusion")
        if path.suffix in (".safetensors", *PICKLES):
            row = absolute(row.model_copy(update={"config": source.config, "revision": source.revision}))
        elif not (path / "unet").is_dir():
            continue
        signed = signature(row)
        try:
            family, identity, problem = used[signed] = stored.get(signed) or _identify(row)
        except CheckpointError as error:
            missing = error
            continue
        if problem:
            yield Checkpoint(path.name, row, signed, problem)
        else:
            row = row.model_copy(update={"family": family, "digest": identity})
            yield Checkpoint(path.name, row, key(identity))
    if used != stored:
        write_json(file, used)
    if missing is not None:
        raise missing


def _identify(row: BackboneParams) -> list[str]:
    """The family and the digest of a checkpoint, and why it cannot be opened ("" if it can).

    Raise CheckpointError if the hub does not return its config, since that may be a network error.
    """
    from dsd.models.checkpoint import family_of, folder_of, identify  # it imports torch

    try:
        folder = folder_of(row)
        family = family_of(folder)
        if family not in ("stable-diffusion", "stable-diffusion-xl"):
            return ["", "", f"{folder}: {NO_DIFFUSION}"]
        return [family, identify(row.model_copy(update={"family": family})), ""]
    except CheckpointError as error:
        remote = row.config is not None and not Path(row.config).is_dir()
        if remote and Path(row.source).suffix not in PICKLES:
            raise
        return ["", "", str(error)]


def _on_hub(source: HubSource, tested: BackboneParams, key: Key) -> Checkpoint:
    """The checkpoint of a repository at the current commit of its branch."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    place = f"{source.source}@{source.revision}"
    try:
        info = HfApi().model_info(source.source, revision=source.revision)
    except (HFValidationError, HTTPError, OSError) as error:
        raise CheckpointError(f"{place}: not available on the hub ({brief(error)})") from None
    parts = {file.rfilename.partition("/")[0] for file in info.siblings or []}
    if "unet" not in parts:
        raise CheckpointError(f"{place}: {NO_DIFFUSION}")
    family = "stable-diffusion-xl" if "text_encoder_2" in parts else "stable-diffusion"
    identity = f"{source.source}@{info.sha}"  # the digest that `locate` returns for it
    row = _row(tested, source=source.source, revision=info.sha, family=family, digest=identity)
    return Checkpoint(source.source.rpartition("/")[2], row, key(identity))


def _registered(versions: Sequence[Version], tested: BackboneParams, key: Key) -> Iterator[Checkpoint]:
    """Every registered checkpoint, in its newest version."""
    for version in {version.digest: version for version in reversed(versions)}.values():
        row = absolute(version.row).model_copy(update={"dtype": tested.dtype})
        yield Checkpoint(version.name, row, key(version.digest))


def _row(tested: BackboneParams, **own: Any) -> BackboneParams:
    """The row of a new checkpoint, with the dtype of the backbone under test."""
    described = dict.fromkeys(("revision", "config", "prediction", "lora", "digest"))
    return tested.model_copy(update={**described, **own})


def signature(row: BackboneParams) -> str:
    """A digest of the row, and of the names, sizes and modification times of its files."""
    files: list[Path] = []
    for place in {Path(row.source), Path(row.config or row.source)}:
        files += (file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    return digest(row, [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files) if f.exists()])
