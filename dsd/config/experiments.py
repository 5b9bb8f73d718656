"""Params of evaluation, ablations, studies, schedule comparisons (races) and the report."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dsd.config.base import (
    Budget,
    Direction,
    Distinct,
    Fraction,
    HeadChoice,
    Layers,
    Levels,
    ParamsModel,
    Parts,
    Pooling,
    Positive,
    Reading,
    Share,
    ToKeep,
)


class EvaluateParams(ParamsModel):
    """The bootstrap: resamples, and confidence of the intervals."""

    resamples: Positive
    confidence: Fraction


class AblationParams(ParamsModel):
    """The ablated methods, and the values that each key takes in turn."""

    methods: tuple[str, ...]
    pooling: tuple[Pooling, ...]
    heads: tuple[HeadChoice, ...]
    layers: tuple[Layers, ...]
    levels: tuple[Levels, ...]
    parts: tuple[Parts, ...]
    subsets: Positive


class StudyParams(ParamsModel):
    """A study trains and scores its methods on its datasets once for each variant, a set of changed keys."""

    split: Literal["validation", "test"]
    datasets: tuple[str, ...]
    methods: tuple[str, ...]
    variants: dict[str, dict[str, bool | int | float | str | None]]

    @staticmethod
    def path_of(key: str, dataset: str) -> list[str]:
        """The path of a key of a variant; one that starts with `dataset.` is of the row of the dataset."""
        first, *rest = key.split(".")
        return ["datasets", dataset, *rest] if first == "dataset" else [first, *rest]


class ExhaustiveSettings(ParamsModel):
    draws: Annotated[tuple[Positive, ...], Distinct]


class StagedSettings(ParamsModel):
    to_keep: tuple[ToKeep, ...]
    first: tuple[Positive, ...]
    growth: tuple[Annotated[int, Field(ge=2)], ...]


class HierarchicalSettings(ParamsModel):
    direction: tuple[Direction, ...]
    samples: tuple[Positive, ...]
    beam_factor: tuple[Annotated[float, Field(ge=1)], ...]
    patience: tuple[Positive, ...]
    reading: tuple[Reading, ...]
    shrinking: tuple[bool, ...]


class PublishedSettings(ParamsModel):
    samples: Positive
    beam_factor: Annotated[float, Field(ge=1)]
    patience: Positive
    shrinking: bool


class RacingSettings(ParamsModel):
    threshold: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Distinct]
    proposer: tuple[str | None, ...]
    rivals: Positive
    learning: Positive
    deltas: tuple[Fraction, ...]
    budget: Annotated[tuple[Budget | None, ...], Distinct]
    confidence: Fraction


class GrowthSettings(ParamsModel):
    candidates: tuple[Annotated[int, Field(ge=2)], ...]
    races: Positive
    delta: Fraction


class RacesParams(ParamsModel):
    """Settings of each schedule to compare, on evidence stored at every draw of these levels."""

    datasets: dict[str, tuple[str, ...]]
    examples: Positive
    levels: Levels
    draws_per_level: Positive
    within: Annotated[tuple[Share, ...], Distinct]
    timed: Positive
    exhaustive: ExhaustiveSettings
    staged: StagedSettings
    hierarchical: HierarchicalSettings
    published: PublishedSettings
    racing: RacingSettings
    growth: GrowthSettings

    @property
    def draws(self) -> int:
        """Draws of each candidate over all levels."""
        return len(self.levels) * self.draws_per_level


class ReportParams(ParamsModel):
    gallery: Positive
