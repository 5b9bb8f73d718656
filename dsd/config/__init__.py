"""A typed, frozen view of params.yaml. No field has a default: a default here would be invisible to DVC."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails

from dsd.errors import ParamsError, unknown

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Part = Literal["attention", "prompted-attention", "denoising", "prompted-denoising"]
Pooling = Literal["logsumexp", "maximum", "cosine", "logits"]
Level = Annotated[float, Field(gt=0, lt=1)]
Template = Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$")]  # {} stands for the name of a class


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _absent(value: object) -> bool:
    """Of a key that few rows have: it stays out of the digests of all others, as it stays out of their rows."""
    return value is None


class RuntimeParams(_Params):
    device: Literal["auto", "cpu", "cuda"]
    attention: str
    batch_size: Positive
    workers: Positive
    kept_texts: Annotated[int, Field(ge=0)]
    executor: Literal["local", "ray"]
    actors: Positive


class BackboneParams(_Params):
    """A row of `backbones`.

    source: a folder, an id on the hub at `revision` (a commit), or one file .safetensors in the original layout.
    config: of such a file, where its configs, tokenizer and scheduler are: a folder, or an id on the hub at `revision`.
    prediction: what the U-Net predicts; where it is not given, what the checkpoint's scheduler says.
    digest: what the checkpoint's digest must be, where it is given; a folder with other files is refused.
    dtype: the arithmetic of the U-Net; images and texts are encoded once, in float32. Of a CLIP, all of its arithmetic.
    """

    family: str
    source: str
    revision: str | None
    config: str | None = Field(default=None, exclude_if=_absent)
    prediction: Literal["epsilon", "v_prediction"] | None = Field(default=None, exclude_if=_absent)
    lora: str | None
    digest: str | None = Field(default=None, exclude_if=_absent)
    dtype: Literal["float32", "bfloat16", "float16"]


class ImageParams(_Params):
    resolution: Positive
    parity: Positive | None
    max_pixels: Positive


class _Dataset(_Params):
    """A row of `datasets`: what it is made of, and how it is split.

    `draws_per_level`, where it is given, stands for that of `noise`: what a draw costs grows with the candidates.
    """

    few_shot: Share
    sample: int
    validation: Share
    draws_per_level: Positive | None = Field(default=None)

    if TYPE_CHECKING:  # a field of each kind

        @property
        def kind(self) -> str: ...


class DrawnDataset(_Dataset):
    """A benchmark of drawn scenes, of which there are `size`: `few_shot` and `validation` are shares of these.

    `candidates`, `binary` and `template` are asked for by the kinds that use them.
    """

    kind: Literal["scenes-com", "scenes-ref", "scenes-vqa", "scenes-cls"]
    size: Positive
    test: Positive
    candidates: Positive | None = Field(default=None)
    binary: Share | None = Field(default=None)
    template: Template | None = Field(default=None)


class PublishedDataset(_Dataset):
    """A benchmark as its publisher gives it: `few_shot` and `validation` are shares of its training examples.

    test: how many examples of its test split are taken, at random by `seed`; null is all of them.
    missing: how many of the pictures that were chosen a run may go on without; with more of them it ends.
    """

    test: Positive | None
    missing: Annotated[int, Field(ge=0)]


class FilesParams(_Params):
    """Which files of a repository hold a split, as a pattern ("data/train-*.parquet").

    Where `train` is null, all splits are taken from the files of `test`, and no two of them share a picture.
    """

    train: str | None
    test: str


class RepositoryDataset(PublishedDataset):
    """A dataset on the hub, `source` at `revision` (a commit); or a folder with the same files, and revision null."""

    source: str
    revision: str | None
    files: FilesParams


class ClassifiedDataset(RepositoryDataset):
    """Pictures of classes; the texts are their names in the template."""

    kind: Literal["cifar10", "stl10", "fgvc-aircraft"]
    template: Template


class RefcocogDataset(RepositoryDataset):
    kind: Literal["refcocog"]
    candidates: Annotated[int, Field(ge=2)]  # expressions to choose from


class Vqav2Dataset(RepositoryDataset):
    kind: Literal["vqav2"]
    answers: Annotated[int, Field(ge=2)]  # the most frequent ones of the training files are the candidates


class WinogroundDataset(RepositoryDataset):
    kind: Literal["winoground"]


class UrlParams(_Params):
    """A file by its address or path; `sha256`, where it is known, is checked."""

    source: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None


class VisualGenomeParams(_Params):
    """The annotations of Visual Genome, from which triplets are mutated; each may be a .zip with the one file in it."""

    relationships: UrlParams
    image_data: UrlParams
    object_aliases: UrlParams
    relationship_aliases: UrlParams


class ComvgDataset(PublishedDataset):
    """The public list of ComVG for testing. Where `annotations` are given, `size` examples of our own mutation of
    Visual Genome, on other pictures, are what `few_shot` and `validation` are shares of.

    images: addresses of a picture, {} stands for its number in the list; the next is tried where one has none.
    """

    kind: Literal["comvg"]
    list: UrlParams
    images: Annotated[tuple[Template, ...], Field(min_length=1)]
    annotations: VisualGenomeParams | None
    size: Positive | None


class VisualGenomeDataset(PublishedDataset):
    """`size` examples of our own mutation of Visual Genome, in the splits that `few_shot`, `validation` and `test`
    ask for; the addresses of pictures are those of its image data."""

    kind: Literal["visual-genome"]
    annotations: VisualGenomeParams
    size: Positive
    test: Positive


class FolderDataset(PublishedDataset):
    """The user's own pictures: `table` is a CSV in the folder `source`; see `dsd.datasets.folder`."""

    kind: Literal["folder"]
    source: str
    table: str


