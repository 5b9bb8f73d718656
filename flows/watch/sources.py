"""What the sources of `watch` have: each checkpoint with its row of `backbones` and the key of its evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dsd.config import BackboneParams, FolderSource, HubSource, Params
from dsd.errors import CheckpointError, DsdError
from dsd.store import digest, write_atomic
from flows.registry.registry import Version, evaluation_key

HOME = Path(".watch")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # files that are checkpoints too, but `locate` refuses them
NO_DIFFUSION = "no diffusion model in the diffusers layout (there is no unet/)"


@dataclass(frozen=True)
class Checkpoint:
    """One that a source has, and why it cannot be opened ("" if it may be).

    The key is that of its evaluation; of one that cannot be opened it is made of its files' names, sizes and times.
    """

    name: str
    row: BackboneParams
    key: str
    problem: str = ""


def checkpoints(params: Params, versions: Sequence[Version], unseen: dict[str, str]) -> list[Checkpoint]:
    """Those of all sources, each key once; a source that cannot be looked at gets a line in `unseen`."""
    found: dict[str, Checkpoint] = {}
    for name, source in params.watch.sources.items():
        try:
            if isinstance(source, FolderSource):
                there: Iterable[Checkpoint] = _in_folder(params, source)
            elif isinstance(source, HubSource):
                there = [_on_hub(params, source)]
            else:
                there = _registered(params, versions)
            for checkpoint in there:
                found.setdefault(checkpoint.key, checkpoint)
        except DsdError as error:
            unseen[name] = str(error)
    return list(found.values())


def _in_folder(params: Params, source: FolderSource) -> Iterator[Checkpoint]:
    """Every checkpoint of a folder, which need not be there.

    Raises:
        CheckpointError: when all others are told, that the hub does not give the config of a file.
    """
    known, missing = _Digests(HOME / f"{digest(source)}.json"), None
    for path in sorted(Path(source.path).resolve().glob("[!.]*")):
        row = _row(params, source=str(path), family="stable-diffusion")
        if path.suffix in (".safetensors", *PICKLES):
            row = row.model_copy(update={"config": local(source.config), "revision": source.revision})
        elif not (path / "unet").is_dir():
            continue
        try:
            found = known.look_up(row)
        except CheckpointError as error:
            missing = error
            continue
        if found.problem:
            yield Checkpoint(path.name, row, signature(row), found.problem)
        else:
            row = row.model_copy(update={"family": found.family, "digest": found.digest})
            yield Checkpoint(path.name, row, evaluation_key(params, found.digest))
    known.save()
    if missing is not None:
        raise missing


def _on_hub(params: Params, source: HubSource) -> Checkpoint:
    """The checkpoint of a repository at the commit that its branch is at now.

    Raises:
        CheckpointError: the repository cannot be had, or has no diffusion model in the diffusers layout.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    place = f"{source.source}@{source.revision}"
    try:
        told = HfApi().model_info(source.source, revision=source.revision)
    except (HFValidationError, HTTPError, OSError) as error:
        raise CheckpointError(f"{place}: the hub does not give it ({' '.join(str(error).split())[:160]})") from None
    parts = {file.rfilename.partition("/")[0] for file in told.siblings or []}
    if "unet" not in parts:
        raise CheckpointError(f"{place}: {NO_DIFFUSION}")
    family = "stable-diffusion-xl" if "text_encoder_2" in parts else "stable-diffusion"
    identity = f"{source.source}@{told.sha}"  # what `locate` says of it
    row = _row(params, source=source.source, revision=told.sha, family=family, digest=identity)
    return Checkpoint(source.source.rpartition("/")[2], row, evaluation_key(params, identity))


def _registered(params: Params, versions: Sequence[Version]) -> Iterator[Checkpoint]:
    """Every checkpoint that was measured, as its newest version has it."""
    for version in {version.digest: version for version in reversed(versions)}.values():
        own = {"dtype": params.backbones[params.backbone].dtype}
        row = version.row.model_copy(
            update={**own, **{key: local(getattr(version.row, key)) for key in ("config", "lora")}}
        )
        yield Checkpoint(version.name, row, evaluation_key(params, version.digest))


def _row(params: Params, **own: Any) -> BackboneParams:
    """The row of a new checkpoint: what describes it is its own, the arithmetic that of `backbone`."""
    described = dict.fromkeys(("revision", "config", "prediction", "lora", "digest"))
    return params.backbones[params.backbone].model_copy(update={**described, **own})


def local(path: str | None) -> str | None:
    """A path of this workspace as one that holds everywhere; what is none stays as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def signature(row: BackboneParams) -> str:
    """A digest of the row, and of the names, sizes and times of its files."""
    files: list[Path] = []
    for place in {Path(row.source), Path(row.config or row.source)}:
        files += (file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    return digest(row, [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files) if f.exists()])


class _Found(NamedTuple):
    """What a checkpoint is, or why it is none."""

    family: str
    digest: str
    problem: str


class _Digests:
    """What was found by `signature`: to read all files of all checkpoints at each tick takes long."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, list[str]] = json.loads(file.read_text()) if file.exists() else {}
        self._seen: dict[str, list[str]] = {}

    def look_up(self, row: BackboneParams) -> _Found:
        """What is at a row's source.

        Raises:
            CheckpointError: the hub does not give its config, which may be the network's fault.
        """
        key = signature(row)
        self._seen[key] = self._known.get(key) or list(self._read(row))
        return _Found(*self._seen[key])

    @staticmethod
    def _read(row: BackboneParams) -> _Found:
        from dsd.models.checkpoint import family_of, locate  # it loads torch

        try:
            folder, identity = locate(row)
        except CheckpointError as error:
            remote = row.config is not None and not Path(row.config).is_dir()
            if remote and Path(row.source).suffix not in PICKLES:
                raise
            return _Found("", "", str(error))
        family = str(family_of(folder))
        known = family in ("stable-diffusion", "stable-diffusion-xl")
        return _Found(family, identity, "" if known else f"{folder}: {NO_DIFFUSION}")

    def save(self) -> None:
        """Keeps what was asked for, and no more."""
        if self._seen != self._known:
            write_atomic(self._file, json.dumps(self._seen, indent=1).encode())
