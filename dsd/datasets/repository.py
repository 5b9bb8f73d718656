"""The files of a dataset's repository on the Hugging Face hub, or of a folder that has the same files.

What is fetched stays in the hub's own cache, which HF_HOME moves; HF_ENDPOINT and HF_TOKEN are heeded. A file that is
there is not fetched again, and where a connection breaks, the next goes on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import filter_repo_objects

from dsd.config import ClassifiedDataset, RefcocogDataset, Vqav2Dataset, WinogroundDataset
from dsd.data.hub import reaching
from dsd.errors import DataError, ParamsError
from dsd.store import file_digest

Row = ClassifiedDataset | RefcocogDataset | Vqav2Dataset | WinogroundDataset
SHOWN = 5  # files that an error lists


class Place(NamedTuple):
    """Where in a repository a picture is: `row` is a row's number, or in a tar a sample's key; a tar has no columns."""

    file: str
    row: int | str
    column: str = ""

    @property
    def path(self) -> str:
        """The place as one path, without the file's suffix: what ids and file names are made of."""
        return "/".join(part for part in (self.file.rpartition(".")[0], str(self.row), self.column) if part)


@dataclass(frozen=True)
class Repository:
    """Files of a dataset that are on this machine, by their paths in the repository, sorted.

    `name` is the dataset's in params.yaml; `train` is None where all splits are taken from `test`.
    """

    name: str
    root: Path
    train: tuple[str, ...] | None
    test: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return (*(self.train or ()), *self.test)


def fetch(name: str, row: Row, *, workers: int, beside: Sequence[str] = ()) -> Repository:
    """The files that `row.files` names, and those `beside` them, fetched where they are not there yet.

    Raises:
        ParamsError: no revision for the hub, one that is no commit, or one for a folder.
        DataError: the hub does not give the repository, or it has not these files.
    """
    patterns = {"train": row.files.train, "test": row.files.test}
    asked = {key: pattern for key, pattern in patterns.items() if pattern is not None}
    options = {"repo_type": "dataset", "revision": row.revision}
    if local := _is_local(name, row):
        root = Path(row.source)
    else:
        with _reaching(name, row):
            wanted = [*asked.values(), *beside]
            root = Path(snapshot_download(row.source, **options, allow_patterns=wanted, max_workers=workers))
    listed = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
    # As the hub's client matches, * stands for slashes too.
    found = {key: tuple(filter_repo_objects(listed, allow_patterns=pattern)) for key, pattern in asked.items()}
    for key, files in found.items():
        if not files:
            with _reaching(name, row):
                there = listed if local else sorted(HfApi().list_repo_files(row.source, **options))
            shown = f"{', '.join(there[:SHOWN]) or 'no files'}{', …' if len(there) > SHOWN else ''}"
            raise DataError(
                f"datasets.{name}.files.{key}: no file of {row.source} matches {asked[key]!r} (there are: {shown})"
            )
    for file in beside:
        if not (root / file).is_file():
            raise DataError(f"datasets.{name}.source: {row.source} has no file {file}, which {row.kind} needs")
    repository = Repository(name, root, found.get("train"), found["test"])
    if not local:
        for file in repository.files:
            _check(root / file, row)
    return repository


def remote(name: str, row: Row, *, beside: Sequence[str] = ()) -> int:
    """How many bytes `fetch` fetches where nothing is there yet; it raises what `fetch` does."""
    if _is_local(name, row):
        return 0
    asked = [pattern for pattern in (row.files.train, row.files.test) if pattern is not None]
    with _reaching(name, row):
        info = HfApi().dataset_info(row.source, revision=row.revision, files_metadata=True)
        if info.gated:  # all may read what there is, and not all what is in it
            HfApi().auth_check(row.source, repo_type="dataset")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return sum(sizes[file] for file in filter_repo_objects(sizes, allow_patterns=[*asked, *beside]))


def commit(name: str, row: Row) -> str | None:
    """The commit that the repository is at today; None of a folder.

    Raises:
        DataError: the hub does not give the repository.
    """
    if Path(row.source).is_dir():
        return None
    with _reaching(name, row):
        return str(HfApi().dataset_info(row.source).sha)


def _is_local(name: str, row: Row) -> bool:
    folder = Path(row.source).is_dir()
    if row.revision is None and not folder:
        raise ParamsError(
            f"datasets.{name}.revision: null, and {row.source} is no folder here; pin it to a commit of the repository"
        )
    if row.revision is not None and folder:
        raise ParamsError(f"datasets.{name}.revision: {row.source} is a folder here, which has none; must be null")
    if row.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", row.revision):
        raise ParamsError(
            f"datasets.{name}.revision: {row.revision!r} is no commit (40 hexadecimal digits): a branch moves unnoticed"
        )
    return folder


def _reaching(name: str, row: Row) -> AbstractContextManager[None]:
    return reaching(row.source, row.revision, kind=DataError, row=f"datasets.{name}", under="datasets/")


def _check(file: Path, row: Row) -> None:
    """The hub names a large file by its SHA-256, and so does the cache that it links to; its client checks the size."""
    if not file.is_symlink():
        return
    blob = file.parent / os.readlink(file)
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and file_digest(file) != blob.name:
        for path in (blob.resolve(), blob, file):
            path.unlink(missing_ok=True)
        raise DataError(f"{file}: not the file that {row.source} has: its SHA-256 differs; removed, so run again")