DatasetParams = Annotated[
    DrawnDataset
    | ClassifiedDataset
    | RefcocogDataset
    | Vqav2Dataset
    | WinogroundDataset
    | ComvgDataset
    | VisualGenomeDataset
    | FolderDataset,
    Field(discriminator="kind"),
]


class NoiseParams(_Params):
    levels: tuple[Level, ...]
    draws_per_level: Positive


class EvidenceParams(_Params):
    poolings: tuple[Pooling, ...]
    scale: Annotated[float, Field(gt=0, le=60)]
    normalise: bool
    tokens: Literal["content", "all"]
    shard: Positive


class PromptParams(_Params):
    rank: Positive
    conditional: bool


class ContextParams(_Params):
    tokens: Positive
    hidden: Positive


class TrainingParams(_Params):
    """How a method is trained on the few-shot split; `epochs` count its examples, and a small split has as many steps
    as `least_steps` all the same."""

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


class NoisyTrainingParams(TrainingParams):
    """Of an attention prompt, which sees its examples at noise levels; a CLIP sees no noise."""

    levels: tuple[Level, ...]


def _noisy(row: Any) -> str:
    return "noisy" if ("levels" in row if isinstance(row, dict) else hasattr(row, "levels")) else "plain"


TrainingRow = Annotated[
    Annotated[NoisyTrainingParams, Tag("noisy")] | Annotated[TrainingParams, Tag("plain")], Discriminator(_noisy)
]


EXHAUSTIVE = "exhaustive"  # the schedule that needs no row: every pair at every draw of `noise`, all evidence kept


class _Schedule(_Params):
    """A row of `schedules`. Its draws are those of `races`; `budget` counts evaluations a candidate."""

    budget: Annotated[float, Field(ge=1)] | None


class ShortlistParams(_Params):
    """No candidates are seen but those that a contrastive method puts first, so many of them."""

    proposer: str
    keep: Positive


class StagedSchedule(_Schedule):
    kind: Literal["staged"]
    shortlist: ShortlistParams | None
    to_keep: Annotated[tuple[Positive, ...], Field(min_length=1)]
    n_samples: tuple[Positive, ...]


class HierarchicalSchedule(_Schedule):
    kind: Literal["hierarchical"]
    shortlist: ShortlistParams | None
    direction: Literal["clean", "noisy", "middle"]
    samples: Positive
    beam_factor: Annotated[float, Field(ge=1)]
    patience: Positive
    shrinking: bool


