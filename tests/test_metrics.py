"""Ranks and hits on hand-written matrices."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd.metrics import HEADLINES, METRICS, WINOGROUND_CHANCE, Answer, Hits, all_hits, expected_hits, rank, winoground

scores_1T = st.lists(st.integers(-50, 50), min_size=2, max_size=12)


@pytest.mark.parametrize(
    ("scores", "answer", "expected"),
    [
        ([[2.0], [1.0]], ((0, 0),), 1),  # ComVG: two images, one text
        ([[1.0], [2.0]], ((0, 0),), 2),
        ([[0.1, 0.9, 0.5]], ((0, 2),), 2),  # one image, three texts
        ([[0.1, 0.9, 0.5]], ((0, 0),), 3),
        ([[0.5, 0.5]], ((0, 0),), 2),  # a tie ranks last
        ([[0.0, 0.0, 0.0]], ((0, 1),), 3),
        ([[-np.inf, 1.0, -np.inf]], ((0, 1),), 1),  # candidates that a schedule dropped
        ([[0.1, 0.9, 0.5]], (), 4),  # no candidate is correct
        ([[2.0, 1.0], [1.0, 2.0]], ((0, 0), (1, 1)), 1),  # Winoground: all correct
        ([[1.0, 0.0], [5.0, 6.0]], ((0, 0), (1, 1)), 2),  # the texts only
        ([[1.0, 5.0], [0.0, 6.0]], ((0, 0), (1, 1)), 3),  # the images only
        ([[1.0, 1.0], [1.0, 1.0]], ((0, 0), (1, 1)), 4),
    ],
)
def test_rank(scores: list[list[float]], answer: Answer, expected: int) -> None:
    assert rank(np.array(scores), answer) == expected


@pytest.mark.parametrize(
    ("scores", "answer", "message"),
    [
        ([[np.nan, 1.0]], ((0, 1),), "NaN"),
        ([[1.0, 2.0], [3.0, 4.0]], ((0, 0),), "Winoground needs 2 x 2 scores and two pairs"),
        ([[1.0, 2.0, 5.0], [3.0, 4.0, 5.0]], ((0, 0),), "I x 1, 1 x T or 2 x 2"),
        ([[1.0, 2.0]], ((0, 0), (0, 1)), "a false candidate"),
        ([[1.0, 2.0]], ((0, 2),), "outside"),
        ([[1.0, 2.0]], ((0, -1),), "outside"),
        ([1.0, 2.0], ((0, 0),), r"\[I, T\]"),
    ],
)
def test_rank_errors(scores: list[list[float]], answer: Answer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank(np.array(scores), answer)


@settings(max_examples=50, deadline=None)
@given(scores_1T, st.data())
def test_a_monotone_transformation_changes_no_rank(scores: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores) - 1))
    values = np.array([scores], dtype=float)
    assert rank(values, ((0, k),)) == rank(np.arctan(values / 7) * 3 - 1, ((0, k),)) == rank(values**3, ((0, k),))
    assert rank(values, ((0, k),)) == rank(values.T, ((k, 0),))


@settings(max_examples=50, deadline=None)
@given(scores_1T, st.data())
def test_the_order_of_the_candidates_does_not_matter(scores: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(scores))))
    values = np.array([scores], dtype=float)
    for k in range(len(scores)):
        assert rank(values, ((0, k),)) == rank(values[:, order], ((0, order.index(k)),))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=12, unique=True))
def test_ranks_of_distinct_scores_are_a_permutation(scores: list[int]) -> None:
    values = np.array([sorted(scores)], dtype=float)
    ranks = [rank(values, ((0, k),)) for k in range(values.shape[1])]
    assert ranks == list(range(values.shape[1], 0, -1))


@pytest.mark.parametrize(
    ("scores", "text", "image", "group"),
    [
        ([[2, 1], [1, 2]], True, True, True),
        ([[1, 0], [5, 6]], True, False, False),  # the second image wins both texts
        ([[1, 5], [0, 6]], False, True, False),  # the second text wins both images
        ([[1, 2], [2, 1]], False, False, False),
        ([[1, 1], [1, 1]], False, False, False),  # a tie is a miss
        ([[2, 2], [1, 3]], False, True, False),
    ],
)
def test_winoground(scores: list[list[float]], text: bool, image: bool, group: bool) -> None:
    expected = {"text": text, "image": image, "group": group}
    assert winoground(np.array(scores), ((0, 0), (1, 1))) == expected
    assert winoground(np.array(scores)[::-1], ((0, 1), (1, 0))) == expected  # images in the other order


@pytest.mark.parametrize(
    ("scores", "answer"),
    [
        ([[1, 2, 3], [4, 5, 6]], ((0, 0), (1, 1))),
        ([[1, 2], [3, 4]], ((0, 0),)),
        ([[1, 2], [3, 4]], ((0, 0), (1, 0))),
        ([[1, 2], [3, np.nan]], ((0, 0), (1, 1))),
    ],
)
def test_winoground_errors(scores: list[list[float]], answer: Answer) -> None:
    with pytest.raises(ValueError):
        winoground(np.array(scores), answer)


def values(name: str, ranks: list[int], categories: list[str]) -> dict[str, float]:
    metrics = METRICS[name](np.array(ranks), categories)
    return {
        metric: float(np.mean([hits[mask].mean() for mask in groups])) for metric, (hits, groups) in metrics.items()
    }


def test_slots_by_hand() -> None:
    categories = ["subject", "subject", "subject", "subject", "object", "object", "predicate"]
    assert values("slots", [1, 1, 1, 2, 2, 1, 2], categories) == pytest.approx(
        {"subject": 3 / 4, "object": 1 / 2, "predicate": 0, "micro": 4 / 7, "macro": 5 / 12}
    )


def test_recall_by_hand() -> None:
    assert values("recall", [1, 2, 5, 6], [""] * 4) == {"top1": 0.25, "top5": 0.75}


def test_answers_by_hand() -> None:
    assert values("answers", [1, 2, 1, 1], ["binary", "binary", "number", "colour"]) == {
        "binary": 0.5,
        "other": 1.0,
        "all": 0.75,
    }


def test_winoground_hits_by_hand() -> None:
    assert values("winoground", [1, 1, 2, 3, 4], ["Object"] * 5) == {"text": 0.6, "image": 0.6, "group": 0.4}
    assert HEADLINES.keys() == METRICS.keys()


def test_chance_of_winoground_ranks() -> None:
    """All orders of four scores are equally likely."""
    ranks = [rank(np.array(order).reshape(2, 2), ((0, 0), (1, 1))) for order in permutations(range(4))]
    assert [ranks.count(n) / len(ranks) for n in (1, 2, 3, 4)] == pytest.approx(WINOGROUND_CHANCE)


@pytest.mark.parametrize(
    ("name", "ranks", "categories", "message"),
    [
        ("slots", [1, 1], ["subject", "object"], "no examples of category 'predicate'"),
        ("slots", [1], ["verb"], "'verb' is not a slot"),
        ("answers", [1], ["binary"], "no examples of category 'other'"),
        ("answers", [1], ["number"], "no examples of category 'binary'"),
        ("recall", [], [], "no examples"),
        ("recall", [0], [""], "counted from 1"),
        ("winoground", [1, 5], ["", ""], "1 to 4, found 1 to 5"),
        ("winoground", [], [], "no examples"),
    ],
)
def test_empty_groups_are_errors(name: str, ranks: list[int], categories: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METRICS[name](np.array(ranks), categories)


def test_top_5_is_of_examples_with_more_than_five_candidates() -> None:
    ranks = np.array([1, 4, 6, 2])
    hits = all_hits("recall", ranks, ["all"] * 4, [5, 6, 10, 2])
    assert hits["top5"][1][0].tolist() == [False, True, True, False]
    assert set(all_hits("recall", ranks, ["all"] * 4, [5, 5, 5, 2])) == {"top1"}


def test_the_user_s_categories_have_their_accuracy() -> None:
    hits = METRICS["categories"](np.array([1, 2, 1]), ["dogs", "dogs", "cats"])
    assert {name: mask.tolist() for name, (_, [mask]) in hits.items() if " " in name} == {
        "top1 cats": [False, False, True],
        "top1 dogs": [True, True, False],
    }
    assert set(METRICS["categories"](np.array([1, 2]), ["all", "all"])) == {"top1", "top5"}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2), st.integers(1, 4), st.data())
def test_expected_hits_are_the_mean_over_all_orders_of_tied_candidates(
    ahead: int, tied: int, data: st.DataObject
) -> None:
    right = data.draw(st.integers(1, tied))
    places = [min(order[:right]) for order in permutations(range(1, tied + 1))]  # of the first right one
    one = [np.array([number]) for number in (ahead, tied, right)]
    for k in (1, 2, 3):

        def hits(ranks: np.ndarray, k: int = k) -> dict[str, Hits]:
            return {"top": ((ranks <= k).astype(float), [np.array([True])])}

        [expected] = expected_hits(hits, *one, two_by_two=False)["top"][0]
        assert expected == pytest.approx(np.mean([ahead + place <= k for place in places]))
