"""Dataset repositories on the Hugging Face Hub, and one-line errors for what its client raises.

Files stay in the client's own cache; HF_HOME, HF_ENDPOINT and HF_TOKEN apply. Files in the cache are not fetched again,
and interrupted transfers resume.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from dsd.config import RepositoryDataset
from dsd.data.proxies import check_proxies
from dsd.errors import DataError, DsdError, ParamsError, brief
from dsd.store import file_digest

LOGIN = "log in with `hf auth login` or set HF_TOKEN"
SHOWN = 5  # files that an error lists


class Location(NamedTuple):
    """Position of an image in a repository: row number and column of a Parquet file, or sample key of a tar."""

    file: str
    row: int | str
    column: str = ""

    @property
    def path(self) -> str:
        """The location as one path, without the file's suffix; ids and file names are derived from it."""
        return "/".join(part for part in (self.file.rpartition(".")[0], str(self.row), self.column) if part)


@dataclass(frozen=True)
class Repository:
    """Local files of a dataset repository, as sorted paths relative to `root`.

    `name` is the dataset's name in params.yaml; `train` is None if all splits are taken from `test`.
    """

    name: str
    root: Path
    train: tuple[str, ...] | None
    test: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return (*(self.train or ()), *self.test)


def fetch_repository(name: str, row: RepositoryDataset, *, workers: int, extra: Sequence[str] = ()) -> Repository:
    """Fetch the files that match `row.files`, and the `extra` ones, unless they are in the cache.

    Raises:
        ParamsError: the revision is missing, is not a commit, or is given for a local folder.
        DataError: the repository cannot be fetched or lacks files.
    """
    patterns = _patterns(row)
    options = {"repo_type": "dataset", "revision": row.revision}
    if local := _is_local(name, row):
        root = Path(row.source)
    else:
        with _dataset_errors(name, row):
            allowed = [*patterns.values(), *extra]
            root = Path(snapshot_download(row.source, **options, allow_patterns=allowed, max_workers=workers))
    listed = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
    # Same matching as in the Hub client: * also matches slashes.
    matches = {key: tuple(filter_repo_objects(listed, allow_patterns=pattern)) for key, pattern in patterns.items()}
    for key, files in matches.items():
        if not files:
            with _dataset_errors(name, row):
                available = listed if local else sorted(HfApi().list_repo_files(row.source, **options))
            shown = f"{', '.join(available[:SHOWN]) or 'no files'}{', …' if len(available) > SHOWN else ''}"
            raise DataError(
                f"datasets.{name}.files.{key}: no file of {row.source} matches {patterns[key]!r} (available: {shown})"
            )
    for file in extra:
        if not (root / file).is_file():
            raise DataError(f"datasets.{name}.source: {row.source} has no file {file}, which {row.kind} needs")
    repository = Repository(name, root, matches.get("train"), matches["test"])
    if not local:
        for file in repository.files:
            _check(root / file, row)
    return repository


def repository_size(name: str, row: RepositoryDataset, *, extra: Sequence[str] = ()) -> int:
    """Return the bytes that `fetch_repository` downloads into an empty cache. Raises what it raises."""
    if _is_local(name, row):
        return 0
    with _dataset_errors(name, row):
        info = HfApi().dataset_info(row.source, revision=row.revision, files_metadata=True)
        if info.gated:  # the listing is public even if the files are not
            HfApi().auth_check(row.source, repo_type="dataset")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return sum(sizes[file] for file in filter_repo_objects(sizes, allow_patterns=[*_patterns(row).values(), *extra]))


def latest_commit(name: str, row: RepositoryDataset) -> str | None:
    """Return the current commit of the repository, None for a local folder.

    Raises:
        DataError: the repository is not accessible.
    """
    if Path(row.source).is_dir():
        return None
    with _dataset_errors(name, row):
        return str(HfApi().dataset_info(row.source).sha)


