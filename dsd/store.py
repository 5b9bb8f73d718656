"""A store keyed by inputs: atomic writes, checksummed reads, resumable.

A shard is one safetensors file of named arrays under a key; the key is a digest of everything that the arrays
were computed from, so a shard is never stale: another input has another key. Its manifest is removed before
the file is replaced and written after it, so a manifest's existence means that the shard is complete.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from dsd.errors import DsdError

log = logging.getLogger(__name__)

# The dtypes of numpy; it has no bfloat16, which float32 represents exactly.
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES = ("bool", *INTEGERS, "float16", "float32", "float64")
LIBRARIES = ("torch", "diffusers", "transformers")  # whose versions can change results
KEY = re.compile(r"[A-Za-z0-9._-]+")
PLAIN = {str, int, float, bool, type(None)}
RECOMPUTE = "dsd reproduce --recompute"
ATTEMPTS = 20
_BACKOFF = random.SystemRandom()  # independent of seeded generators, different in forked workers


def digest(*parts: object) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 of the parts as canonical JSON.

    Dictionaries are sorted, floats are written by repr, tuples equal lists, dataclasses and pydantic models
    count as their fields. 1, 1.0 and True differ.

    Raises:
        TypeError: a path (use `file_digest`), or anything else that JSON cannot represent.
    """
    text = json.dumps(_plain(parts), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(part: Any) -> Any:
    if type(part) in PLAIN:
        return part
    if isinstance(part, PurePath):
        raise TypeError(f"{part} is a path: use its file_digest")
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return _plain({field.name: getattr(part, field.name) for field in dataclasses.fields(part)})
    if hasattr(part, "model_dump"):
        return _plain(part.model_dump())
    if isinstance(part, Mapping):
        if not all(isinstance(name, str) for name in part):
            raise TypeError(f"a digest needs dictionaries with string keys, not {list(part)}")
        return {name: _plain(value) for name, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [_plain(value) for value in part]
    return part.item() if isinstance(part, np.generic) else part


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def libraries() -> dict[str, str]:
    """Return the installed minor version of each library, such as {"torch": "2.13"}; patch releases keep results."""
    return {name: ".".join(version(name).split(".")[:2]) for name in LIBRARIES}


def check_libraries(place: Path, recorded: Mapping[str, str], remedy: str = RECOMPUTE) -> None:
    """Warn, once per place, if results were computed with other minor versions of the libraries than are installed.

    Results without recorded versions are valid.
    """
    pairs = ((name, recorded.get(name, own), own) for name, own in libraries().items())
    if differing := [f"{name} {used}, not {own}" for name, used, own in pairs if used != own]:
        _warn_once(f"{place}: computed with {' and '.join(differing)}; to recompute: {remedy}")


@cache
def _warn_once(line: str) -> None:
    log.warning(line)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file by new content, completely or not at all; raise DsdError if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        raise DsdError(f"{path.parent}: disk full, {path.name} needs {len(data)} bytes, {free} are free") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object, indent: int = 1) -> None:
    """Replace a file by JSON, see `write_atomic`; dataclasses count as their fields."""
    write_atomic(path, (json.dumps(content, indent=indent, default=dataclasses.asdict) + "\n").encode())


def strict_json(text: str | bytes | bytearray) -> Any:
    """Parse JSON that others have written.

    Raises:
        ValueError: it is not valid, also where Python's parser is lenient: a key given twice, nesting that is too deep,
            and numbers that are NaN, infinite or beyond 64 bits.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite, parse_int=_whole
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(settings := dict(pairs)) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:40]!r} is given twice")
    return settings


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{text[:20]}… has more than 64 bits")
    return int(text)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Replace a file by CSV, see `write_atomic`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


class Store:
    """A folder of shards that several processes may read and write concurrently.

    `corrupt` counts the damaged shards that this object has read.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.corrupt = 0

    def write(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write or replace the shard of a key.

        Raises:
            ValueError: the key is not a plain name, or the dtype of an array is not supported.
            DsdError: the disk is full, or the shard does not read back as written.
        """
        file, manifest = self._file(key), self._manifest(key)
        for name, array in arrays.items():
            if array.dtype.name not in DTYPES:
                raise ValueError(f"{key}: array {name!r} is {array.dtype}, not one of {', '.join(DTYPES)}")
        # save() copies raw memory: an array that is not in C order would be read back shuffled.
        data = save({name: np.asarray(arrays[name], order="C") for name in sorted(arrays)})
        shapes = {name: {"dtype": array.dtype.name, "shape": list(array.shape)} for name, array in arrays.items()}
        sha256 = hashlib.sha256(data).hexdigest()
        description = {"sha256": sha256, "size": len(data), "arrays": shapes, "libraries": libraries()}
        content = json.dumps(description, sort_keys=True, indent=1).encode()
        for attempt in range(ATTEMPTS):
            start = time.monotonic()
            manifest.unlink(missing_ok=True)
            write_atomic(file, data)
            write_atomic(manifest, content)
            # Another writer of this key may have interfered. The last to write is also the last to check, so file and
            # manifest agree when all writers have returned.
            if self._load(key, _bytes(manifest)) is not None:
                return
            time.sleep(_BACKOFF.uniform(0, (time.monotonic() - start) * (attempt + 1)))
        raise DsdError(f"{file}: does not read back as written, tried {ATTEMPTS} times")

    def read(self, key: str) -> dict[str, NDArray[Any]] | None:
        """Return all arrays of a shard, checked against its manifest, or None if it is absent.

        A damaged shard is logged, counted, renamed to `<key>.corrupt` and treated as absent, so that the caller
        recomputes it.
        """
        manifest = self._manifest(key)
        content = _bytes(manifest)
        if content is None:
            return None
        arrays = self._load(key, content)
        # If the manifest has changed since, another process is writing; that is no damage.
        if arrays is None and _bytes(manifest) == content:
            log.warning("%s does not match its manifest: renamed to .corrupt, to be recomputed", self._file(key))
            self.corrupt += 1
            manifest.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._file(key), self.root / f"{key}.corrupt")
        if arrays is not None:
            check_libraries(self.root, json.loads(content).get("libraries", {}))
        return arrays

    def __contains__(self, key: str) -> bool:
        """Return whether the shard is complete: it has a manifest and a file of the right size."""
        try:
            size = json.loads(self._manifest(key).read_bytes())["size"]
            return bool(self._file(key).stat().st_size == size)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def prune(self, keep: set[str]) -> int:
        """Remove every shard that is not in `keep`, temporary files and damaged shards; return the number of shards.

        No other process may write at the same time.
        """
        removed = 0
        for file in self.root.glob("*.safetensors"):
            complete = file.stem in self
            if file.stem not in keep or not complete:
                self._manifest(file.stem).unlink(missing_ok=True)
                file.unlink()
                removed += complete
        for pattern in (".*.tmp", "*.corrupt"):
            for file in self.root.glob(pattern):
                file.unlink()
        return removed

    def _load(self, key: str, manifest: bytes | None) -> dict[str, NDArray[Any]] | None:
        """Return the arrays of a shard, or None unless its file exists and matches the manifest."""
        data = _bytes(self._file(key))
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a manifest that is itself damaged
            if data and manifest and hashlib.sha256(data).hexdigest() == json.loads(manifest)["sha256"]:
                return load(data)
        return None

    def _file(self, key: str) -> Path:
        return self.root / f"{_checked(key)}.safetensors"

    def _manifest(self, key: str) -> Path:
        return self.root / f"{_checked(key)}.json"


def _checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise ValueError(f"key {key!r} may hold letters, digits, '.', '_' and '-' only")
    return key


def _bytes(path: Path) -> bytes | None:
    """Return a file's content, or None if it does not exist (checking first would race with other processes)."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
