"""A typed, frozen view of params.yaml. No field has a default: a default here would be invisible to DVC."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from dsd.errors import ParamsError, unknown

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Pooling = Literal["logsumexp", "maximum", "cosine", "logits"]
Level = Annotated[float, Field(gt=0, lt=1)]


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RuntimeParams(_Params):
    device: Literal["auto", "cpu", "cuda"]
    batch_size: Positive
    workers: Positive


class BackboneParams(_Params):
    family: str
    source: str
    revision: str | None
    lora: str | None
    dtype: Literal["float32", "bfloat16", "float16"]


class ImageParams(_Params):
    resolution: Positive
    parity: Positive | None
    max_pixels: Positive


class DatasetParams(_Params):
    """A row of `datasets`; `candidates` and `binary` are asked for by the kinds that use them.

    `draws_per_level` and `steps`, where they are given, stand for those of `noise` and `training`: what a draw costs
    grows with the candidates, and what there is to learn with the examples.
    """

    kind: str
    size: Positive
    few_shot: Share
    validation: Share
    test: Positive
    candidates: Positive | None = Field(default=None)
    binary: Share | None = Field(default=None)
    draws_per_level: Positive | None = Field(default=None)
    steps: Positive | None = Field(default=None)


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


class TrainingParams(_Params):
    method: str
    loss: Literal["softmax", "binary", "hinge"]
    levels: tuple[Level, ...]
    steps: Positive
    examples_per_step: Positive
    candidates: Annotated[int, Field(ge=2)]
    learning_rate: Annotated[float, Field(gt=0)]
    warmup: Annotated[int, Field(ge=0)]
    temperature: Annotated[float, Field(gt=0)]
    margin: Annotated[float, Field(ge=0)]
    checkpoint_every: Positive


class _Diffusion(_Params):
    prompt: Literal["none", "few-shot"]
    schedule: Literal["exhaustive"]
    levels: tuple[Level, ...]


class CrossAttentionMethod(_Diffusion):
    scorer: Literal["cross-attention"]
    pooling: Pooling
    layers: Literal["all"] | Positive
    heads: Literal["weighted", "mean"]


class DenoisingMethod(_Diffusion):
    scorer: Literal["denoising"]


class ReleasedMethod(_Diffusion):
    scorer: Literal["released"]
    denoising: bool


class ContrastiveMethod(_Params):
    scorer: Literal["contrastive"]
    backbone: str


MethodParams = Annotated[
    CrossAttentionMethod | DenoisingMethod | ReleasedMethod | ContrastiveMethod, Field(discriminator="scorer")
]


class EvaluateParams(_Params):
    resamples: Positive
    confidence: Annotated[float, Field(gt=0, lt=1)]


class ReportParams(_Params):
    gallery: Positive


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
    training: TrainingParams
    methods: dict[str, MethodParams]
    evaluate: EvaluateParams
    report: ReportParams
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
        if self.training.method not in self.methods:
            raise ValueError(f"training.method: {unknown('method', self.training.method, self.methods)}")
        if not isinstance(self.methods[self.training.method], CrossAttentionMethod):
            raise ValueError(f"training.method: {self.training.method} has no cross-attention to train a prompt on")
        for name, method in self.methods.items():
            if isinstance(method, _Diffusion) and not set(method.levels) <= set(self.noise.levels):
                raise ValueError(
                    f"methods.{name}.levels: {list(method.levels)} is not among noise.levels {list(self.noise.levels)}"
                )
            if isinstance(method, CrossAttentionMethod) and method.pooling not in self.evidence.poolings:
                raise ValueError(f"methods.{name}.pooling: {method.pooling!r} is not among evidence.poolings")
            if isinstance(method, ReleasedMethod) and "logits" not in self.evidence.poolings:
                raise ValueError(f"methods.{name}.scorer: released needs 'logits' among evidence.poolings")
        return self


def noise_of(params: Params, dataset: str) -> NoiseParams:
    """The noise at which the examples of a dataset are scored."""
    draws = params.datasets[dataset].draws_per_level
    return params.noise if draws is None else params.noise.model_copy(update={"draws_per_level": draws})


def training_of(params: Params, dataset: str) -> TrainingParams:
    """How the prompt of a dataset is trained."""
    steps = params.datasets[dataset].steps
    return params.training if steps is None else params.training.model_copy(update={"steps": steps})


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys that the model at `location` accepts, for "did you mean"."""
    model: Any = Params
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field is not None else model
    return list(getattr(model, "model_fields", {}))


def _line(error: ErrorDetails, path: Path) -> str:
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        parent = location.rpartition(".")[0]
        choices = [f"{parent}.{key}" if parent else key for key in _known_keys(error["loc"])]
        return f"{path}: {unknown('key', location, choices)}"
    found = "" if error["type"] == "missing" or not location else f", found {error['input']!r}"
    return f"{path}: {location + ': ' if location else ''}{error['msg'].removeprefix('Value error, ')}{found}"


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
        raise ParamsError(_line(error.errors()[0], path)) from None
