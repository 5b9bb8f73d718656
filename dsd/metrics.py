"""Ranks of scores, and the metrics of each benchmark, in numpy alone. Higher scores are better.

Shapes: I images, T texts of one example, n examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Answer = tuple[tuple[int, int], ...]  # the true (image index, text index) pairs of an example
Hits = tuple[NDArray[np.float64], list[NDArray[np.bool_]]]  # hits [n], group masks [n] for clustered_mean
Ranks = NDArray[np.int64]

SLOTS = ("subject", "object", "predicate")
# Text and image score of a 2 x 2 example at ranks 1 to 4: whether each is a hit.
WINOGROUND_RANKS = ((True, True), (True, False), (False, True), (False, False))
# The probability of each rank with the four scores in random order: the text score and the image score are hits with
# probability 1/4 each, both with 1/6.
WINOGROUND_CHANCE = (1 / 6, 1 / 12, 1 / 12, 2 / 3)


def rank(scores: ArrayLike, answer: Answer) -> int:
    """1-based rank of the best true pair among the false candidates of an I x 1 or 1 x T example.

    Ties are pessimistic: false candidates with the score of the true pair rank above it, so the order of the candidates
    never matters. Without a true pair the rank is one below the last candidate. For a 2 x 2 example it is an index into
    `WINOGROUND_RANKS`, from 1.

    Args:
        scores: [I, T] with I = 1 or T = 1, or [2, 2].
        answer: the true pairs; two for a 2 x 2 example, any number for others.

    Raises:
        ValueError: a score is NaN, or the shape or answer is not as above.
    """
    scores_IT = _checked(scores, answer)
    if scores_IT.shape == (2, 2):
        hit = winoground(scores_IT, answer)
        return WINOGROUND_RANKS.index((hit["text"], hit["image"])) + 1
    if not answer:
        return scores_IT.size + 1
    if 1 not in scores_IT.shape:
        raise ValueError(f"a rank needs I x 1, 1 x T or 2 x 2 scores, not {scores_IT.shape}")
    right = tuple(zip(*answer, strict=True))
    false_IT = np.ones(scores_IT.shape, dtype=bool)
    false_IT[right] = False
    if not false_IT.any():
        raise ValueError("a rank needs a false candidate, and all are true")
    return 1 + int(np.count_nonzero(scores_IT[false_IT] >= scores_IT[right].max()))


def winoground(scores: ArrayLike, answer: Answer) -> dict[str, bool]:
    """Text, image and group score of one 2 x 2 example (Thrush et al. 2022, "Winoground", eq. 1-3).

    `text`: for each image the matching text scores higher than the other; `image`: for each text the matching image
    scores higher than the other; `group`: both. A tie is a miss.

    Args:
        scores: [2, 2] images by texts.
        answer: the two true pairs, each image and each text in one of them.

    Raises:
        ValueError: a score is NaN, the shape is not [2, 2], or the answer does not pair each image with one text.
    """
    scores_IT = _checked(scores, answer)
    if scores_IT.shape != (2, 2) or sorted(answer) not in ([(0, 0), (1, 1)], [(0, 1), (1, 0)]):
        raise ValueError(f"Winoground needs 2 x 2 scores and two pairs, not {scores_IT.shape} and {answer}")
    text = all(scores_IT[i, t] > scores_IT[i, 1 - t] for i, t in answer)
    image = all(scores_IT[i, t] > scores_IT[1 - i, t] for i, t in answer)
    return {"text": bool(text), "image": bool(image), "group": bool(text and image)}


def slots(ranks: Ranks, categories: Sequence[str]) -> dict[str, Hits]:
    """ComVG: accuracy by the slot that was changed, over all examples (micro) and as mean of the three slots (macro).

    The average of the first paper is neither of the two, so both are given.
    """
    hits_n = _top(ranks, 1)
    for category in sorted(set(categories)):
        if category not in SLOTS:
            raise ValueError(f"category {category!r} is not a slot (choices: {', '.join(SLOTS)})")
    masks = [_where(_equal(categories, slot), slot) for slot in SLOTS]
    by_slot: dict[str, Hits] = {slot: (hits_n, [mask]) for slot, mask in zip(SLOTS, masks, strict=True)}
    return by_slot | {"micro": (hits_n, _all(hits_n)), "macro": (hits_n, masks)}


def recall(ranks: Ranks, categories: Sequence[str]) -> dict[str, Hits]:
    """RefCOCOg and classification: top-1 and top-5 accuracy."""
    return {f"top{k}": (_top(ranks, k), _all(ranks)) for k in (1, 5)}


def by_category(ranks: Ranks, categories: Sequence[str]) -> dict[str, Hits]:
    """The user's own images: `recall`, and top-1 accuracy of each category if there are several."""
    found = sorted(set(categories))
    masks = {f"top1 {category}": [_equal(categories, category)] for category in found if len(found) > 1}
    return recall(ranks, categories) | {name: (_top(ranks, 1), mask) for name, mask in masks.items()}


def answers(ranks: Ranks, categories: Sequence[str]) -> dict[str, Hits]:
    """VQAv2: accuracy on binary (yes or no) questions, on the others, and on all."""
    hits_n = _top(ranks, 1)
    binary = _equal(categories, "binary")
    return {
        "binary": (hits_n, [_where(binary, "binary")]),
        "other": (hits_n, [_where(~binary, "other")]),
        "all": (hits_n, _all(hits_n)),
    }


