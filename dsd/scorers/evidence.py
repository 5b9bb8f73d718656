"""Evidence as a table: its (pair, draw) rows, their shards, and how they are read; no model is run here.

Shapes: E pairs, K draws, P poolings, L layers, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from dsd.config import MethodParams, NoiseParams
from dsd.data.draws import Draw, draws
from dsd.data.examples import MatchingExample, Pair, pairs, read_examples
from dsd.errors import DataError
from dsd.store import Store, digest, write_atomic

UNCONDITIONAL = ""  # the text of the unconditional pass
INDEX = "index.json"  # written last: the shards of all evidence, and the layers
RACES = "races"  # the folder of the results of races, next to the evidence
Request = tuple[Pair, Draw]


@dataclass(frozen=True)
class Requests(Sequence[Request]):
    """Every pair at every draw, ordered by pair; rows are made on access, so millions take only the memory of pairs."""

    pairs: Sequence[Pair]
    draws: Sequence[Draw]
    places: range  # the selected rows

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
        """Pickle only the selected rows."""
        return tuple, (tuple(self),)


@dataclass(frozen=True)
class Shard:
    """Rows (pair, draw) that are computed and stored together under a content key."""

    key: str
    rows: Sequence[Request]


@dataclass(frozen=True)
class Evidence:
    """Evidence of pairs in the order of `pairs` and draws in the order of `draws`."""

    pairs: list[Pair]
    draws: list[Draw]
    attention: np.ndarray  # [E, K, P, L, H] pooled attention
    attribution: np.ndarray  # [E, K, L, H] weight of each head (eq. 7)
    error: np.ndarray  # [E, K] ‖ε − ε_θ‖², mean over the latent
    layers: list[str]  # names of the L layers, in the order of the forward pass
    latent: int  # the number of values of a latent

    def at(self, levels: Sequence[float]) -> list[int]:
        """Return the indices of the draws of these noise levels."""
        return [k for k, draw in enumerate(self.draws) if draw.level in levels]


def evidence_prompts(methods: Mapping[str, MethodParams]) -> list[str]:
    """Return the prompts ("none", "few-shot") under which the methods need evidence."""
    return sorted({prompt for method in methods.values() for prompt in method.evidence_prompts}, reverse=True)


def prompt_without(fold: int) -> str:
    """Return the name of the attention prompt that is trained on the few-shot split without one of its folds.

    Its files are in a folder of this name in that of the prompt "few-shot".
    """
    return f"few-shot/without-{fold}"


def fitting_entry(prompt: str, fold: int) -> str:
    """Return the name of the index's entry with the evidence of a fold of the few-shot examples."""
    return f"{prompt}, few-shot fold {fold}"


# Images differ in how easy they are to denoise. To make them comparable, the value of the image's unconditional pass at
# the same draw is subtracted from a pair's. With a single image it is the same for all candidates, and is omitted.


def reads_unconditional(methods: Mapping[str, MethodParams], prompt: str) -> bool:
    """Return whether a method subtracts the unconditional pass under this prompt."""
    return any(method.reads_unconditional(prompt) for method in methods.values())


def with_unconditional(examples: Sequence[MatchingExample], compares: bool) -> list[Pair]:
    """Return the pairs of the examples and, if `compares`, the unconditional passes of examples with several images."""
    compared = [e for e in examples if compares and len(e.images) > 1]
    return [*pairs(examples), *dict.fromkeys(Pair(image, UNCONDITIONAL) for e in compared for image in e.images)]


def without_text(request: Request) -> Request:
    """Return the unconditional pass of the same image at the same draw."""
    pair, draw = request
    return Pair(pair.image, UNCONDITIONAL), draw


def unconditional(every: Sequence[Pair], values: np.ndarray) -> np.ndarray:
    """Return for each pair, of values [E, ...], those of its image's unconditional pass; zeros if there is none."""
    values_of, zeros = dict(zip(every, values, strict=True)), np.zeros_like(values[0])
    return np.stack([values_of.get(Pair(pair.image, UNCONDITIONAL), zeros) for pair in every])


def requests(examples: Sequence[MatchingExample], noise: NoiseParams, seed: int, compares: bool) -> Requests:
    """Return every (pair, draw) of the examples, ordered by pair; `compares` as in `with_unconditional`."""
    every, all_draws = with_unconditional(examples, compares), draws(noise, seed)
    return Requests(every, all_draws, range(len(every) * len(all_draws)))


def plan(rows: Sequence[Request], source: str, size: int) -> list[Shard]:
    """Divide the rows into shards; `source` is the digest of backbone, prompt and evidence params."""
    chunks = (rows[i : i + size] for i in range(0, len(rows), size))
    return [Shard(f"evidence-{digest(source, [[*p, *d] for p, d in chunk])}", chunk) for chunk in chunks]


