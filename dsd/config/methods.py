"""Rows of `methods`, `schedules` and `training`, and the section `fusion`.

Properties of a row say which evidence and prompt it reads, whether it has a schedule and what it trains, so that no
caller tests its class.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from dsd.config.base import (
    Budget,
    Direction,
    Distinct,
    Fraction,
    Heads,
    Kind,
    Layers,
    Levels,
    ParamsModel,
    Parts,
    Pooling,
    Positive,
    Prompt,
    Reading,
    ToKeep,
    check_known,
    is_unset,
)
from dsd.config.experiments import RacesParams

if TYPE_CHECKING:
    from dsd.config.load import Params

EXHAUSTIVE = "exhaustive"  # the schedule without a row: every pair at every draw of `noise`, all evidence stored
Learned = Literal["attention prompt", "projections", "context"]


class MethodParams(Kind):
    """A row of `methods`; its `scorer` selects the class.

    contrastive: scores are the cosines of a CLIP; reads no diffusion evidence.
    can_have_schedule: the score is a mean over draws, so draws can be scheduled.
    can_be_served: allowed in `serving.method`.
    ablation_keys: the keys of `ablations` that apply to it; one without any is not allowed in `ablations.methods`.
    fits_weights: weights of its features are fitted on the few-shot split (`fusion`).
    compares_unconditional: subtracts the value of the unconditional pass, where an example has several images.
    """

    selector: ClassVar[str] = "scorer"
    package: ClassVar[str] = "dsd.scorers"

    contrastive: ClassVar[bool] = False
    can_have_schedule: ClassVar[bool] = False
    can_be_served: ClassVar[bool] = False
    ablation_keys: ClassVar[tuple[str, ...]] = ()
    fits_weights: ClassVar[bool] = False
    compares_unconditional: ClassVar[bool] = False

    if TYPE_CHECKING:  # fields: `scorer` of each kind, the others of those that are not contrastive

        @property
        def scorer(self) -> str: ...
        @property
        def prompt(self) -> str: ...
        @property
        def levels(self) -> tuple[float, ...]: ...

    @property
    def has_schedule(self) -> bool:
        """Whether its schedule is not exhaustive; then only rankings are stored, no evidence."""
        return False

    @property
    def evidence_prompts(self) -> tuple[str, ...]:
        """The prompts ("none", "few-shot") under which it reads stored evidence."""
        return ()

    def reads_unconditional(self, prompt: str) -> bool:
        """Whether the stored evidence under this prompt must include the unconditional pass of each image."""
        return self.compares_unconditional and prompt in self.evidence_prompts

    @property
    def reads_pooling(self) -> Pooling | None:
        """The pooling of attention that it reads."""
        return None

    @property
    def learns(self) -> Learned | None:
        """What it trains on the few-shot split; one method trains the attention prompt for all (`Params.prompted`)."""
        return None

    @property
    def zero_shot(self) -> bool:
        """Whether it uses nothing learned on the few-shot split."""
        return self.learns is None

    @property
    def own_backbone(self) -> str | None:
        """The row of `backbones` that it uses instead of the diffusion model under test."""
        return None

    def check(self, name: str, params: Params) -> None:
        if self.own_backbone is not None:
            choices = [backbone for backbone, row in params.backbones.items() if row.is_clip]
            check_known(f"methods.{name}.backbone", "CLIP in backbones", self.own_backbone, choices)


class DiffusionMethod(MethodParams):
    """Scored by the diffusion model under test, at these noise levels, with or without the attention prompt."""

    prompt: Prompt
    levels: Levels

    @property
    def evidence_prompts(self) -> tuple[str, ...]:
        return () if self.has_schedule else (self.prompt,)

    @property
    def zero_shot(self) -> bool:
        return self.prompt == "none"

    def check(self, name: str, params: Params) -> None:
        super().check(name, params)
        if not self.has_schedule and not set(self.levels) <= set(params.noise.levels):
            raise ValueError(
                f"methods.{name}.levels: {list(self.levels)} is not among noise.levels {list(params.noise.levels)}"
            )
        if self.reads_pooling not in (None, *params.evidence.poolings):
            raise ValueError(f"methods.{name}.pooling: {self.reads_pooling!r} is not among evidence.poolings")
        if self.prompt == "few-shot" and all(row.learns != "attention prompt" for row in params.methods.values()):
            raise ValueError(
                f"methods.{name}.prompt: few-shot, but no method trains it: one with scorer: cross-attention must"
            )


class ScheduledMethod(DiffusionMethod):
    """A method whose score is a mean over draws, so it may have a schedule and be served."""

    can_have_schedule: ClassVar[bool] = True
    can_be_served: ClassVar[bool] = True

    if TYPE_CHECKING:  # a field of each kind

        @property
        def schedule(self) -> str: ...

    @property
    def has_schedule(self) -> bool:
        return self.schedule != EXHAUSTIVE

    def check(self, name: str, params: Params) -> None:
        super().check(name, params)
        check_known(f"methods.{name}.schedule", "schedule", self.schedule, [EXHAUSTIVE, *params.schedules])
        if self.has_schedule and self.levels != params.races.levels:
            levels = list(params.races.levels)
            raise ValueError(f"methods.{name}.levels: a schedule uses the levels of races, {levels}")


class CrossAttentionMethod(ScheduledMethod):
    ablation_keys: ClassVar[tuple[str, ...]] = ("pooling", "heads", "layers", "levels")

    scorer: Literal["cross-attention"]
    schedule: str
    pooling: Pooling
    layers: Layers
    heads: Heads

    @property
    def reads_pooling(self) -> Pooling | None:
        return self.pooling

    @property
    def learns(self) -> Learned | None:
        return "attention prompt" if self.prompt == "few-shot" else None


class DenoisingMethod(ScheduledMethod):
    compares_unconditional: ClassVar[bool] = True

    scorer: Literal["denoising"]
    schedule: str


class ReleasedMethod(DiffusionMethod):
    """The rule of the first paper's published code; see dsd.scorers.released."""

    compares_unconditional: ClassVar[bool] = True

    scorer: Literal["released"]
    schedule: Literal["exhaustive"]
    denoising: bool

    @property
    def reads_pooling(self) -> Pooling | None:
        return "logits"

    def check(self, name: str, params: Params) -> None:
        if "logits" not in params.evidence.poolings:
            raise ValueError(f"methods.{name}.scorer: released needs 'logits' among evidence.poolings")
        super().check(name, params)