def _patterns(row: RepositoryDataset) -> dict[str, str]:
    patterns = {"train": row.files.train, "test": row.files.test}
    return {key: pattern for key, pattern in patterns.items() if pattern is not None}


def _is_local(name: str, row: RepositoryDataset) -> bool:
    folder, key = Path(row.source).is_dir(), f"datasets.{name}.revision"
    if row.revision is None and not folder:
        raise ParamsError(f"{key}: null, and {row.source} is not a local folder; pin it to a commit of the repository")
    if row.revision is not None and folder:
        raise ParamsError(f"{key}: {row.source} is a local folder, which has no revision; must be null")
    if row.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", row.revision):
        raise ParamsError(f"{key}: {row.revision!r} is not a commit (40 hexadecimal digits); branches can move")
    return folder


def _check(file: Path, row: RepositoryDataset) -> None:
    """Compare a large file with its SHA-256, which is its name in the cache; the client checks only the size."""
    if not file.is_symlink():
        return
    blob = file.parent / os.readlink(file)
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and file_digest(file) != blob.name:
        for path in (blob.resolve(), blob, file):
            path.unlink(missing_ok=True)
        raise DataError(f"{file}: its SHA-256 differs from that in {row.source}; removed, run again to fetch it")


def _dataset_errors(name: str, row: RepositoryDataset) -> AbstractContextManager[None]:
    return hub_errors(row.source, row.revision, error=DataError, row=f"datasets.{name}", prefix="datasets/")


@contextmanager
def hub_errors(
    source: str, revision: str | None, *, error: type[DsdError], row: str = "", prefix: str = ""
) -> Iterator[None]:
    """Translate exceptions of the Hub client, after its own retries, into one-line errors.

    A full disk is raised unchanged: the caller knows which folder needs space.

    Args:
        source: the repository id, at `revision`.
        error: the type to raise.
        row: key of the row of params.yaml that has `source` and `revision`, if known.
        prefix: start of the path of the repository's page: "datasets/" for a dataset.

    Raises:
        DsdError: a proxy of the environment cannot be used.
    """
    check_proxies()
    page = f"{constants.ENDPOINT}/{prefix}{source}"
    subject, pinned = (f"{row}.{key}: {source}" if row else source for key in ("source", "revision"))
    try:
        yield
        return
    except GatedRepoError:
        line = f"{subject} is gated: accept its terms at {page}, then {LOGIN}"
    except RevisionNotFoundError:
        line = f"{pinned} has no commit {revision}; see {page}"
    except HfHubHTTPError as failure:
        if failure.response.status_code == 401 and "authorization" in failure.response.request.headers:
            line = f"{subject}: the hub refuses the token (401): {LOGIN} again, or use no token"
        elif failure.response.status_code == 401 or isinstance(failure, RepositoryNotFoundError):
            gone = "it was removed or renamed, or is private; if it is private"
            line = f"{subject} is neither a folder here nor at {page}: {gone}, {LOGIN}"
        else:
            line = f"{subject}: {_reason(failure)}"
    except HFValidationError:
        line = f"{subject} is neither a folder here nor the id of a repository (owner/name)"
    except LocalEntryNotFoundError as failure:
        line = f"{subject} is neither a folder here nor whole in the cache, and {_reason(failure.__cause__)}"
    except (HTTPError, OSError) as failure:
        if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        line = f"{subject}: {_reason(failure)}"
    raise error(line)


def _reason(failure: BaseException | None) -> str:
    if isinstance(failure, OfflineModeIsEnabled) or failure is None:
        return "HF_HUB_OFFLINE is set: unset it to download the missing files"
    if isinstance(failure, HfHubHTTPError):
        message = brief(failure.server_message or failure)
        return f"the hub answers {failure.response.status_code}: {message}"
    if isinstance(failure, OSError) and failure.errno is not None:
        return str(failure)
    return f"the hub does not answer: {type(failure).__name__}: {brief(failure)}"