class RacingSchedule(_Schedule):
    """By what `make races` has learned for methods of the same score, and calibrated for this δ."""

    kind: Literal["racing"]
    delta: Annotated[float, Field(gt=0, lt=1)]
    proposer: str | None


ScheduleParams = Annotated[StagedSchedule | HierarchicalSchedule | RacingSchedule, Field(discriminator="kind")]


class _Diffusion(_Params):
    prompt: Literal["none", "few-shot"]
    levels: tuple[Level, ...]


class CrossAttentionMethod(_Diffusion):
    scorer: Literal["cross-attention"]
    schedule: str
    pooling: Pooling
    layers: Literal["all"] | Positive
    heads: Literal["weighted", "mean"]


class DenoisingMethod(_Diffusion):
    scorer: Literal["denoising"]
    schedule: str


class ReleasedMethod(_Diffusion):
    scorer: Literal["released"]
    schedule: Literal["exhaustive"]
    denoising: bool


class FusionMethod(_Diffusion):
    """A weighted sum of evidence without and with the attention prompt; see dsd.scorers.fusion."""

    scorer: Literal["fusion"]
    prompt: Literal["few-shot"]
    schedule: Literal["exhaustive"]
    pooling: Pooling
    heads: Literal["weighted", "mean"]
    parts: tuple[Part, ...]


class ContrastiveMethod(_Params):
    scorer: Literal["contrastive"]
    backbone: str
    tuned: Literal["none", "projections", "context"]


MethodParams = Annotated[
    CrossAttentionMethod | DenoisingMethod | ReleasedMethod | FusionMethod | ContrastiveMethod,
    Field(discriminator="scorer"),
]


class FusionParams(_Params):
    examples: Positive
    candidates: Annotated[int, Field(ge=2)]
    folds: Annotated[int, Field(ge=2)]
    penalties: tuple[Annotated[float, Field(gt=0)], ...]
    denoising: Annotated[float, Field(gt=0)]


class EvaluateParams(_Params):
    resamples: Positive
    confidence: Annotated[float, Field(gt=0, lt=1)]


class AblationParams(_Params):
    """Which methods are taken apart, and the values that each of their keys is given in turn."""

    methods: tuple[str, ...]
    pooling: tuple[Pooling, ...]
    heads: tuple[Literal["weighted", "mean"] | Positive, ...]
    layers: tuple[Literal["all"] | Positive, ...]
    levels: tuple[tuple[Level, ...], ...]
    parts: tuple[tuple[Part, ...], ...]
    subsets: Positive


class StudyParams(_Params):
    """What a study runs: these methods on each dataset, once a variant with the keys that it changes."""

    split: Literal["validation", "test"]
    datasets: tuple[str, ...]
    methods: tuple[str, ...]
    variants: dict[str, dict[str, bool | int | float | str | None]]


class ExhaustiveSettings(_Params):
    draws: tuple[Positive, ...]


class StagedSettings(_Params):
    to_keep: tuple[tuple[Positive, ...], ...]
    first: tuple[Positive, ...]
    growth: tuple[Annotated[int, Field(ge=2)], ...]


class HierarchicalSettings(_Params):
    direction: tuple[Literal["clean", "noisy", "middle"], ...]
    samples: tuple[Positive, ...]
    beam_factor: tuple[Annotated[float, Field(ge=1)], ...]
    patience: tuple[Positive, ...]
    shrinking: tuple[bool, ...]


class PublishedSettings(_Params):
    samples: Positive
    beam_factor: Annotated[float, Field(ge=1)]
    patience: Positive
    shrinking: bool


class RacingSettings(_Params):
    threshold: tuple[Annotated[float, Field(gt=0)], ...]
    proposer: tuple[str | None, ...]
    rivals: Positive
    learning: Annotated[float, Field(gt=0, lt=1)]
    deltas: tuple[Annotated[float, Field(gt=0, lt=1)], ...]
    confidence: Annotated[float, Field(gt=0, lt=1)]


