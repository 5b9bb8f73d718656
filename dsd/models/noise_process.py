"""The noise process that a checkpoint was trained with, as its scheduler's config declares it.

All discrete samplers of diffusers share one training process: betas over `num_train_timesteps` steps, variance
preserving. Their names matter only when images are generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd.config import BackboneParams
from dsd.errors import CheckpointError
from dsd.models.settings import is_number, read_settings

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

FILE = "scheduler/scheduler_config.json"
DISCRETE = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDPM", "DDIM", "DDIMInverse", "DDIMParallel", "DDPMParallel", "PNDM", "LMSDiscrete", "EulerDiscrete", "LCM"),
        *("EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DEISMultistep", "TCD"),
        *("DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep", "DPMSolverSDE", "SASolver"),
        "UniPCMultistep",
    )
)
MOST_STEPS = 100_000
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
# What makes the training process another one, with the only value that keeps it: of diffusers' samplers.
PLAIN = {"timestep_type": "discrete", "use_flow_sigmas": False}


def declared(folder: Path) -> dict[str, Any]:
    """Read the scheduler's config, and check that it declares a discrete variance-preserving process.

    Raises:
        CheckpointError: it does not load, it declares another process, or none, or model_index.json, by which diffusers
            chooses the class, has another one.
    """
    file, index = folder / FILE, folder / "model_index.json"
    config = read_settings(file)
    if problem := _problem(config):
        raise CheckpointError(f"{file}: {problem}")
    listed = read_settings(index).get("scheduler") if index.exists() else None  # library and class
    if isinstance(listed, list) and len(listed) == 2 and (name := listed[1]) is not None and str(name) not in DISCRETE:
        raise CheckpointError(f"{index}: scheduler {name!r}, but {FILE} has {config['_class_name']!r}; correct one")
    return config


def _problem(config: Mapping[str, Any]) -> str | None:
    name, steps, trained = config.get("_class_name"), config.get("num_train_timesteps"), config.get("trained_betas")
    if not isinstance(name, str) or name not in DISCRETE:
        return f"_class_name {name!r}: not the discrete variance-preserving noise of Stable Diffusion; cannot be scored"
    for key, plain in PLAIN.items():
        if config.get(key, plain) != plain:
            return f"{key} {config[key]!r}: must be {plain!r}; other noise processes are not supported"
    if (kind := config.get("prediction_type")) not in (None, "epsilon", "v_prediction"):
        return f"prediction_type {kind!r} is neither epsilon nor v_prediction"
    if (zero_snr := config.get("rescale_betas_zero_snr")) not in (None, True, False) or is_number(zero_snr):
        return f"rescale_betas_zero_snr {zero_snr!r}: must be true or false"
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        return f"num_train_timesteps {steps!r}: must be a whole number above 0, at most {MOST_STEPS}"
    if trained is not None:
        valid = isinstance(trained, list) and len(trained) == steps and all(_is_beta(beta) for beta in trained)
        return None if valid else f"trained_betas: must be {steps} numbers between 0 and 1"
    if (schedule := config.get("beta_schedule")) not in BETAS:
        return f"beta_schedule {schedule!r}: must be one of {', '.join(BETAS)}"
    if schedule == "squaredcos_cap_v2":
        return None
    for key in ("beta_start", "beta_end"):
        if not _is_beta(config.get(key)):
            return f"{key} {config.get(key)!r}: must be a number between 0 and 1"
    start, end = config["beta_start"], config["beta_end"]
    return f"beta_start {start} is above beta_end {end}: noise must not fall" if start > end else None


def _is_beta(value: Any) -> bool:
    return is_number(value) and 0 < value < 1


def prediction_of(folder: Path, row: BackboneParams) -> str:
    """Return the U-Net's target, "epsilon" or "v_prediction": by the row, else by the scheduler, else "epsilon".

    The oldest schedulers have no key for it. Row and scheduler must not disagree.
    """
    kind = declared(folder).get("prediction_type")
    if None not in (kind, row.prediction) and kind != row.prediction:
        raise CheckpointError(
            f"{row.source}: prediction is {row.prediction}, but the scheduler has {kind}; set it to {kind} or null"
        )
    return str(row.prediction or kind or "epsilon")


def noise_schedule(folder: Path) -> DDPMScheduler:
    """Return the ᾱ of every timestep, as diffusers computes them from the declared betas.

    Raises:
        CheckpointError: see `declared`; or some timesteps have no signal left, where all texts score the same.
    """
    from diffusers import DDPMScheduler

    config = declared(folder)
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
            "prediction_type")  # fmt: skip
    schedule = DDPMScheduler(**{key: config[key] for key in keys if config.get(key) is not None})
    alphas = schedule.alphas_cumprod
    if not bool(alphas.isfinite().all() and (alphas[:-1] > 0).all()):
        raise CheckpointError(f"{folder / FILE}: betas are too large: no signal is left before the last timestep")
    return schedule
