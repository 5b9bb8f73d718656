"""Faulty workers, in a module that actors can import."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from dsd.engine import score as scoring
from dsd.errors import DsdError


class Stubborn:
    """A worker with one shard, whose computation is a user error."""

    shards = ("known",)

    def __call__(self, key: str) -> None:
        raise DsdError("model.safetensors: cut short")


class Dies(scoring.Worker):
    """A worker whose process is killed during its first shard, or right after it; its successor survives."""

    def __init__(self, *arguments: Any, marker: Path, when: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._marker, self._when = marker, when

    def __call__(self, key: str) -> None:
        try:
            self._marker.touch(exist_ok=False)
        except FileExistsError:
            return super().__call__(key)
        super().__call__(key)
        if self._when == "within":  # the file is there, its manifest is not
            (self._store.root / f"{key}.json").unlink()
        os.kill(os.getpid(), signal.SIGKILL)


class Deadly(Stubborn):
    def __call__(self, key: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Defective(Stubborn):
    def __call__(self, key: str) -> None:
        raise ZeroDivisionError