class GrowthSettings(_Params):
    candidates: tuple[Annotated[int, Field(ge=2)], ...]
    races: Positive
    delta: Annotated[float, Field(gt=0, lt=1)]


class RacesParams(_Params):
    """Which schedules are compared, at which settings, on evidence at every draw of these levels."""

    datasets: dict[str, tuple[str, ...]]
    examples: Positive
    levels: tuple[Level, ...]
    draws_per_level: Positive
    within: Share
    timed: Positive
    exhaustive: ExhaustiveSettings
    staged: StagedSettings
    hierarchical: HierarchicalSettings
    published: PublishedSettings
    racing: RacingSettings
    growth: GrowthSettings


class ReportParams(_Params):
    gallery: Positive


class GateRow(_Params):
    """Of a dataset, as fractions of 1: what a challenger must gain, and what it must be shown not to lose more than."""

    minimum_effect: Share
    maximum_regression: Share


class GateParams(_Params):
    """`method`: the one by whose answers checkpoints are compared. Datasets without a row are not compared."""

    method: str
    datasets: dict[str, GateRow]


class Bounds(_Params):
    """What the served model takes, a row of a request being an image and its texts.

    max_bytes: of a request. max_images: of a request. max_texts: of an image.
    max_waiting: requests under way; who comes when there are more is sent away.
    """

    max_pixels: Positive
    max_bytes: Positive
    max_images: Positive
    max_texts: Positive
    max_waiting: Positive
    wait_seconds: Annotated[float, Field(gt=0)]


class ServingParams(Bounds):
    """method: whose scorer and levels; every text is seen at all draws, whatever schedule it was measured under.
    prompt: the dataset whose attention prompt the method has; null where it has none.
    """

    method: str
    prompt: str | None


class FolderSource(_Params):
    """Every checkpoint in a folder: a folder in the diffusers layout each, or one file .safetensors.

    config, revision: of such files, as in a row of `backbones`.
    """

    kind: Literal["folder"]
    path: str
    config: str | None
    revision: str | None


class HubSource(_Params):
    """A repository on the hub, at the commit that `revision`, a branch, is at today."""

    kind: Literal["hub"]
    source: str
    revision: str


class RegisteredSource(_Params):
    """Every checkpoint that was measured before."""

    kind: Literal["registered"]


SourceParams = Annotated[FolderSource | HubSource | RegisteredSource, Field(discriminator="kind")]


class WatchParams(_Params):
    """When to look for checkpoints, where, and how often one that failed is tried in all."""

    cron: Annotated[str, Field(pattern=r"^\S+( \S+){4}$")]  # minute, hour, day of the month, month, day of the week
    attempts: Positive
    sources: dict[str, SourceParams]


class FitParams(_Params):
    steps: Positive
    batch: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    warmup: Positive
    weight_decay: Annotated[float, Field(ge=0)]
    ema: Share


class PretrainParams(_Params):
    seed: int
    size: Positive
    captions: Positive
    resolution: Positive
    parity: Positive
    max_tokens: Positive
    latent_channels: Positive
    autoencoder_channels: tuple[Positive, ...]
    text_width: Positive
    text_layers: Positive
    unet_channels: tuple[Positive, ...]
    unet_transformers: tuple[Positive, ...]
    unet_heads: Positive
    timesteps: tuple[float, float]
    simplicity: float
    clip_width: Positive
    clip_layers: Positive
    clip_patch: Positive
    bfloat16: bool
    autoencoder: FitParams
    diffusion: FitParams
    clip: FitParams


