"""Presets: settings of params.yaml that belong together, in a file of their own."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ruamel.yaml import YAML

from dsd.config import Params, mistake
from dsd.errors import ParamsError, unknown
from dsd.store import write_atomic

PARAMS = Path("params.yaml")
Commits = Callable[[Params], Iterable[tuple[str, str, str]]]


def applied(preset: Path, path: Path = PARAMS, *, commits: Commits | None = None) -> tuple[bytes, Params]:
    """params.yaml with the settings of a preset: its text, which keeps the comments, and what it says.

    A preset maps keys of params.yaml, written as paths (`images.resolution`), to what stands there instead.

    Args:
        commits: what gives rows of a hub that have no revision yet the commit that they are at.

    Raises:
        ParamsError: a preset that cannot be read, a key that is not there, or params that make no sense; one line.
    """
    settings, yaml_ = _read(preset), _as_written()
    content = yaml_.load(path.read_text())
    for key, value in settings.items():
        *parents, last = str(key).split(".")
        node = content
        for part in parents:
            node = _inside(node, part, f"{preset}: {key}")
        _inside(node, last, f"{preset}: {key}")
        node[last] = value
    text, params = _told(yaml_, content, preset)
    if commits is not None:
        for section, name, commit in commits(params):
            content[section][name]["revision"] = commit
        text, params = _told(yaml_, content, preset)
    return text, params


def _told(yaml_: YAML, content: Any, preset: Path) -> tuple[bytes, Params]:
    text = io.StringIO()
    yaml_.dump(content, text)
    try:
        return text.getvalue().encode(), Params.model_validate(yaml.safe_load(text.getvalue()))
    except ValidationError as error:
        raise ParamsError(mistake(error.errors()[0], preset)) from None


def today(params: Params) -> Iterator[tuple[str, str, str]]:
    """Section, row and commit of what the rows of a hub that have no revision are at.

    Raises:
        DsdError: a repository that cannot be had.
    """
    from dsd.data import hub
    from dsd.datasets import benchmark
    from dsd.models import checkpoint

    for name, row in params.backbones.items():
        if row.revision is None and (commit := checkpoint.commit(row)):
            yield "backbones", name, commit
    for name, dataset in params.datasets.items():
        repository = benchmark(dataset.kind).repository(dataset)
        if repository and repository.revision is None and (commit := hub.latest_commit(name, repository)):
            yield "datasets", name, commit


def put(preset: Path, path: Path = PARAMS, *, commits: Commits = today) -> None:
    """Writes the settings of a preset into params.yaml, each repository of a hub pinned to a commit.

    Raises:
        ParamsError: see `applied`; or params.yaml has changes that git does not know, which would be lost.
    """
    text, _ = applied(preset, path, commits=commits)
    if text == path.read_bytes():
        return
    status = subprocess.run(["git", "status", "--porcelain", "--", path.name], cwd=path.parent, capture_output=True)
    if status.stdout:
        raise ParamsError(
            f"{path}: has changes that are not committed and would be lost; commit them or take them back"
        )
    write_atomic(path, text)


def _as_written() -> YAML:
    """A round trip that leaves what it does not change as it is."""
    found = YAML()
    found.width, found.preserve_quotes = 2**16, True
    found.indent(mapping=2, sequence=4, offset=2)
    found.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    return found


def _read(preset: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(preset.read_text())
    except FileNotFoundError:
        there = sorted(str(file) for file in PARAMS.parent.glob("presets/*.yaml"))
        raise ParamsError(unknown("preset", str(preset), there)) from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{preset}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ParamsError(f"{preset}: not a mapping from keys of params.yaml to values")
    return settings


def _inside(node: Any, part: str, where: str) -> Any:
    if not isinstance(node, dict) or part not in node:
        raise ParamsError(f"{where}: {unknown('key', part, list(node) if isinstance(node, dict) else [])}")
    return node[part]
