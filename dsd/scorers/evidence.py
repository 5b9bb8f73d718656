"""Evidence as a table: which (pair, draw) rows there are, in which shards they lie, and how they are read back.

No model is needed here. Shapes: E pairs, K draws, P poolings, L layers, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from dsd.config import EXHAUSTIVE, DenoisingMethod, FusionMethod, MethodParams, NoiseParams, ReleasedMethod
from dsd.data.draws import Draw, draws
from dsd.data.examples import MatchingExample, Pair, pairs
from dsd.errors import DataError
from dsd.store import Store, digest, write_atomic

UNCONDITIONAL = ""  # the text of the unconditional pass
INDEX = "index.json"  # written last: it names the shards that hold all the evidence of the params, and the layers
RACES = "races"  # the folder, beside the evidence, of what races have ended with
Request = tuple[Pair, Draw]


@dataclass(frozen=True)
class Requests(Sequence[Request]):
    """Every pair at every draw, a pair's draws together; a row is made when it is read.

    So millions of rows take no more memory than their pairs.
    """

    pairs: Sequence[Pair]
    draws: Sequence[Draw]
    places: range  # which of the rows these are

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, n: int) -> Request: ...
    @overload
    def __getitem__(self, n: slice) -> Requests: ...
    def __getitem__(self, n: int | slice) -> Request | Requests:
        if isinstance(n, slice):
            return replace(self, places=self.places[n])
        pair, draw = divmod(self.places[n], len(self.draws))
        return self.pairs[pair], self.draws[draw]

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process is sent is these rows, and not the pairs of all others."""
        return tuple, (tuple(self),)


@dataclass(frozen=True)
class Shard:
    """Rows (pair, draw) that are computed and stored together under the key of their content."""

    key: str
    rows: Sequence[Request]


@dataclass(frozen=True)
class Evidence:
    """What was seen, for pairs in the order of `pairs` and draws in the order of `draws`."""

    pairs: list[Pair]
    draws: list[Draw]
    attention: np.ndarray  # [E, K, P, L, H] pooled attention
    attribution: np.ndarray  # [E, K, L, H] weight of each head, eq. 7
    error: np.ndarray  # [E, K] ‖ε − ε_θ‖², mean over the latent
    layers: list[str]  # the U-Net's names of the L layers, in the order of the forward pass
    latent: int  # values of a latent, which `error` is the mean over


def unconditional(evidence: Evidence, values: np.ndarray) -> np.ndarray:
    """The unconditional row of each pair's image, of values [E, ...]; zeros where the image is compared with none."""
    row = {pair: n for n, pair in enumerate(evidence.pairs)}
    nothing = np.zeros_like(values[0])
    alone = (row.get(Pair(pair.image, UNCONDITIONAL)) for pair in evidence.pairs)
    return np.stack([nothing if n is None else values[n] for n in alone])


def normalises(methods: Mapping[str, MethodParams], prompt: str) -> bool:
    """Whether a method under this prompt sets evidence off against the unconditional one."""

    def does(method: MethodParams) -> bool:
        if isinstance(method, FusionMethod):
            return prompt == "none"
        if isinstance(method, DenoisingMethod | ReleasedMethod):
            return method.prompt == prompt and method.schedule == EXHAUSTIVE
        return False

    return any(map(does, methods.values()))


def wanted(examples: Sequence[MatchingExample], normalised: bool) -> list[Pair]:
    """The pairs of the examples; if normalised, also the unconditional pass of each image that is compared with one."""
    compared = [e for e in examples if normalised and len(e.images) > 1]
    return [*pairs(examples), *dict.fromkeys(Pair(image, UNCONDITIONAL) for e in compared for image in e.images)]


def requests(examples: Sequence[MatchingExample], noise: NoiseParams, seed: int, normalised: bool) -> Requests:
    """Every (pair, draw) of the examples, a pair's draws together."""
    asked, seen = wanted(examples, normalised), draws(noise, seed)
    return Requests(asked, seen, range(len(asked) * len(seen)))


def plan(rows: Sequence[Request], source: str, size: int) -> list[Shard]:
    """Cuts the rows into shards; `source` is the digest of backbone, prompt and evidence params."""
    chunks = (rows[i : i + size] for i in range(0, len(rows), size))
    return [Shard(f"evidence-{digest(source, [[*p, *d] for p, d in chunk])}", chunk) for chunk in chunks]


def write_index(scored: Path, keys: dict[str, list[str]], layers: Sequence[str], latent: int) -> None:
    """Names the shards of each prompt ("none", "few-shot") and contrastive method, in the order of the rows, and says
    what `Evidence` needs to know of the diffusion model: its layers and the size of its latents."""
    content = {"layers": list(layers), "latent": latent, "shards": keys}
    write_atomic(scored / INDEX, json.dumps(content, indent=1).encode())


def read_index(scored: Path) -> dict[str, Any]:
    """What `write_index` has written.

    Raises:
        DataError: the stage `score` has left no index, or one of another form.
    """
    path = scored / INDEX
    try:
        index: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run the stage `score`") from None
    if set(index) != {"layers", "latent", "shards"}:
        raise DataError(f"{path}: not the index of this version; run the stage `score` again")
    return index


def read_shards(scored: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of an entry of the index, its shards joined.

    Raises:
        DataError: the stage `score` has left no such evidence, or a shard of it is damaged.
    """
    shards, store = read_index(scored)["shards"], Store(scored)
    if name not in shards:
        raise DataError(f"{scored / INDEX}: no evidence for {name!r}; run the stage `score`")
    parts = []
    for key in shards[name]:
        arrays = store.read(key)
        if arrays is None:
            raise DataError(f"{scored / key}: missing or damaged; run the stage `score` again")
        parts.append(arrays)
    return {array: np.concatenate([part[array] for part in parts]) for array in parts[0]}


def read_evidence(
    scored: Path, entry: str, examples: Sequence[MatchingExample], noise: NoiseParams, seed: int, normalised: bool
) -> Evidence:
    """The stored evidence of the examples, under the name of its entry; see `read_shards` for what it raises."""
    asked, seen = wanted(examples, normalised), draws(noise, seed)
    index, arrays = read_index(scored), read_shards(scored, entry)
    if len(arrays["error"]) != len(asked) * len(seen):
        raise DataError(f"{scored}: {len(arrays['error'])} rows for {len(asked)} pairs; run the stage `score` again")
    shaped = {name: array.reshape(len(asked), len(seen), *array.shape[1:]) for name, array in arrays.items()}
    return Evidence(asked, seen, **shaped, layers=index["layers"], latent=index["latent"])


def read_places(scored: Path, method: str, examples: Sequence[MatchingExample]) -> list[np.ndarray]:
    """Of a method with a schedule, the place of every candidate [C] of each example, from 1.

    Raises:
        DataError: the stage `score` has run no such races, or a shard of them is damaged.
    """
    store, path = Store(scored / RACES), scored / RACES / INDEX
    keys = json.loads(path.read_text()).get(method) if path.exists() else None
    parts = [part for part in map(store.read, keys or ()) if part is not None]
    if not keys or len(parts) < len(keys):
        raise DataError(f"{path}: no races of {method}, or damaged ones; run the stage `score` again")
    whole = np.concatenate([part["place"] for part in parts])
    sizes = [len(pairs([example])) for example in examples]
    if len(whole) != sum(sizes):
        raise DataError(f"{path}: {len(whole)} candidates of {method} for {sum(sizes)}; run the stage `score` again")
    return np.split(whole, np.cumsum(sizes)[:-1])