class Params(_Params):
    seed: int
    runtime: RuntimeParams
    backbones: dict[str, BackboneParams]
    backbone: str
    images: ImageParams
    datasets: dict[str, DatasetParams]
    noise: NoiseParams
    evidence: EvidenceParams
    prompt: PromptParams
    context: ContextParams
    training: dict[str, TrainingRow]
    schedules: dict[str, ScheduleParams]
    methods: dict[str, MethodParams]
    fusion: FusionParams
    evaluate: EvaluateParams
    ablations: AblationParams
    studies: dict[str, StudyParams]
    races: RacesParams
    report: ReportParams
    gate: GateParams
    serving: ServingParams
    watch: WatchParams
    pretrain: PretrainParams

    @model_validator(mode="after")
    def _names_exist(self) -> Params:
        named = {
            f"methods.{m}.backbone": row.backbone
            for m, row in self.methods.items()
            if isinstance(row, ContrastiveMethod)
        }
        for key, name in {"backbone": self.backbone, **named}.items():
            if name not in self.backbones:
                raise ValueError(f"{key}: {unknown('backbone', name, self.backbones)}")
        others = _raced(self.methods)
        for name, method in self.methods.items():
            levels = method.levels if isinstance(method, _Diffusion) and name not in others else ()
            if not set(levels) <= set(self.noise.levels):
                raise ValueError(
                    f"methods.{name}.levels: {list(levels)} is not among noise.levels {list(self.noise.levels)}"
                )
            if isinstance(method, CrossAttentionMethod | FusionMethod) and method.pooling not in self.evidence.poolings:
                raise ValueError(f"methods.{name}.pooling: {method.pooling!r} is not among evidence.poolings")
            if isinstance(method, ReleasedMethod) and "logits" not in self.evidence.poolings:
                raise ValueError(f"methods.{name}.scorer: released needs 'logits' among evidence.poolings")
        return self

    @model_validator(mode="after")
    def _ablations_have_evidence(self) -> Params:
        for name in self.ablations.methods:
            if name not in self.methods:
                raise ValueError(f"ablations.methods: {unknown('method', name, self.methods)}")
            if not isinstance(self.methods[name], CrossAttentionMethod | FusionMethod):
                raise ValueError(f"ablations.methods: {name} has neither cross-attention nor parts to take apart")
            if name in _raced(self.methods):
                raise ValueError(f"ablations.methods: {name} has a schedule, which leaves no evidence to take apart")
        for pooling in self.ablations.pooling:
            if pooling not in self.evidence.poolings:
                raise ValueError(f"ablations.pooling: {pooling!r} is not among evidence.poolings")
        for level in {level for levels in self.ablations.levels for level in levels}:
            if level not in self.noise.levels:
                raise ValueError(f"ablations.levels: {level} is not among noise.levels {list(self.noise.levels)}")
        return self

    @model_validator(mode="after")
    def _studies_have_rows(self) -> Params:
        for name, study in self.studies.items():
            for kind, asked, there in (
                ("dataset", study.datasets, self.datasets),
                ("method", study.methods, self.methods),
            ):
                for row in asked:
                    if row not in there:
                        raise ValueError(f"studies.{name}.{kind}s: {unknown(kind, row, there)}")
            for row in _raced(self.methods):
                if row in study.methods:
                    raise ValueError(f"studies.{name}.methods: {row} has a schedule that was learned for other params")
        return self

    @model_validator(mode="after")
    def _schedules_have_rows_and_draws(self) -> Params:
        known = [EXHAUSTIVE, *self.schedules]
        for name, method in _raced(self.methods).items():
            if method.schedule not in known:
                raise ValueError(f"methods.{name}.schedule: {unknown('schedule', method.schedule, known)}")
            if method.levels != self.races.levels:
                raise ValueError(f"methods.{name}.levels: a schedule goes by those of races, {list(self.races.levels)}")
        fitting = [name for name, method in self.methods.items() if isinstance(method, ContrastiveMethod)]
        for name, row in self.schedules.items():
            if (proposer := proposer_of(row)) not in (None, *fitting):
                key = "proposer" if isinstance(row, RacingSchedule) else "shortlist.proposer"
                raise ValueError(f"schedules.{name}.{key}: {unknown('contrastive method', str(proposer), fitting)}")
            if isinstance(row, StagedSchedule):
                _check_stages(name, row, len(self.races.levels) * self.races.draws_per_level)
            if isinstance(row, HierarchicalSchedule) and row.samples > self.races.draws_per_level:
                raise ValueError(
                    f"schedules.{name}.samples: {row.samples} at each level, but races.draws_per_level is "
                    f"{self.races.draws_per_level}"
                )
        return self

    @model_validator(mode="after")
    def _races_have_rows_and_draws(self) -> Params:
        races = self.races
        for name, methods in races.datasets.items():
            if name not in self.datasets:
                raise ValueError(f"races.datasets: {unknown('dataset', name, self.datasets)}")
            for method in methods:
                if method not in self.methods:
                    raise ValueError(f"races.datasets.{name}: {unknown('method', method, self.methods)}")
        draws = len(races.levels) * races.draws_per_level
        if max(races.exhaustive.draws) > draws:
            raise ValueError(f"races.exhaustive.draws: {max(races.exhaustive.draws)}, but there are {draws} in all")
        if races.published.samples > races.draws_per_level:
            raise ValueError(f"races.published.samples: more than the {races.draws_per_level} of races.draws_per_level")
        return self

    @model_validator(mode="after")
    def _what_learns_is_trained(self) -> Params:
        attentive = next(iter(_prompted(self.methods)), None)
        for name, method in self.methods.items():
            if isinstance(method, _Diffusion) and method.prompt == "few-shot" and attentive is None:
                raise ValueError(
                    f"methods.{name}.prompt: few-shot, but no method trains it: one with scorer: cross-attention must"
                )
        if all(isinstance(method, ContrastiveMethod) for method in self.methods.values()):
            raise ValueError("methods: none sees with the diffusion model; one must")
        learning = _trained(self.methods)
        for name in self.training:
            if name not in learning:
                raise ValueError(f"training.{name}: {unknown('trained method', name, learning)}")
        for name in learning:
            row = self.training.get(name)
            if row is None:
                raise ValueError(f"methods.{name}: learns, but training has no row {name}")
            if name == attentive and not isinstance(row, NoisyTrainingParams):
                raise ValueError(f"training.{name}.levels: missing; an attention prompt is trained at noise levels")
            if name != attentive and isinstance(row, NoisyTrainingParams):
                raise ValueError(f"training.{name}.levels: superfluous; a CLIP sees no noise")
        return self

    @model_validator(mode="after")
    def _what_serves_scores_pairs(self) -> Params:
        name, prompt = self.serving.method, self.serving.prompt
        if name not in self.methods:
            raise ValueError(f"serving.method: {unknown('method', name, self.methods)}")
        row = self.methods[name]
        if not isinstance(row, CrossAttentionMethod | DenoisingMethod):
            raise ValueError(f"serving.method: the scorer of {name} is neither cross-attention nor denoising")
        if row.prompt == "none" and prompt is not None:
            raise ValueError(f"serving.prompt: {name} has none; set it to null")
        if row.prompt != "none" and prompt not in self.datasets:
            raise ValueError(f"serving.prompt: {unknown('dataset', str(prompt), self.datasets)}")
        return self


