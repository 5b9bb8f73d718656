"""The scorer fusion: a weighted sum of several kinds of evidence, whose weights are fitted on the few-shot split.

The weights are those of a conditional logit: the probability of a candidate among its rivals is the softmax of their
scores (McFadden 1974). The fit is convex and independent of its start. The penalty on the weights is chosen by
cross-validation within the few-shot split.

Shapes: E pairs, K draws, L layers, F features; n contests of at most C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from random import Random

import numpy as np
from numpy.typing import NDArray

from dsd.config import FusionMethod, FusionParams, MethodParams
from dsd.data.examples import MatchingExample, Pair
from dsd.errors import DataError
from dsd.scorers import cross_attention
from dsd.scorers.base import Scorer, Scores, StoredEvidence
from dsd.scorers.evidence import Evidence, unconditional

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Fitted:
    """A weight for each feature, in the feature's own unit."""

    names: list[str]
    weights_F: Floats
    penalty: float


def fitting_examples(
    few_shot: Sequence[MatchingExample], methods: Mapping[str, MethodParams], fusion: FusionParams, seed: int
) -> list[list[MatchingExample]]:
    """Return the few-shot examples that weights are fitted on, narrowed, by fold; none if no method fits weights.

    Raises:
        DataError: the examples cannot be divided.
    """
    if not any(method.fits_weights for method in methods.values()):
        return []
    fitting: list[list[MatchingExample]] = [[] for _ in range(fusion.prompt_folds)]
    for example, fold in list(zip(few_shot, folds(few_shot, fusion.prompt_folds), strict=True))[: fusion.examples]:
        fitting[fold].append(narrowed(example, fusion.candidates, seed))
    return fitting


def folds(few_shot: Sequence[MatchingExample], count: int) -> list[int]:
    """Return the fold of each few-shot example, from 0; examples that share images are in one fold.

    Weights must be fitted on evidence under prompts that were not trained on the same examples, on which a prompt is
    better than on others (Chernozhukov et al. 2018, "Double/debiased machine learning", cross-fitting).

    Raises:
        DataError: a fold would be empty.
    """
    groups = related(few_shot)
    if len(set(groups)) < count:
        few = f"{len(set(groups))} groups of few-shot examples without a common image"
        raise DataError(f"fusion.prompt_folds: {count}, but there are {few}; raise few_shot")
    return [int(group) % count for group in groups]


def narrowed(example: MatchingExample, candidates: int, seed: int) -> MatchingExample:
    """Return the example with at most `candidates` texts: the right ones, and wrong ones at random."""
    right = sorted({t for _, t in example.answer})
    wrong = [t for t in range(len(example.texts)) if t not in right]
    rng = Random(f"fusion/{seed}/{example.id}")
    kept = sorted(right + rng.sample(wrong, min(len(wrong), max(0, candidates - len(right)))))
    texts = tuple(example.texts[t] for t in kept)
    return replace(example, texts=texts, answer=tuple((i, kept.index(t)) for i, t in example.answer))


class Fusion(Scorer):
    name = "fusion"

    def scores(self, name: str, method: FusionMethod, stored: StoredEvidence) -> Scores:
        """Return the weighted sum for every pair, with newly fitted weights; for errors see `fit_stored`.

        It is rounded to float32 like evidence, since lower bits depend on the CPU.
        """
        weights_F = fit_stored(method, stored).weights_F
        _, every, values_EF = features(stored.evidence("none"), stored.evidence("few-shot"), method, stored.poolings)
        sums_E = (values_EF @ weights_F).astype(np.float32)
        return dict(zip(every, sums_E.tolist(), strict=True))


SCORER = Fusion()


def fit_stored(method: FusionMethod, stored: StoredEvidence) -> Fitted:
    """Fit the weights of a method on the stored evidence of the few-shot examples; for errors see `read_shards`."""
    plain, with_prompt = (stored.few_shot_evidence(prompt) for prompt in ("none", "few-shot"))
    names, every, values_EF = features(plain, with_prompt, method, stored.poolings)
    examples = list(chain.from_iterable(stored.few_shot))
    group_n = np.repeat(related(examples), [len(example.answer) for example in examples])
    return fit(names, values_EF, list(contests(examples, every)), group_n, stored.fusion)


def features(
    plain: Evidence, prompted: Evidence, method: FusionMethod, poolings: Sequence[str]
) -> tuple[list[str], list[Pair], Floats]:
    """Return the names [F] of the features, the pairs [E] and the values [E, F], averaged over the draws of a level.

    attention, prompted-attention: the pooled attention of each layer, without and with the attention prompt.
    denoising, prompted-denoising: the error without a text, never prompted, minus that with it.
    """
    columns: dict[str, Floats] = {}
    without = unconditional(plain.pairs, plain.error)
    row = {pair: n for n, pair in enumerate(prompted.pairs)}
    common = [n for n, pair in enumerate(plain.pairs) if pair in row]
    order = [row[plain.pairs[n]] for n in common]
    for level in method.levels:
        draws = [k for k, draw in enumerate(plain.draws) if draw.level == level]
        for part in method.parts:
            evidence, rows = (prompted, order) if part.startswith("prompted") else (plain, common)
            if part.endswith("attention"):
                pooled = evidence.attention[rows][:, draws, poolings.index(method.pooling)]
                attribution = evidence.attribution[rows][:, draws]
                for layer in range(pooled.shape[2]):
                    own = (values[:, :, layer : layer + 1] for values in (pooled, attribution))
                    scores = cross_attention.reduce(*own, layers="all", heads=method.heads)
                    columns[f"{part}, level {level}, layer {layer + 1}"] = scores.mean(-1)
            else:
                errors = without[common][:, draws] - evidence.error[rows][:, draws]
                columns[f"{part}, level {level}"] = errors.mean(-1)
    return list(columns), [plain.pairs[n] for n in common], np.stack(list(columns.values()), -1).astype(np.float64)


