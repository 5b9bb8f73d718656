"""Presets: files of settings that belong together, applied to the params files, and the way back."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ruamel.yaml import YAML

from dsd.config import Params, RepositoryDataset, files, merged, mistake, node_at, parsed, read
from dsd.errors import DsdError, ParamsError, unknown
from dsd.store import write_atomic, write_json
from flows import DATA
from flows.reproduce import open_repo, verify_objects

BEFORE, MANIFEST = DATA / "before", "manifest.json"  # states before presets, in folders numbered from 1
Commits = Callable[[Params], Iterable[tuple[str, str, str]]]


def applied(preset: Path, *, commits: Commits | None = None) -> tuple[dict[Path, bytes], Params]:
    """Return the text of each params file with a preset applied, comments kept, and the resulting params.

    A preset maps keys, written as paths (`images.resolution`), to new values. The last key of a path may be new, such
    as the name of a dataset.

    Args:
        commits: finds the current commit of each hub row without a revision.

    Raises:
        ParamsError: the preset cannot be read, a key does not exist, or the params are invalid; one line.
    """
    settings, round_trip = _read(preset), _round_trip()
    read()  # checks that each section is in its file
    contents = {file: round_trip.load(file.read_text(encoding="utf-8")) for file in files()}
    holder = {section: content for content in contents.values() for section in content}
    for key, value in settings.items():
        *parents, last = str(key).split(".")
        section, where = parents[0] if parents else last, f"{preset}: {key}"
        if section not in holder:
            raise ParamsError(f"{where}: {unknown('section', section, holder)}")
        node = node_at(holder[section], parents, where)
        if not isinstance(node, dict):
            raise ParamsError(f"{where}: {unknown('key', last, ())}")
        node[last] = value
    texts, params = _written(round_trip, contents, preset)
    if commits is not None:
        for section, name, commit in commits(params):
            holder[section][section][name]["revision"] = commit
        texts, params = _written(round_trip, contents, preset)
    return texts, params


def _written(round_trip: YAML, contents: Mapping[Path, Any], preset: Path) -> tuple[dict[Path, bytes], Params]:
    texts = {}
    for file, content in contents.items():
        text = io.StringIO()
        round_trip.dump(content, text)
        texts[file] = text.getvalue().encode()
    try:
        sections = merged({file: yaml.safe_load(text) for file, text in texts.items()})
        return texts, Params.model_validate(sections)
    except ValidationError as error:
        raise ParamsError(mistake(error.errors()[0], preset)) from None


def current_commits(params: Params) -> Iterator[tuple[str, str, str]]:
    """Section, row and current commit of each hub row without a revision.

    Raises:
        DsdError: a repository cannot be reached.
    """
    from dsd.data import hub
    from dsd.models import checkpoint

    for name, row in params.backbones.items():
        if row.revision is None and (commit := checkpoint.commit(row)):
            yield "backbones", name, commit
    for name, dataset in params.datasets.items():
        repository = dataset if isinstance(dataset, RepositoryDataset) else None
        if repository and repository.revision is None and (commit := hub.latest_commit(name, repository)):
            yield "datasets", name, commit


def put(preset: Path, *, commits: Commits = current_commits) -> None:
    """Write the settings of a preset into the params files, with each hub repository pinned to a commit.

    The state before is kept for `undo`, unless nothing changes.

    Raises:
        ParamsError: see `applied`, and `dsd.estimate.check`.
    """
    from dsd.estimate import check  # it imports torch

    texts, params = applied(preset, commits=commits)
    check(params)
    changed = {file: text for file, text in texts.items() if text != file.read_bytes()}
    if changed:
        _keep(preset)
        _write_all(changed)


def _state() -> list[Path]:
    """The small files that a reproduction under other params changes; DVC restores the rest from its cache."""
    patterns = ("dvc.lock", "data/evaluate/*.json", "data/timings/*.json")
    return [*files(), *(file for pattern in patterns for file in sorted(Path().glob(pattern)))]


def _outs() -> list[str]:
    """The outputs of DVC's stages that exist here and that its cache keeps, as paths in this workspace."""
    with open_repo() as repo:
        outs = [Path(out.fspath) for out in repo.index.outs if out.use_cache and out.exists]
    return [out.relative_to(Path.cwd()).as_posix() for out in outs]


def _keep(preset: Path) -> None:
    """Copy the current state to a new folder of BEFORE; its manifest, written last, names what there is."""
    outs = _outs()
    folder = BEFORE / f"{len(_kept()) + 1:04d}"
    shutil.rmtree(folder, ignore_errors=True)  # left by a kill: it has no manifest
    kept = [file.as_posix() for file in _state()]
    for file in kept:
        write_atomic(folder / file, Path(file).read_bytes())
    write_json(folder / MANIFEST, {"preset": str(preset), "files": kept, "outs": outs})


def _kept() -> list[Path]:
    """The folders of the states before each preset in force, the newest last."""
    return sorted(manifest.parent for manifest in BEFORE.glob(f"*/{MANIFEST}"))


def undo() -> str:
    """Bring back the params and results from before the last preset; return the preset's name.

    What the preset's complete stages have computed stays in DVC's cache.

    Raises:
        ParamsError: no preset was applied here.
        DsdError: DVC's cache lacks a result; then nothing but the params files, dvc.lock and small files is restored.
    """
    if not _kept():
        raise ParamsError("--undo: no preset was applied in this workspace")
    folder = _kept()[-1]
    manifest = json.loads((folder / MANIFEST).read_text())
    made = _outs()
    new = {file.as_posix() for file in _state()} - {*manifest["files"]}
    _write_all({Path(file): (folder / file).read_bytes() for file in manifest["files"]})
    for file in new:
        Path(file).unlink()
    for out in (Path(out) for out in made if out not in manifest["outs"]):
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    try:
        with open_repo() as repo:
            verify_objects(repo)
            for path in manifest["outs"]:
                for out in repo.find_outs_by_path(path, recursive=False):
                    out.checkout(force=True)
    except DsdError as error:
        raise DsdError(f"--undo: {error}; the params are those of before: run `dsd reproduce`") from None
    shutil.rmtree(folder)
    return str(manifest["preset"])


def _write_all(texts: Mapping[Path, bytes]) -> None:
    """Write all files or none: new content is complete on disk before the first file is replaced."""
    new = {file: file.with_name(f".{file.name}.new") for file in texts}
    try:
        for file, text in texts.items():
            write_atomic(new[file], text)
        for file in texts:
            os.replace(new[file], file)
    finally:
        for temporary in new.values():
            temporary.unlink(missing_ok=True)


def _round_trip() -> YAML:
    """A YAML reader and writer that keeps unchanged content byte for byte."""
    round_trip = YAML()
    round_trip.width, round_trip.preserve_quotes = 2**16, True
    round_trip.indent(mapping=2, sequence=4, offset=2)
    round_trip.representer.add_representer(
        type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return round_trip


def _read(preset: Path) -> dict[str, Any]:
    try:
        settings = parsed(preset)
    except FileNotFoundError:
        choices = sorted(str(file) for file in Path("presets").glob("*.yaml"))
        raise ParamsError(unknown("preset", str(preset), choices)) from None
    if not isinstance(settings, dict):
        raise ParamsError(f"{preset}: not a mapping from keys of params.yaml to values")
    return settings