class FusionMethod(DiffusionMethod):
    """A weighted sum of evidence without and with the attention prompt; see dsd.scorers.fusion."""

    ablation_keys: ClassVar[tuple[str, ...]] = ("parts",)
    fits_weights: ClassVar[bool] = True
    compares_unconditional: ClassVar[bool] = True

    scorer: Literal["fusion"]
    prompt: Literal["few-shot"]
    schedule: Literal["exhaustive"]
    pooling: Pooling
    heads: Heads
    parts: Parts

    @property
    def evidence_prompts(self) -> tuple[str, ...]:
        return "none", "few-shot"

    def reads_unconditional(self, prompt: str) -> bool:
        return prompt == "none"

    @property
    def reads_pooling(self) -> Pooling | None:
        return self.pooling


class ContrastiveMethod(MethodParams):
    """Cosines of a CLIP, a row of `backbones`."""

    contrastive: ClassVar[bool] = True

    scorer: Literal["contrastive"]
    backbone: str
    tuned: Literal["none", "projections", "context"]

    @property
    def learns(self) -> Learned | None:
        return None if self.tuned == "none" else self.tuned

    @property
    def own_backbone(self) -> str | None:
        return self.backbone

    @property
    def encodes_pairs(self) -> bool:
        """Whether a text is encoded once for each image, because its context depends on the image."""
        return self.tuned == "context"


class ShortlistParams(ParamsModel):
    """Only the `keep` candidates with the highest scores of a contrastive method, the proposer, enter the schedule."""

    proposer: str
    keep: Positive


