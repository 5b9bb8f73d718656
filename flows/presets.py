"""Presets: files of settings that belong together, applied to the params files."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ruamel.yaml import YAML

from dsd.config import Params, RepositoryDataset, assign, files, merged, mistake, parsed, read
from dsd.errors import ParamsError, unknown
from dsd.store import write_atomic
from flows.command import command

Commits = Callable[[Params], Iterable[tuple[str, str, str]]]


def applied(preset: Path, *, commits: Commits | None = None) -> tuple[dict[Path, bytes], Params]:
    """Return the text of each params file with a preset applied, comments kept, and the resulting params.

    A preset maps keys, written as paths (`images.resolution`), to new values.

    Args:
        commits: finds the current commit of each hub row without a revision.

    Raises:
        ParamsError: the preset cannot be read, a key does not exist, or the params are invalid; one line.
    """
    settings, round_trip = _read(preset), _round_trip()
    read()  # checks that each section is in its file
    contents = {file: round_trip.load(file.read_text()) for file in files()}
    holder = {section: content for content in contents.values() for section in content}
    for key, value in settings.items():
        keys = str(key).split(".")
        assign(holder.get(keys[0], holder), keys, value, f"{preset}: {key}")
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

    Raises:
        ParamsError: see `applied`; or a file to be changed has uncommitted changes, which would be lost.
    """
    from dsd.estimate import check  # it imports torch

    texts, params = applied(preset, commits=commits)
    check(params)
    changed = {file: text for file, text in texts.items() if text != file.read_bytes()}
    for file in changed:
        if command(file.parent, "git", "status", "--porcelain", "--", file.name):
            raise ParamsError(f"{file}: has changes that are not committed and would be lost; commit or revert them")
    _write_all(changed)


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
