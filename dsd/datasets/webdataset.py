"""Tars of samples: what stands before the first dot of a member's name is the sample's key, the rest says which part.

They are read member by member, in memory, and never unpacked; nothing is compressed, so nothing can swell.
"""

from __future__ import annotations

import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from dsd.datasets.repository import Place, Repository
from dsd.datasets.selection import Content
from dsd.errors import DataError, ImageError

PICTURES = ("webp", "jpg", "jpeg", "png")
LARGEST = 64 * 2**20  # bytes of a member


class Member(NamedTuple):
    key: str
    part: str
    info: tarfile.TarInfo


def labels(repository: Repository, file: str) -> dict[str, int]:
    """The number in `<key>.cls` of every sample, by key.

    Raises:
        DataError: no tar, or a sample without a picture, without a number, or there twice.
    """
    found: dict[str, int] = {}
    shown: set[str] = set()
    where = repository.root / file
    with _opened(repository, file) as tar:
        for member in _members(repository, file, tar):
            if member.part == "cls":
                text = _read(tar, member).strip()
                if not text.isdigit() or member.key in found:
                    raise DataError(f"{where}: {member.info.name}: must be one number a sample, found {text[:20]!r}")
                found[member.key] = int(text)
            elif member.part in PICTURES:
                shown.add(member.key)
    for key in sorted(shown ^ set(found)):
        raise DataError(f"{where}: sample {key!r} has no {'.cls' if key in shown else 'picture'}")
    return found


def pictures(repository: Repository, wanted: Mapping[Place, str]) -> Iterator[tuple[str, Content]]:
    """(name, content) of the picture of every sample, tar by tar."""
    files: dict[str, dict[str, str]] = defaultdict(dict)
    for place, name in wanted.items():
        files[place.file][str(place.row)] = name
    for file, names in sorted(files.items()):
        with _opened(repository, file) as tar:
            for member in _members(repository, file, tar):
                if member.key in names and member.part in PICTURES:
                    content = _read(tar, member)
                    where = f"{repository.root / file}: {member.info.name}"
                    yield names.pop(member.key), content or ImageError(f"{where}: empty")


def _members(repository: Repository, file: str, tar: tarfile.TarFile) -> Iterator[Member]:
    for info in tar:
        if info.isfile():
            if info.size > LARGEST:
                raise DataError(f"{repository.root / file}: {info.name}: {info.size} bytes, more than {LARGEST}")
            folder, slash, name = info.name.rpartition("/")
            key, _, part = name.partition(".")
            yield Member(f"{folder}{slash}{key}", part.lower(), info)


def _read(tar: tarfile.TarFile, member: Member) -> bytes:
    file = tar.extractfile(member.info)
    return b"" if file is None else file.read()


@contextmanager
def _opened(repository: Repository, file: str) -> Iterator[tarfile.TarFile]:
    path = repository.root / file
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: does not read as a tar: {' '.join(str(error).split())[:200]}") from None
