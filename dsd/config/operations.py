"""Params of the gate, the served model, the watch and the pretraining of the embedded checkpoints."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from dsd.config.base import Kind, Margin, Name, ParamsModel, Positive, Share


class GateRow(ParamsModel):
    """For one dataset, as fractions of 1: the gain that a challenger needs and the largest loss that it may have."""

    minimum_effect: Margin
    maximum_regression: Margin


class GateParams(ParamsModel):
    """`method`: checkpoints are compared by its answers. Datasets without a row are not compared."""

    method: str
    datasets: dict[str, GateRow]


class Bounds(ParamsModel):
    """Limits on requests to the served model; each row of a request is an image with its texts.

    max_bytes, max_images: per request. max_texts: per image. max_waiting: concurrent requests; more are refused.
    """

    max_pixels: Positive
    max_bytes: Positive
    max_images: Positive
    max_texts: Positive
    max_waiting: Positive
    wait_seconds: Annotated[float, Field(gt=0)]


class ServingParams(Bounds):
    """method: the served row of `methods`; every text is scored at all draws, whatever schedule the row has.
    prompt: the dataset whose attention prompt the method uses; null if it uses none.
    """

    method: str
    prompt: str | None


class SourceParams(Kind):
    """A row of `watch.sources`; its `kind` selects the class."""

    selector: ClassVar[str] = "kind"

    if TYPE_CHECKING:  # a field of each kind

        @property
        def kind(self) -> str: ...


class FolderSource(SourceParams):
    """Every checkpoint in a folder: a folder in the diffusers layout, or one .safetensors file.

    config, revision: for such files, as in a row of `backbones`.
    """

    kind: Literal["folder"]
    path: str
    config: str | None
    revision: str | None


class HubSource(SourceParams):
    """A hub repository at the current commit of `revision`, a branch."""

    kind: Literal["hub"]
    source: str
    revision: str


class RegisteredSource(SourceParams):
    """Every checkpoint in the registry."""

    kind: Literal["registered"]


def _cron(value: str) -> str:
    """Refuse what is not five fields, has a value out of range, or names a time that never comes (31 February)."""
    from cronsim import CronSim, CronSimError  # of the pipeline

    try:
        if len(value.split()) != 5:
            raise CronSimError
        next(CronSim(value, datetime.now(UTC)))
    except (CronSimError, StopIteration):
        problem = "must be five fields: minute, hour, day of the month, month, day of the week; and a time that comes"
        raise ValueError(problem) from None
    return value


class WatchParams(ParamsModel):
    """When and where to look for checkpoints; `attempts` is the limit of tries per checkpoint."""

    cron: Annotated[str, AfterValidator(_cron)]
    attempts: Positive
    sources: dict[Name, SourceParams]


class FitParams(ParamsModel):
    steps: Positive
    batch: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    warmup: Positive
    weight_decay: Annotated[float, Field(ge=0)]
    ema: Share
    bfloat16: bool


class PretrainParams(ParamsModel):
    """The recipe of the embedded checkpoints."""

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
    autoencoder: FitParams
    diffusion: FitParams
    clip: FitParams
