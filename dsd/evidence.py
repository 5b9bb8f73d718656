"""Evidence as a table: which (pair, draw) rows there are, in which shards they lie, and how they are read back.

No model is needed here. Shapes: E pairs, K draws, P poolings, L layers, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsd.draws import Draw, draws
from dsd.errors import DataError
from dsd.matching import MatchingExample, Pair, pairs
from dsd.params import DenoisingMethod, MethodParams, NoiseParams
from dsd.schedules import exhaustive
from dsd.store import Store, digest, write_atomic

UNCONDITIONAL = ""  # the text of the unconditional pass
INDEX = "index.json"  # written last: it names the shards that hold all the evidence of the params
Request = tuple[Pair, Draw]


@dataclass(frozen=True)
class Shard:
    """Rows (pair, draw) that are computed and stored together under the key of their content."""

    key: str
    rows: tuple[Request, ...]


@dataclass(frozen=True)
class Evidence:
    """What was seen, for pairs in the order of `pairs` and draws in the order of `draws`."""

    pairs: list[Pair]
    draws: list[Draw]
    attention: np.ndarray  # [E, K, P, L, H] pooled attention
    attribution: np.ndarray  # [E, K, L, H] weight of each head, eq. 7
    error: np.ndarray  # [E, K] ‖ε − ε_θ‖², mean over the latent


def normalises(methods: Mapping[str, MethodParams], prompt: str) -> bool:
    """Whether a method under this prompt sets errors off against the unconditional ones."""
    return any(isinstance(method, DenoisingMethod) and method.prompt == prompt for method in methods.values())


def wanted(examples: Sequence[MatchingExample], normalised: bool) -> list[Pair]:
    """The pairs of the examples; if normalised, also the unconditional pass of each image that is compared with one."""
    compared = [e for e in examples if normalised and len(e.images) > 1]
    return [*pairs(examples), *dict.fromkeys(Pair(image, UNCONDITIONAL) for e in compared for image in e.images)]


def requests(examples: Sequence[MatchingExample], noise: NoiseParams, seed: int, normalised: bool) -> list[Request]:
    """Every (pair, draw) of the examples, a pair's draws together."""
    asked, seen = wanted(examples, normalised), draws(noise, seed)
    return [(asked[p], seen[d]) for p, d in exhaustive(len(asked), len(seen))]


def plan(rows: Sequence[Request], source: str, size: int) -> list[Shard]:
    """Cuts the rows into shards; `source` is the digest of backbone, prompt and evidence params."""
    chunks = (tuple(rows[i : i + size]) for i in range(0, len(rows), size))
    return [Shard(f"evidence-{digest(source, [[*p, *d] for p, d in chunk])}", chunk) for chunk in chunks]


def write_index(scored: Path, keys: dict[str, list[str]]) -> None:
    """Names the shards of each prompt ("none", "few-shot") and of each contrastive method, in the order of the rows."""
    write_atomic(scored / INDEX, json.dumps(keys, indent=1).encode())


def read_shards(scored: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of an entry of the index, its shards joined.

    Raises:
        DataError: the stage `score` has left no such evidence, or a shard of it is damaged.
    """
    path, store = scored / INDEX, Store(scored)
    try:
        keys = json.loads(path.read_text())[name]
    except (FileNotFoundError, KeyError):
        raise DataError(f"{path}: no evidence for {name!r}; run the stage `score`") from None
    parts = []
    for key in keys:
        arrays = store.read(key)
        if arrays is None:
            raise DataError(f"{scored / key}: missing or damaged; run the stage `score` again")
        parts.append(arrays)
    return {array: np.concatenate([part[array] for part in parts]) for array in parts[0]}


def read_evidence(
    scored: Path, prompt: str, examples: Sequence[MatchingExample], noise: NoiseParams, seed: int, normalised: bool
) -> Evidence:
    """The stored evidence of the examples under a prompt; see `read_shards` for what it raises."""
    asked, seen = wanted(examples, normalised), draws(noise, seed)
    arrays = read_shards(scored, prompt)
    if len(arrays["error"]) != len(asked) * len(seen):
        raise DataError(f"{scored}: {len(arrays['error'])} rows for {len(asked)} pairs; run the stage `score` again")
    return Evidence(asked, seen, **{k: v.reshape(len(asked), len(seen), *v.shape[1:]) for k, v in arrays.items()})