def contests(examples: Sequence[MatchingExample], pairs: Sequence[Pair]) -> Iterator[tuple[list[int], int]]:
    """Yield (rows of the candidates, the right one): the images of a text if there are several, else the texts."""
    row = {pair: n for n, pair in enumerate(pairs)}
    for example in examples:
        for i, t in example.answer:
            several = len(example.images) > 1
            places = (
                [(k, t) for k in range(len(example.images))] if several else [(i, k) for k in range(len(example.texts))]
            )
            kept = [place for place in places if place == (i, t) or place not in example.answer]
            yield [row[Pair(example.images[k], example.texts[n])] for k, n in kept], kept.index((i, t))


def related(examples: Sequence[MatchingExample]) -> NDArray[np.int64]:
    """Return the group [n] of each example: those that share images, directly or through others, are one group."""
    from scipy.sparse import coo_array  # scipy takes a second to import, and only fitting needs it
    from scipy.sparse.csgraph import connected_components

    number = {image: n for n, image in enumerate(dict.fromkeys(i for e in examples for i in e.images))}
    row, column = zip(*((n, number[image]) for n, e in enumerate(examples) for image in e.images), strict=True)
    shows = coo_array((np.ones(len(row)), (row, column)), shape=(len(examples), len(number)))
    _, group = connected_components(shows @ shows.T, directed=False)
    return np.asarray(group, dtype=np.int64)


def fit(
    names: list[str],
    values_EF: Floats,
    rows: Sequence[tuple[list[int], int]],
    group_n: NDArray[np.int64],
    fusion: FusionParams,
) -> Fitted:
    """Fit weights under the penalty with the best cross-validated likelihood; groups are held out as a whole.

    The features of denoising are few and informative: the penalty on their weights is multiplied by `fusion.denoising`.
    """
    width = max(len(candidates) for candidates, _ in rows)
    there_nC = np.array([[c < len(candidates) for c in range(width)] for candidates, _ in rows])
    padded = [candidates + candidates[:1] * (width - len(candidates)) for candidates, _ in rows]
    values_nCF = np.stack([values_EF[candidates] for candidates in padded])
    right_n = np.array([right for _, right in rows])
    # Only differences within a contest count. Their deviation is a feature's unit; a constant feature gets no weight.
    centred_nCF = values_nCF - (values_nCF * there_nC[..., None]).sum(1, keepdims=True) / there_nC.sum(1)[:, None, None]
    unit_F = centred_nCF[there_nC].std(0)
    unit_F[unit_F <= 1e-9 * np.abs(values_EF).max(0)] = np.inf
    values_nCF = centred_nCF / unit_F
    relative_F = np.array([fusion.denoising if "denoising" in name else 1.0 for name in names])
    fold_n, free_F = group_n % fusion.folds, np.zeros_like(relative_F)

    def validated(penalty: float) -> float:
        loss = 0.0
        for fold in np.unique(fold_n):
            kept, held = fold_n != fold, fold_n == fold
            weights_F = _weights(values_nCF[kept], there_nC[kept], right_n[kept], penalty * relative_F)
            loss += held.sum() * _loss(weights_F, values_nCF[held], there_nC[held], right_n[held], free_F)[0]
        return float(loss)

    penalty = min(fusion.penalties, key=validated)
    return Fitted(names, _weights(values_nCF, there_nC, right_n, penalty * relative_F) / unit_F, penalty)


def _loss(
    weights_F: Floats, values_nCF: Floats, there_nC: NDArray[np.bool_], right_n: NDArray[np.int64], penalty_F: Floats
) -> tuple[float, Floats]:
    """Return the mean negative log-likelihood plus the penalties on the squared weights, and its gradient."""
    from scipy.special import logsumexp

    n = np.arange(len(right_n))
    scores_nC = np.where(there_nC, values_nCF @ weights_F, -np.inf)
    logs_nC = scores_nC - logsumexp(scores_nC, axis=1, keepdims=True)
    excess_nC = np.exp(logs_nC)
    excess_nC[n, right_n] -= 1
    gradient_F = np.einsum("nc,ncf->f", excess_nC, values_nCF) / len(n)
    loss = -logs_nC[n, right_n].mean() + (penalty_F * weights_F**2).sum()
    return float(loss), gradient_F + 2 * penalty_F * weights_F


def _weights(values_nCF: Floats, there_nC: NDArray[np.bool_], right_n: NDArray[np.int64], penalty_F: Floats) -> Floats:
    from scipy.optimize import minimize

    start = np.zeros(values_nCF.shape[-1])
    result = minimize(_loss, start, (values_nCF, there_nC, right_n, penalty_F), method="L-BFGS-B", jac=True)
    return np.asarray(result.x)
