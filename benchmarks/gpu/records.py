"""The results on disk: a JSON file per device and measurement, with an entry per case, written after each case."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd.errors import DataError
from dsd.store import digest, file_digest, write_json

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "diffusers", "transformers")
WHOLE = "all"  # the entry of a measurement that cannot be made
CODE = ("dsd", "benchmarks/gpu")  # the folders whose code is measured, or measures

Result = dict[str, Any]


class Skipped(Exception):
    """A case that cannot be measured here; its message is the reason."""


@dataclass(frozen=True)
class Case:
    """One entry of a measurement.

    setting: what the result depends on besides the device, the libraries and the code.
    seconds: how long it takes on an H100, without opening `model`, a name of PUBLISHED.
    """

    name: str
    setting: Mapping[str, Any]
    seconds: float
    measure: Callable[[Bench], Result]
    model: str | None = None


def code_digest() -> str:
    """Return the digest of the code that is measured."""
    files = sorted(file for folder in CODE for file in (ROOT / folder).rglob("*.py"))
    return digest({file.relative_to(ROOT).as_posix(): file_digest(file) for file in files})


class Records:
    """The files `<folder>/<device>/<measurement>.json`."""

    def __init__(self, folder: Path, device: Mapping[str, Any]) -> None:
        """device: as `Machine.describe` returns it."""
        slug = re.sub(r"[^a-z0-9]+", "-", str(device["name"]).lower()).strip("-")
        self.folder, self._device = folder / slug, dict(device)
        self._libraries = {name: version(name) for name in LIBRARIES}
        self._code = code_digest()  # recorded, but no part of the key: a repaired case must not cost all others again

    def entries(self, measurement: str) -> dict[str, Any]:
        """Read the entries of a measurement by name of the case; raise DataError if the file is damaged."""
        path = self._path(measurement)
        return read(path)["cases"] if path.exists() else {}

    def has(self, measurement: str, case: Case) -> bool:
        """Return whether there is a result of this case: of this setting, device and libraries."""
        entry = self.entries(measurement).get(case.name, {})
        return "result" in entry and entry["key"] == self._key(case)

    def add(self, measurement: str, case: Case, outcome: str, content: object, seconds: float) -> None:
        """Write the entry of a case, which took some seconds.

        Args:
            outcome: "result", or "skipped" or "failed" with one line as content. Neither replaces an earlier result.
        """
        entries = self.entries(measurement)
        if outcome != "result" and "result" in entries.get(case.name, {}):
            return
        if case.name != WHOLE:
            entries.pop(WHOLE, None)
        entries[case.name] = {
            "key": self._key(case),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "libraries": self._libraries,
            "code": self._code,
            "setting": dict(case.setting),
            outcome: content,
        }
        write_json(self._path(measurement), {"measurement": measurement, "device": self._device, "cases": entries})

    def _key(self, case: Case) -> str:
        return digest(self._device["name"], self._libraries, case.setting)

    def _path(self, measurement: str) -> Path:
        return self.folder / f"{measurement}.json"


def read(path: Path) -> dict[str, Any]:
    """Read the file of a measurement; raise DataError if it is none."""
    try:
        content = json.loads(path.read_text())
        if not {"measurement", "device", "cases"} <= set(content):
            raise ValueError("not the results of a measurement")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: {error}; remove the file, and its cases are measured again") from None
    return dict(content)
