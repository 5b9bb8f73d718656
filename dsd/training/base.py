"""The interface of learners.

Shapes: E examples of a step, I images and T texts of each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from dsd.data.draws import Draw
from dsd.data.examples import Pair
from dsd.engine.session import Session

Table = list[list[Pair]]  # I images × T texts of one example


class Learner(Protocol):
    """What a method learns, its scores, and how it is saved."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def file(self) -> str:
        """The name of the file that `save` writes."""
        ...

    def scores(self, tables: list[Table], draws: list[Draw]) -> Tensor:
        """Return scores [E, I, T], differentiable in the module; higher is better. One draw per example, or none."""
        ...

    def save(self, path: Path) -> None: ...


Build = Callable[[Session, str], Learner]  # session, name of a method → untrained learner