class ScheduleParams(Kind):
    """A row of `schedules`; its `kind` selects the class. Its draws are those of `races`.

    proposer_key: the key of `proposed_by`.
    """

    selector: ClassVar[str] = "kind"
    package: ClassVar[str] = "dsd.schedules"
    proposer_key: ClassVar[str] = "proposer"

    budget: Budget | None

    if TYPE_CHECKING:  # fields: `kind` of each kind, `shortlist` of a `ShortlistSchedule`

        @property
        def kind(self) -> str: ...
        @property
        def shortlist(self) -> ShortlistParams | None: ...

    @property
    def proposed_by(self) -> str | None:
        """The contrastive method whose scores the schedule starts from."""
        return None

    def check(self, name: str, params: Params) -> None:
        contrastive = [method for method, row in params.methods.items() if row.contrastive]
        if self.proposed_by is not None:
            check_known(f"schedules.{name}.{self.proposer_key}", "contrastive method", self.proposed_by, contrastive)
        self.check_draws(f"schedules.{name}", params.races)

    def check_draws(self, key: str, races: RacesParams) -> None:
        """Check that the draws of `races` suffice.

        Raises:
            ValueError: they do not; the message starts with the key.
        """


class ShortlistSchedule(ScheduleParams):
    """A schedule that may start from a shortlist."""

    proposer_key: ClassVar[str] = "shortlist.proposer"

    @property
    def proposed_by(self) -> str | None:
        return self.shortlist.proposer if self.shortlist else None


class StagedSchedule(ShortlistSchedule):
    kind: Literal["staged"]
    shortlist: ShortlistParams | None
    to_keep: ToKeep
    n_samples: tuple[Positive, ...]

    def check_draws(self, key: str, races: RacesParams) -> None:
        if len(self.to_keep) != len(self.n_samples):
            raise ValueError(f"{key}.to_keep: must be as long as n_samples")
        if any(b <= a for a, b in pairwise(self.n_samples)):
            raise ValueError(f"{key}.n_samples: must rise from stage to stage, not {list(self.n_samples)}")
        if self.n_samples[-1] > races.draws:
            raise ValueError(f"{key}.n_samples: {self.n_samples[-1]}, but races has {races.draws} draws in all")


class HierarchicalSchedule(ShortlistSchedule):
    kind: Literal["hierarchical"]
    shortlist: ShortlistParams | None
    direction: Direction
    samples: Positive
    beam_factor: Annotated[float, Field(ge=1)]
    patience: Positive
    reading: Reading
    shrinking: bool

    def check_draws(self, key: str, races: RacesParams) -> None:
        if self.samples > races.draws_per_level:
            raise ValueError(
                f"{key}.samples: {self.samples} at each level, but races.draws_per_level is {races.draws_per_level}"
            )


class RacingSchedule(ScheduleParams):
    """Learned by `make races` for methods with the same score, and calibrated for this δ, proposer and budget."""

    kind: Literal["racing"]
    delta: Fraction
    proposer: str | None

    @property
    def proposed_by(self) -> str | None:
        return self.proposer

    def check_draws(self, key: str, races: RacesParams) -> None:
        calibrated = {"delta": races.racing.deltas, "proposer": races.racing.proposer, "budget": races.racing.budget}
        for own, values in calibrated.items():
            if (value := getattr(self, own)) not in values:
                listed = "deltas" if own == "delta" else own
                raise ValueError(f"{key}.{own}: {value} is not calibrated; add it to races.racing.{listed}")


class TrainingParams(ParamsModel):
    """How a method is trained on the few-shot split, for `epochs` passes but at least `least_steps` steps."""

    loss: Literal["softmax", "binary", "hinge"]
    epochs: Annotated[float, Field(gt=0)]
    least_steps: Annotated[int, Field(ge=0)]
    examples_per_step: Positive
    candidates: Annotated[int, Field(ge=2)]
    learning_rate: Annotated[float, Field(gt=0)]
    warmup: Annotated[int, Field(ge=0)]
    temperature: Annotated[float, Field(gt=0)]
    margin: Annotated[float, Field(ge=0)]
    checkpoint_every: Positive
    levels: Levels | None = Field(default=None, exclude_if=is_unset)  # of the noise; unset for a CLIP


class FusionParams(ParamsModel):
    """How the weights of the scorer `fusion` are fitted."""

    examples: Positive
    candidates: Annotated[int, Field(ge=2)]
    folds: Annotated[int, Field(ge=2)]
    penalties: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Distinct]
    denoising: Annotated[float, Field(gt=0)]
    prompt_folds: Annotated[int, Field(ge=2)]
