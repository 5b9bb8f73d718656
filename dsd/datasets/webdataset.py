"""Read WebDataset tars: a member's name up to the first dot is the key of its sample, the rest names the part.

Members are read one by one into memory and never unpacked to disk. Compressed tars are refused, so none can expand.
"""

from __future__ import annotations

import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from dsd.data.hub import Location, Repository
from dsd.datasets.published import Content
from dsd.errors import DataError, ImageError, brief

IMAGE_PARTS = ("webp", "jpg", "jpeg", "png")
LARGEST = 64 * 2**20  # bytes of a member


class Member(NamedTuple):
    key: str
    part: str
    info: tarfile.TarInfo


def read_labels(repository: Repository, file: str) -> dict[str, int]:
    """Read the number in `<key>.cls` of each sample, by key.

    Raises:
        DataError: the file is not a tar, or a sample has no image or not exactly one number.
    """
    labels: dict[str, int] = {}
    with_image: set[str] = set()
    where = repository.root / file
    with _open(repository, file) as tar:
        for member in _members(repository, file, tar):
            if member.part == "cls":
                text = _read(tar, member).strip()
                if not text.isdigit() or member.key in labels:
                    raise DataError(f"{where}: {member.info.name}: must be one number per sample, found {text[:20]!r}")
                labels[member.key] = int(text)
            elif member.part in IMAGE_PARTS:
                with_image.add(member.key)
    for key in sorted(with_image ^ set(labels)):
        raise DataError(f"{where}: sample {key!r} has no {'.cls' if key in with_image else 'image'}")
    return labels


def read_images(repository: Repository, wanted: Mapping[Location, str]) -> Iterator[tuple[str, Content]]:
    """Yield (name, content) of the image at each location, tar by tar."""
    files: dict[str, dict[str, str]] = defaultdict(dict)
    for location, name in wanted.items():
        files[location.file][str(location.row)] = name
    for file, names in sorted(files.items()):
        with _open(repository, file) as tar:
            for member in _members(repository, file, tar):
                if member.key in names and member.part in IMAGE_PARTS:
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
def _open(repository: Repository, file: str) -> Iterator[tarfile.TarFile]:
    path = repository.root / file
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not readable as a tar: {brief(error, 200)}") from None