def noise_of(params: Params, dataset: str) -> NoiseParams:
    """The noise at which the examples of a dataset are scored."""
    draws = params.datasets[dataset].draws_per_level
    return params.noise if draws is None else params.noise.model_copy(update={"draws_per_level": draws})


def backbone_of(params: Params, method: str) -> str:
    """The row of `backbones` that a method sees pictures and texts with."""
    row = params.methods[method]
    return row.backbone if isinstance(row, ContrastiveMethod) else params.backbone


def proposer_of(row: ScheduleParams) -> str | None:
    """The contrastive method whose word on the candidates a schedule starts from, if any."""
    if isinstance(row, RacingSchedule):
        return row.proposer
    return row.shortlist.proposer if row.shortlist else None


def raced(params: Params) -> dict[str, CrossAttentionMethod | DenoisingMethod]:
    """The methods whose schedule is another than exhaustive; they leave rankings and no evidence."""
    return _raced(params.methods)


def prompted(params: Params) -> str | None:
    """The method whose score trains the attention prompt: the first cross-attention method with prompt: few-shot, one
    without a schedule if there is one.

    All methods with prompt: few-shot use that prompt; None where there is none.
    """
    return next(iter(_prompted(params.methods)), None)


def under_test(params: Params) -> str:
    """The method that the report is about: the prompted one, else the first that sees with the diffusion model."""
    diffusion = (name for name, method in params.methods.items() if not isinstance(method, ContrastiveMethod))
    return prompted(params) or next(diffusion)


