"""Versions of the code whose results are stored.

Every stored key contains the versions of the code that made the result. Raise a version when a change moves results of
its kind: they, and all results that depend on them, get other keys and are recomputed. Version 1 adds nothing to a key,
so results without versions stay valid. tests/test_golden.py fails when results move and the version did not.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsd.store import digest

VERSIONS = {
    "latents": 1,  # dsd/data/images.py and datasets/preparation.py (resizing), encode_images of dsd/models
    "texts": 1,  # encode_texts of dsd/models
    "features": 1,  # of CLIP's two towers: dsd/models/clip.py, open_clip.py; resizing
    "evidence": 1,  # dsd/data/draws.py, dsd/engine; predict_noise, noise_process.py, attention.py, prompts.py of models
    "cosines": 1,  # dsd/models/clip_heads.py
    "prompts": 1,  # training of attention prompts: dsd/training
    "heads": 1,  # training of CLIP's heads: dsd/training
    "races": 1,  # dsd/schedules and how dsd/engine runs them
    "scores": 1,  # dsd/scorers, dsd/evaluation, dsd/metrics.py: not stored, but the gate compares them
    "studies": 1,  # dsd/experiments/studies.py
    "scaling": 1,  # dsd/experiments/scaling.py and dsd/schedules: raise it with "races" if a schedule changes
}
# What each kind is computed from directly. A trained prompt or head is in the key of its evidence as a file.
INPUTS = {
    "evidence": ("latents", "texts"),
    "cosines": ("features",),
    "prompts": ("evidence",),
    "heads": ("cosines",),
    "races": ("evidence", "cosines"),
    "scores": ("prompts", "heads", "races"),
    "studies": ("scores",),
}


def versioned(kind: str, key: str) -> str:
    """Return the key of a result of this kind under the versions of the code that computes it."""
    raised = {name: VERSIONS[name] for name in sorted(dependencies(kind)) if VERSIONS[name] != 1}
    return digest(key, raised) if raised else key


def dependencies(kind: str) -> set[str]:
    """Return the kind itself and all kinds that its results are computed from."""
    return {kind}.union(*(dependencies(name) for name in INPUTS.get(kind, ())))


def moved_versions(before: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    """Return changes of the code that scores depend on, such as ["evidence 1 → 2"]; unrecorded kinds have version 1."""
    pairs = {kind: (before.get(kind, 1), now.get(kind, 1)) for kind in dependencies("scores")}
    return [f"{kind} {a} → {b}" for kind, (a, b) in sorted(pairs.items()) if a != b]