def write_index(
    scored: Path, keys: dict[str, list[str]], layers: Sequence[str], latent: int, indistinct: Mapping[str, str]
) -> None:
    """Write the shards of each prompt and contrastive method in the order of their rows, the layers and latent size.

    indistinct: examples that are not scored, since two of their candidates are one, with the reason; see `Session`.
    """
    content = {"layers": list(layers), "latent": latent, "indistinct": dict(indistinct), "shards": keys}
    write_atomic(scored / INDEX, json.dumps(content, indent=1).encode())


def read_index(scored: Path) -> dict[str, Any]:
    """Read what `write_index` has written; raise DataError if it is missing or of another form."""
    path = scored / INDEX
    try:
        index: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run the stage `score`") from None
    if set(index) != {"layers", "latent", "indistinct", "shards"}:
        raise DataError(f"{path}: not the index of this version; run the stage `score` again")
    return index


def scored_examples(prepared: Path, scored: Path, split: str) -> list[MatchingExample]:
    """Read the examples of a split that the stage `score` has scored."""
    indistinct = read_index(scored)["indistinct"]
    return [e for e in read_examples(prepared / "examples.parquet", split) if e.id not in indistinct]


def read_shards(scored: Path, name: str) -> dict[str, np.ndarray]:
    """Read the arrays of an entry of the index, its shards concatenated.

    Raises:
        DataError: there is no such evidence, or a shard is damaged.
    """
    shards, store = read_index(scored)["shards"], Store(scored)
    if name not in shards:
        raise DataError(f"{scored / INDEX}: no evidence for {name!r}; run the stage `score`")
    parts = []
    for key in shards[name]:
        if (arrays := store.read(key)) is None:
            raise DataError(f"{scored / key}: missing or damaged; run the stage `score` again")
        parts.append(arrays)
    return {array: np.concatenate([part[array] for part in parts]) for array in parts[0]}


def read_evidence(
    scored: Path, entry: str, examples: Sequence[MatchingExample], noise: NoiseParams, seed: int, compares: bool
) -> Evidence:
    """Read the evidence of the examples from an entry of the index; for errors see `read_shards`."""
    every, all_draws = with_unconditional(examples, compares), draws(noise, seed)
    index, arrays = read_index(scored), read_shards(scored, entry)
    if len(arrays["error"]) != len(every) * len(all_draws):
        raise DataError(f"{scored}: {len(arrays['error'])} rows for {len(every)} pairs; run the stage `score` again")
    shaped = {name: array.reshape(len(every), len(all_draws), *array.shape[1:]) for name, array in arrays.items()}
    return Evidence(every, all_draws, **shaped, layers=index["layers"], latent=index["latent"])


def joined(several: Sequence[Evidence]) -> Evidence:
    """Return the evidence of the pairs of all; draws and layers are the same in each."""
    return replace(
        several[0],
        pairs=[pair for one in several for pair in one.pairs],
        attention=np.concatenate([one.attention for one in several]),
        attribution=np.concatenate([one.attribution for one in several]),
        error=np.concatenate([one.error for one in several]),
    )


def read_ranks(scored: Path, method: str, examples: Sequence[MatchingExample]) -> list[np.ndarray]:
    """Read the rank [C] of every candidate of each example, from 1, under a method with a schedule.

    Raises:
        DataError: the stage `score` has run no such races, or a shard is damaged.
    """
    store, path = Store(scored / RACES), scored / RACES / INDEX
    keys = _races_index(scored)["shards"].get(method)
    parts = [part for part in map(store.read, keys or ()) if part is not None]
    if not keys or len(parts) < len(keys):
        raise DataError(f"{path}: no races of {method}, or damaged ones; run the stage `score` again")
    whole = np.concatenate([part["place"] for part in parts])
    sizes = [len(pairs([example])) for example in examples]
    if len(whole) != sum(sizes):
        raise DataError(f"{path}: {len(whole)} candidates of {method} for {sum(sizes)}; run the stage `score` again")
    return np.split(whole, np.cumsum(sizes)[:-1])


def read_identities(scored: Path) -> dict[str, dict[str, str]]:
    """Read the identity of each method's schedule comparison under the params of the stage `score`.

    Raises:
        DataError: the stage `score` was not run.
    """
    return dict(_races_index(scored)["compared"])


def _races_index(scored: Path) -> dict[str, Any]:
    path = scored / RACES / INDEX
    index = json.loads(path.read_text()) if path.exists() else {}
    if set(index) != {"shards", "compared"}:
        raise DataError(f"{path}: missing, or not the index of this version; run the stage `score` again")
    return dict(index)