def twin(params: Params) -> str | None:
    """The method that differs from the trained one in its prompt alone, or None where params.yaml has none."""
    if (trained := prompted(params)) is None:
        return None
    bare = params.methods[trained].model_copy(update={"prompt": "none"})
    return next((name for name, method in params.methods.items() if method == bare), None)


def trained(params: Params) -> list[str]:
    """The methods that learn something of their own: the rows of `training`."""
    return _trained(params.methods)


def _check_stages(name: str, row: StagedSchedule, draws: int) -> None:
    key = f"schedules.{name}"
    if len(row.to_keep) != len(row.n_samples):
        raise ValueError(f"{key}.to_keep: must be as long as n_samples")
    if any(b > a for a, b in pairwise(row.to_keep)):
        raise ValueError(f"{key}.to_keep: must fall from stage to stage, not {list(row.to_keep)}")
    if any(b <= a for a, b in pairwise(row.n_samples)):
        raise ValueError(f"{key}.n_samples: must rise from stage to stage, not {list(row.n_samples)}")
    if row.n_samples[-1] > draws:
        raise ValueError(f"{key}.n_samples: {row.n_samples[-1]}, but races has {draws} draws in all")


def _raced(methods: Mapping[str, MethodParams]) -> dict[str, CrossAttentionMethod | DenoisingMethod]:
    return {
        name: row
        for name, row in methods.items()
        if isinstance(row, CrossAttentionMethod | DenoisingMethod) and row.schedule != EXHAUSTIVE
    }


def _prompted(methods: Mapping[str, MethodParams]) -> list[str]:
    fitting = [n for n, row in methods.items() if isinstance(row, CrossAttentionMethod) and row.prompt == "few-shot"]
    return sorted(fitting, key=_raced(methods).__contains__)


def _trained(methods: Mapping[str, MethodParams]) -> list[str]:
    tuned = [n for n, m in methods.items() if isinstance(m, ContrastiveMethod) and m.tuned != "none"]
    return [*_prompted(methods)[:1], *tuned]


def _place(location: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The key that an error's location stands for, and the keys that its parent accepts, for "did you mean".

    Pydantic's location also names the member of a union (a method by its scorer), which is no part of the key.
    """
    kind: Any = Params
    key: list[str] = []
    known: list[str] = []
    for part in location:
        kind = _bare(kind)
        if get_origin(kind) in (Union, UnionType):
            kind = next((_bare(member) for member in get_args(kind) if part in _tags(member)), None)
            continue
        key.append(str(part))
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            fields = getattr(kind, "model_fields", {})
            known, kind = list(fields), fields[part].annotation if part in fields else None
    return key, known


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _tags(member: Any) -> tuple[str, ...]:
    """The names of a union's member in a location: its Tag, or the values of its field `scorer` or `kind`."""
    for note in getattr(member, "__metadata__", ()):
        if isinstance(note, Tag):
            return (note.tag,)
    fields = getattr(member, "model_fields", {})
    names = (fields[key] for key in ("scorer", "kind") if key in fields)
    return next((get_args(field.annotation) for field in names), ())


def mistake(error: ErrorDetails, where: object) -> str:
    """One line for an error of pydantic's: where, which key, and what would be right."""
    key, known = _place(error["loc"])
    location = ".".join(key)
    if error["type"] == "extra_forbidden":
        return f"{where}: {unknown('key', location, ['.'.join([*key[:-1], other]) for other in known])}"
    found = "" if error["type"] == "missing" or not location else f", found {error['input']!r}"
    return f"{where}: {location + ': ' if location else ''}{error['msg'].removeprefix('Value error, ')}{found}"


def load(path: Path | str = "params.yaml") -> Params:
    """Reads and checks params.yaml; raises ParamsError with one line that names the file and the key."""
    path = Path(path)
    try:
        return Params.model_validate(yaml.safe_load(path.read_text()))
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run from the project's folder or name the file") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ParamsError(mistake(error.errors()[0], path)) from None