def winoground_hits(ranks: Ranks, categories: Sequence[str]) -> dict[str, Hits]:
    """Winoground: text, image and group score, see `winoground`."""
    ranks_n = np.asarray(ranks, dtype=np.int64)
    if np.any((ranks_n < 1) | (ranks_n > len(WINOGROUND_RANKS))):
        raise ValueError(
            f"ranks of 2 x 2 examples are 1 to {len(WINOGROUND_RANKS)}, found {ranks_n.min()} to {ranks_n.max()}"
        )
    text_n, image_n = np.array(WINOGROUND_RANKS, dtype=np.float64)[ranks_n - 1].T
    return {
        "text": (text_n, _all(ranks_n)),
        "image": (image_n, _all(ranks_n)),
        "group": (text_n * image_n, _all(ranks_n)),
    }


# Name of the metrics of a dataset → function of ranks [n] and categories [n] → hits and groups by metric.
METRICS: dict[str, Callable[[Ranks, Sequence[str]], dict[str, Hits]]] = {
    "slots": slots,
    "recall": recall,
    "categories": by_category,
    "answers": answers,
    "winoground": winoground_hits,
}
# The headline metric of each.
HEADLINES = {"slots": "macro", "recall": "top1", "categories": "top1", "answers": "all", "winoground": "group"}

# Before the name of a metric: among the candidates of the question's kind only.
FORCED = "forced"


def all_hits(metrics: str, ranks: Ranks, categories: Sequence[str], candidates: ArrayLike) -> dict[str, Hits]:
    """Hits and groups of each metric of a dataset; `top5` is of the examples with more than five candidates, if any.

    Args:
        metrics: a key of `METRICS`.
        candidates: [n] numbers of candidates.
    """
    hits, many_n = METRICS[metrics](ranks, categories), np.asarray(candidates) > 5
    if "top5" in hits and many_n.any():
        hits["top5"] = (hits["top5"][0], [many_n])
    elif "top5" in hits:
        del hits["top5"]
    return hits


def unforced(hits: Mapping[str, Hits]) -> dict[str, Hits]:
    """Return the metrics among all candidates, which the papers have: those that are not forced."""
    return {metric: row for metric, row in hits.items() if not metric.startswith(f"{FORCED} ")}


def expected_hits(
    hits: Callable[[Ranks], dict[str, Hits]], ahead: Ranks, tied: Ranks, right: Ranks, *, two_by_two: bool
) -> dict[str, Hits]:
    """Return the expected hits of each metric where ties are broken at random.

    Args:
        hits: hits and groups of each metric at ranks [n].
        ahead: [n] number of false candidates that score higher than the best right one.
        tied: [n] number of candidates with the score of the best right one, itself included.
        right: [n] number of right ones among these; 0 without a right pair, and then no hit is expected.
        two_by_two: all four scores of each example are equal; see `WINOGROUND_CHANCE`.
    """
    unplaced_n = np.ones(len(tied))  # the probability that no right candidate has an earlier rank
    expected: dict[str, NDArray[np.float64]] = {}
    for number in range(1, int((ahead + tied).max()) + 1):
        left_n = np.maximum(tied - (number - ahead) + 1, 1)
        first_n = np.where(number > ahead, np.minimum(right / left_n, 1), 0)  # if none was earlier
        share_n = WINOGROUND_CHANCE[number - 1] if two_by_two else unplaced_n * first_n
        unplaced_n = unplaced_n * (1 - first_n)
        for metric, (hits_n, _) in hits(np.full(len(tied), number)).items():
            expected[metric] = expected.get(metric, 0) + share_n * hits_n
    groups = {metric: masks for metric, (_, masks) in hits(np.ones(len(tied), dtype=np.int64)).items()}
    return {metric: (np.minimum(values_n, 1), groups[metric]) for metric, values_n in expected.items()}


def _checked(scores: ArrayLike, answer: Answer) -> NDArray[np.float64]:
    scores_IT = np.asarray(scores, dtype=np.float64)
    if scores_IT.ndim != 2:
        raise ValueError(f"scores must be [I, T], not of shape {scores_IT.shape}")
    if np.isnan(scores_IT).any():
        raise ValueError("a score is NaN")
    images, texts = scores_IT.shape
    if not all(0 <= i < images and 0 <= t < texts for i, t in answer):
        raise ValueError(f"answer {answer} lies outside {images} images by {texts} texts")
    return scores_IT


def _top(ranks: Ranks, k: int) -> NDArray[np.float64]:
    ranks_n = np.asarray(ranks)
    if np.any(ranks_n < 1):
        raise ValueError(f"ranks are counted from 1, found {ranks_n.min()}")
    return (ranks_n <= k).astype(np.float64)


def _equal(categories: Sequence[str], category: str) -> NDArray[np.bool_]:
    return np.array([other == category for other in categories], dtype=bool)


def _where(mask_n: NDArray[np.bool_], category: str) -> NDArray[np.bool_]:
    """The mask, checked not to be empty: an empty category has no accuracy."""
    if not mask_n.any():
        raise ValueError(f"no examples of category {category!r}")
    return mask_n


def _all(values_n: NDArray[np.float64] | Ranks) -> list[NDArray[np.bool_]]:
    return [_where(np.ones(len(values_n), dtype=bool), "all")]
