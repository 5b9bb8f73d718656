"""Single-file checkpoints: the original layout of latent diffusion, in which most fine-tunes are published.

The file has all weights, under the names of the original implementation, and no settings: those are read from a folder
of the same architecture. Names are converted by diffusers. Weights are loaded here, because diffusers leaves missing
ones at random values.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dsd.errors import CheckpointError, brief
from dsd.models.checkpoint import silence
from dsd.models.settings import component_settings
from dsd.models.weights import check_finite, check_tensors, read_tensors, unexpected

# Prefixes of text encoders in the layouts of transformers (1.x, the first of XL) and OpenCLIP (2.x, the second of XL).
TRANSFORMERS = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
VAE = "first_stage_model."
OPEN_CLIP = {"text_encoder": "cond_stage_model.model.", "text_encoder_2": "conditioner.embedders.1.model."}


class Marks(NamedTuple):
    """What a file states about itself; None or False if it does not."""

    prediction: str | None
    zero_snr: bool
    architecture: str | None


def marks(path: Path) -> Marks:
    """Read the marks of a file: keys without weights that trainers add, and metadata after the ModelSpec standard.

    Raises:
        CheckpointError: it is not in safetensors, or its marks are of a noise process that is not supported.
    """
    try:
        with safe_open(path, "pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a file in safetensors ({brief(error)})") from None
    if edm := sorted(name for name in names if name.startswith("edm_")):
        raise CheckpointError(f"{path}: the key {edm[0]} marks an EDM model, whose noise process is not supported")
    stated = str(metadata.get("modelspec.prediction_type", "")).lower()
    known = {"": None, "epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
    if stated not in known:
        raise CheckpointError(f"{path}: modelspec.prediction_type {stated!r}: neither epsilon nor v")
    prediction = "v_prediction" if "v_pred" in names else known[stated]
    if "v_pred" in names and known[stated] == "epsilon":
        raise CheckpointError(f"{path}: the key v_pred and modelspec.prediction_type epsilon disagree")
    return Marks(prediction, "ztsnr" in names, metadata.get("modelspec.architecture"))


def check_marks(path: Path, folder: Path, architecture: str, *, prediction: str, zero_snr: bool) -> None:
    """Check the marks of a file against the settings in `folder`.

    Args:
        architecture: a pattern of ModelSpec's names.

    Raises:
        CheckpointError: they disagree; the line names both.
    """
    own = marks(path)
    if own.architecture is not None and not re.fullmatch(architecture, own.architecture):
        raise CheckpointError(f"{path}: modelspec.architecture is {own.architecture}, the settings are of {folder}")
    if own.prediction not in (None, prediction):
        raise CheckpointError(f"{path}: marked as {own.prediction}, but {folder} or the row has {prediction}")
    if own.zero_snr and not zero_snr:
        raise CheckpointError(f"{path}: marked ztsnr, but {folder} has no rescale_betas_zero_snr: true")


class SingleFile:
    """The weights of the file at `path`, with the settings in `folder`."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder, self.tensors = path, folder, read_tensors(path)

    def component(self, kind: Any, name: str, dtype: torch.dtype) -> Any:
        """Build the model of `<folder>/<name>/config.json`, load its weights and check them as `component` does."""
        silence()
        try:
            settings = component_settings(self.folder, name, kind)
            if kind.__module__.startswith("diffusers"):
                model: nn.Module = kind.from_config(settings)
            else:
                model = kind(kind.config_class.from_pretrained(self.folder / name))
            tensors = self._tensors(name, model)
        except Exception as error:  # two libraries, each with its own errors for settings that do not fit
            problem = f"{name} does not load as {kind.__name__} with the config in {self.folder}: {brief(error, 300)}"
            raise CheckpointError(f"{self.path}: {problem}") from None
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        if wrong := [key for key, shape in shapes.items() if key not in tensors or tensors[key].shape != shape]:
            raise CheckpointError(
                f"{self.path}: {len(wrong)} of {len(shapes)} tensors of {name} missing, or misshapen for "
                f"{self.folder}; the first is {wrong[0]}"
            )
        if rest := unexpected(set(tensors) - set(shapes), kind):
            raise CheckpointError(
                f"{self.path}: {len(rest)} tensors of {name} are not in the model of {self.folder}; "
                f"the first is {rest[0]}"
            )
        check_tensors({key: tensors[key] for key in shapes}, f"{self.path}: {name}")
        model.load_state_dict({key: tensors[key] for key in shapes})
        model = model.to(dtype).eval().requires_grad_(False)
        check_finite(model, f"{self.path}: {name}")  # after the cast: float16 may overflow
        return model

    def _tensors(self, name: str, model: Any) -> dict[str, Tensor]:
        """Return the tensors of a component under the names of diffusers or transformers."""
        if name == "unet":
            return dict(convert_ldm_unet_checkpoint(self.tensors, model.config))
        if name == "vae":
            tensors = dict(convert_ldm_vae_checkpoint(self.tensors, model.config))
            if (unread := sum(key.startswith(VAE) for key in self.tensors) - len(tensors)) > 0:
                raise ValueError(f"{unread} of its tensors are not in the model")  # diffusers leaves them out
            return tensors
        open_clip = name != "text_encoder" or not any(key.startswith(TRANSFORMERS) for key in self.tensors)
        if not open_clip:
            tensors = convert_ldm_clip_checkpoint(self.tensors)
        else:
            tensors = convert_open_clip_checkpoint(model, self.tensors, prefix=OPEN_CLIP[name])
        if not hasattr(model, "text_model"):
            tensors = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
        if open_clip and name == "text_encoder":
            # Stable Diffusion 2 reads the last layer but one: its config has one layer less than its file.
            last = f"encoder.layers.{model.config.num_hidden_layers}."
            tensors = {key: tensor for key, tensor in tensors.items() if last not in key}
        return dict(tensors)
