"""The embedded benchmarks: true texts are true, false texts are clearly false, and neither the image nor the text alone
reveals the answer."""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dsd import datasets
from dsd.config import DrawnDataset, load
from dsd.datasets import DATASETS, RawExample, benchmark, scenes_cls, scenes_com, scenes_ref, scenes_vqa
from dsd.datasets.annotations import read_annotations, write_annotations
from dsd.datasets.synthetic import Composed, arguable, rivals
from dsd.errors import DataError, ParamsError
from dsd.metrics import METRICS
from dsd.scenes.captions import binary_question, open_question, vocabulary
from dsd.scenes.mutation import SLOTS
from dsd.scenes.world import BACKGROUNDS, COLOURS, PREDICATES, SHAPES, Noun, Scene, Triplet, facts, holds
from tests.test_scenes import answer, world

ROOT = Path(__file__).parent.parent
COMPOSE = {
    "scenes-com": scenes_com.compose,
    "scenes-ref": scenes_ref.compose,
    "scenes-vqa": scenes_vqa.compose,
    "scenes-cls": scenes_cls.compose,
}
COUNT = {"scenes-com": 400, "scenes-ref": 500, "scenes-vqa": 500, "scenes-cls": 192}


def row(kind: str, **changes: object) -> DrawnDataset:
    """A small dataset of a kind: 3 train, 3 validation and 3 test examples."""
    fields = dict(kind=kind, size=60, few_shot=0.05, sample=0, validation=0.05, test=3)
    optional = {
        "scenes-ref": {"candidates": 10},
        "scenes-vqa": {"binary": 0.5},
        "scenes-cls": {"template": "there is {} inside"},
    }
    return DrawnDataset.model_validate(fields | optional.get(kind, {}) | changes)


@cache
def items(kind: str) -> tuple[Composed, ...]:
    return tuple(COMPOSE[kind](f"{kind}/0/{index}", index, "test", row(kind)) for index in range(COUNT[kind]))


def examples_of(kind: str) -> Iterator[tuple[RawExample, list[Scene]]]:
    """Each example with the scenes of its images."""
    for item in items(kind):
        for example in item.examples:
            yield example, [item.scenes[name] for name in example.images]


def parse(text: str) -> Triplet:
    """Parse the triplet of a sentence or a referring expression."""
    phrase = re.sub(r"^(a picture of|there is) ", "", text).replace(" that is ", " ")
    found = re.fullmatch(r"(?:an?|the) (\w+) (\w+) (?:is )?(.+) (?:an?|the) (\w+) (\w+)", phrase)
    assert found is not None, text
    return Triplet(Noun(found[1], found[2]), found[3], Noun(found[4], found[5]))


def layout(scene: Scene) -> tuple[object, ...]:
    return scene.things, scene.background


def test_the_table() -> None:
    params = load(ROOT / "params.yaml")
    assert {row.kind for row in params.datasets.values()} | set(COMPOSE) <= set(DATASETS)
    assert all(entry.metrics in METRICS and entry.citation and entry.licence for entry in DATASETS.values())
    with pytest.raises(DataError, match=r"unknown kind of dataset 'scenes-con': did you mean 'scenes-com'\?"):
        benchmark("scenes-con")


FAKE = """
from dsd.datasets.annotations import RawExample, write_annotations
from dsd.datasets.protocol import Benchmark, Expected

def download(row, *, seed, folder, workers):
    write_annotations(folder, [RawExample(f"fake/{seed}/0", "test", ("0.png",), ("a", "b"), ((0, 1),), "all")])

BENCHMARK = Benchmark(
    "fake", download, "recall", "nobody", "none", expected=lambda row: Expected(0, 1, 1, 2), remote=lambda name, row: 0
)
"""


def test_a_new_benchmark_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "dsd.datasets.fake", raising=False)
    monkeypatch.setattr(datasets, "fake", None, raising=False)
    table = datasets.discover()
    assert set(table) == {*DATASETS, "fake"} and all(table[kind] is entry for kind, entry in DATASETS.items())
    table["fake"].download(None, seed=5, folder=tmp_path, workers=1)
    assert [example.answer for example in table["fake"].examples(tmp_path, seed=5)] == [((0, 1),)]
    with pytest.raises(DataError, match="fake/5/0 is not of fake/6/"):
        list(table["fake"].examples(tmp_path, seed=6))


def test_arguable_is_looser_than_true() -> None:
    looser = 0
    for scene in world():
        nouns = [thing.noun for thing in scene.things]
        every = [Triplet(x, p, y) for x in nouns for p in PREDICATES for y in nouns if x != y]
        loose = {triplet for triplet in every if arguable(scene, triplet)}
        assert set(facts(scene)) <= loose
        looser += len(loose) - len(facts(scene))
    assert looser > 0


def test_rivals_are_mutual() -> None:
    for predicate in PREDICATES:
        assert predicate not in rivals(predicate)
        assert all(predicate in rivals(other) for other in rivals(predicate))
    assert "inside" not in rivals("in front of")


@pytest.mark.parametrize("kind", COMPOSE)
def test_examples_are_well_formed(kind: str) -> None:
    known, ids, files = set(vocabulary()), set(), set()
    metrics = METRICS[benchmark(kind).metrics]
    for index, item in enumerate(items(kind)):
        assert not files & set(item.scenes)
        files |= set(item.scenes)
        assert {name for example in item.examples for name in example.images} == set(item.scenes)
        for example in item.examples:
            assert example.id.startswith(f"{kind}/0/{index}")
            assert example.split == "test"
            ((image, text),) = example.answer
            assert 0 <= image < len(example.images) and 0 <= text < len(example.texts)
            assert len(set(example.images)) == len(example.images)
            assert len(set(example.texts)) == len(example.texts)
            assert {word for text in example.texts for word in text.split()} <= known
            ids.add(example.id)
    assert len(ids) == sum(len(item.examples) for item in items(kind))
    categories = [example.category for example, _ in examples_of(kind)]
    assert metrics(np.ones(len(categories), int), categories)


@pytest.mark.parametrize("kind", COMPOSE)
def test_no_scene_is_repeated_or_in_pretraining(kind: str) -> None:
    scenes = [layout(scene) for item in items(kind) for scene in item.scenes.values()]
    assert len(set(scenes)) == len(scenes)
    assert not set(scenes) & {layout(scene) for scene in world(3000)}


@pytest.mark.parametrize("kind", COMPOSE)
def test_an_item_depends_on_its_name_only(kind: str) -> None:
    item = items(kind)[3]
    assert COMPOSE[kind](f"{kind}/0/3", 3, "test", row(kind)) == item
    other = COMPOSE[kind](f"{kind}/1/3", 3, "test", row(kind))
    assert not {layout(s) for s in item.scenes.values()} & {layout(s) for s in other.scenes.values()}


# scenes-com


def test_com_positives_are_true_and_negatives_clearly_false() -> None:
    for example, scenes in examples_of("scenes-com"):
        ((true, _),) = example.answer
        original = parse(example.texts[0])
        assert holds(scenes[true], original)
        assert not arguable(scenes[1 - true], original)
        mutated = [
            other
            for other in facts(scenes[1 - true])
            if [slot for slot in SLOTS if getattr(other, slot) != getattr(original, slot)] == [example.category]
            and not arguable(scenes[true], other)
        ]
        assert mutated, example.id


def test_com_few_shot_examples_also_have_the_sentence_of_the_negative_image() -> None:
    for index in range(50):
        item = scenes_com.compose(f"few/{index}", index, "train", row("scenes-com"))
        alone = scenes_com.compose(f"few/{index}", index, "test", row("scenes-com"))
        assert item.scenes == alone.scenes
        for example, one in zip(item.examples, alone.examples, strict=True):
            assert (example.images, example.texts[:1], example.answer[:1]) == (one.images, one.texts, one.answer)
            pair, scenes = [parse(text) for text in example.texts], [item.scenes[name] for name in example.images]
            assert [slot for slot in SLOTS if getattr(pair[0], slot) != getattr(pair[1], slot)] == [example.category]
            for image, text in example.answer:
                assert holds(scenes[image], pair[text])
                assert not arguable(scenes[1 - image], pair[text])


def test_com_mutated_nouns_are_hard() -> None:
    """If subject or object is mutated, a noun of the negative image mostly shares a word with it."""
    near = []
    for item in items("scenes-com"):
        original = parse(item.examples[0].texts[0])
        for slot in ("subject", "object"):
            scene = next(scene for name, scene in item.scenes.items() if slot in name)
            noun, nouns = getattr(original, slot), [thing.noun for thing in scene.things]
            assert noun not in nouns
            near.append(any((noun.colour == other.colour) != (noun.shape == other.shape) for other in nouns))
    assert np.mean(near) > 0.8


def test_com_the_true_image_is_first_or_second_at_random() -> None:
    for slot in SLOTS:
        first = [e.answer[0][0] for e, _ in examples_of("scenes-com") if e.category == slot]
        assert len(first) == COUNT["scenes-com"]
        assert np.mean(first) == pytest.approx(0.5, abs=0.08)


def words_found(text: str, scene: Scene) -> int:
    """Count the colour and shape words of a sentence that the scene has, each on its own."""
    triplet = parse(text)
    seen = {word for thing in scene.things for word in thing.noun}
    return sum(word in seen for noun in (triplet.subject, triplet.object) for word in noun)


def test_com_is_not_solved_by_a_bag_of_words() -> None:
    won: dict[str, list[float]] = defaultdict(list)
    for example, scenes in examples_of("scenes-com"):
        ((true, _),) = example.answer
        margin = words_found(example.texts[0], scenes[true]) - words_found(example.texts[0], scenes[1 - true])
        won[example.category].append(0.5 + 0.5 * np.sign(margin))
    assert np.mean(won["predicate"]) == 0.5
    assert max(np.mean(won["subject"]), np.mean(won["object"])) < 0.85
    assert min(np.mean(won["subject"]), np.mean(won["object"])) > 0.55  # distractors do not turn it round either


def looks(scene: Scene) -> list[float]:
    """Features of a scene without its text: number, sizes, positions, variety, background."""
    sizes = sorted(thing.size for thing in scene.things)
    nouns = [thing.noun for thing in scene.things]
    xs, ys = [thing.x for thing in scene.things], [thing.y for thing in scene.things]
    count = len(sizes)
    features = [count, count == 2, count == 3, min(sizes), max(sizes), np.mean(sizes), max(sizes) ** 2]
    features += [max(sizes) / min(sizes), np.std(xs), np.std(ys), np.mean(xs), np.mean(ys)]
    features += [len({noun.colour for noun in nouns}) - count, len({noun.shape for noun in nouns}) - count]
    return [*features, *(scene.background == name for name in BACKGROUNDS)]


def accuracy_without_text(slot: str | None) -> float:
    """Accuracy of a linear classifier on `looks`, fitted to one half of the sentences and tested on the other."""
    differences, sentences = [], []
    for example, scenes in examples_of("scenes-com"):
        if slot in (None, example.category):
            ((true, _),) = example.answer
            differences.append(np.subtract(looks(scenes[true]), looks(scenes[1 - true])))
            sentences.append(int(example.id.split("/")[2]))
    features, half = np.array(differences, float), np.array(sentences) < COUNT["scenes-com"] // 2
    right = []
    for fitted in (half, ~half):
        weights: NDArray[np.float64] = np.linalg.lstsq(features[fitted], np.ones(fitted.sum()), rcond=None)[0]
        scores = features[~fitted] @ weights
        right += list(np.where(np.abs(scores) < 1e-9, 0.5, scores > 0))
    return float(np.mean(right))


@pytest.mark.parametrize("slot", [None, *SLOTS])
def test_com_positive_and_negative_images_look_alike(slot: str | None) -> None:
    assert accuracy_without_text(slot) == pytest.approx(0.5, abs=0.06)


def test_com_predicates_are_as_frequent_in_negatives() -> None:
    shown: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for example, scenes in examples_of("scenes-com"):
        if example.category == "predicate":
            ((true, _),) = example.answer
            original = parse(example.texts[0])
            for positive in (True, False):
                scene = scenes[true if positive else 1 - true]
                shown[positive].update(p for p in PREDICATES if holds(scene, original._replace(predicate=p)))
    for predicate in PREDICATES:
        assert shown[True][predicate] == pytest.approx(shown[False][predicate], abs=0.08 * COUNT["scenes-com"])


# scenes-ref


def test_ref_one_candidate_is_true_and_the_others_clearly_false() -> None:
    for example, (scene,) in examples_of("scenes-ref"):
        assert 3 <= len(scene.things) <= 4
        triplets = [parse(text) for text in example.texts]
        ((_, true),) = example.answer
        assert [index for index, triplet in enumerate(triplets) if arguable(scene, triplet)] == [true]
        assert holds(scene, triplets[true])
        assert example.category == triplets[true].predicate


def test_ref_candidates_share_a_template_and_differ_by_mutation() -> None:
    slots: Counter[str] = Counter()
    for example, _ in examples_of("scenes-ref"):
        assert len({" that is " in text for text in example.texts}) == 1
        triplets = [parse(text) for text in example.texts]
        true = triplets[example.answer[0][1]]
        changed = [[slot for slot in SLOTS if getattr(t, slot) != getattr(true, slot)] for t in triplets]
        slots.update({names[0] for names in changed if len(names) == 1})
    assert all(slots[slot] > 0.75 * COUNT["scenes-ref"] for slot in SLOTS)


@pytest.mark.parametrize("sign", [1, -1])
def test_ref_texts_alone_do_not_reveal_the_answer(sign: int) -> None:
    """The true text has neither the largest nor the smallest overlap with the others."""
    right = []
    for example, _ in examples_of("scenes-ref"):
        words = [set(text.split()) for text in example.texts]
        overlap = np.array([sign * sum(len(mine & other) for other in words) for mine in words])
        best = np.flatnonzero(overlap == overlap.max())
        right.append((example.answer[0][1] in best) / len(best))
    assert np.mean(right) < 0.2


def test_ref_predicates_alone_do_not_reveal_the_answer() -> None:
    """Among the predicates of the candidates, none is the true one much more often than its share."""
    expected: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for example, _ in examples_of("scenes-ref"):
        for text in example.texts:
            expected[parse(text).predicate] += 1 / len(example.texts)
        found[example.category] += 1
    for predicate in PREDICATES:
        assert found[predicate] == pytest.approx(expected[predicate], abs=0.05 * COUNT["scenes-ref"])


def test_ref_the_true_text_has_any_index() -> None:
    places = Counter(example.answer[0][1] for example, _ in examples_of("scenes-ref"))
    assert set(places) == set(range(10))
    assert max(places.values()) < 0.16 * COUNT["scenes-ref"]


@pytest.mark.parametrize("candidates", [2, 5, 64])
def test_ref_with_other_numbers_of_candidates(candidates: int) -> None:
    for index in range(5):
        made = scenes_ref.compose(f"other/{index}", index, "train", row("scenes-ref", candidates=candidates))
        ((example,), (scene,)) = made.examples, made.scenes.values()
        true = [i for i, text in enumerate(example.texts) if arguable(scene, parse(text))]
        assert (len(set(example.texts)), true) == (candidates, [example.answer[0][1]])


# scenes-vqa


def question(example: RawExample) -> tuple[str, list[str]]:
    """The question and its candidate answers."""
    questions, _, answers = zip(*(text.partition(" ? ") for text in example.texts), strict=True)
    assert len(set(questions)) == 1
    return f"{questions[0]} ?", list(answers)


def without_nouns(asks: str) -> str:
    return re.sub(r"\b(" + "|".join((*COLOURS, *SHAPES, "an?")) + r")\b ?", "", asks)


def test_vqa_answers_are_right() -> None:
    for example, (scene,) in examples_of("scenes-vqa"):
        asks, answers = question(example)
        assert answers[example.answer[0][1]] == answer(scene, asks)
        if asks.startswith("is the ") and answer(scene, asks) == "no":
            assert not arguable(scene, parse(asks.removeprefix("is ").removesuffix(" ?")))


def test_vqa_candidates_are_the_same_mixture() -> None:
    for example, _ in examples_of("scenes-vqa"):
        answers = question(example)[1]
        assert len(set(answers)) == 13
        assert {"yes", "no", "two", "three", "four"} <= set(answers)
        assert len(set(answers) & set(COLOURS)) == len(set(answers) & set(SHAPES)) == 4


def test_vqa_the_wording_does_not_reveal_the_answer() -> None:
    """The most frequent answer to each kind of question is right about as often as chance."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for example, _ in examples_of("scenes-vqa"):
        answers[without_nouns(question(example)[0])][question(example)[1][example.answer[0][1]]] += 1
    assert len(answers) == 3 + 1 + len(PREDICATES)
    # The embedded checkpoints have met these questions in the same words.
    rng, met = Random(0), set()
    for scene in world():
        questions = [
            open_question(scene, rng),
            *(binary_question(scene, rng, expected) for expected in ("yes", "no")),
        ]
        met |= {without_nouns(asks.question) for asks in questions if asks is not None}
    assert set(answers) <= met
    majority = {kind: max(count.values()) / count.total() for kind, count in answers.items()}
    assert majority["how many things are there ?"] < 0.45
    assert majority["what colour is the ?"] < 0.25
    assert majority["what shape is the thing ?"] < 0.2
    assert majority["is there ?"] < 0.6


@cache
def binary_questions(count: int = 1200) -> tuple[tuple[str, str, Scene], ...]:
    """(question, answer, scene) of yes-or-no questions only."""
    found = []
    for index in range(count):
        made = scenes_vqa.compose(
            f"binary/{index}", index, "test", row("scenes-vqa").model_copy(update={"binary": 1.0})
        )
        ((example,), (scene,)) = made.examples, made.scenes.values()
        asks, answers = question(example)
        found.append((asks, answers[example.answer[0][1]], scene))
    return tuple(found)


def test_vqa_yes_is_as_frequent_as_no_for_each_relation() -> None:
    answers: dict[str, list[bool]] = defaultdict(list)
    for asks, expected, scene in binary_questions():
        assert expected == answer(scene, asks)
        answers[without_nouns(asks)].append(expected == "yes")
    assert len(answers) == 1 + len(PREDICATES)
    for kind, yes in answers.items():
        assert len(yes) > 50
        assert np.mean(yes) == pytest.approx(0.5, abs=0.17), kind  # three standard errors
    assert np.mean([*chain.from_iterable(answers.values())]) == pytest.approx(0.5, abs=0.045)


def test_vqa_the_number_of_things_does_not_reveal_yes_or_no() -> None:
    things = {
        expected: [len(scene.things) for _, s, scene in binary_questions() if s == expected]
        for expected in ("yes", "no")
    }
    assert np.mean(things["yes"]) == pytest.approx(np.mean(things["no"]), abs=0.14)


def test_vqa_the_candidates_do_not_reveal_the_answer() -> None:
    """Neither do the words that a yes-or-no question shares with its candidates, nor the frequency of a candidate."""
    agree: list[bool] = []
    ranks: dict[str, list[int]] = defaultdict(list)
    often = Counter(text for example, _ in examples_of("scenes-vqa") for text in question(example)[1])
    for example, _ in examples_of("scenes-vqa"):
        asks, answers = question(example)
        expected = answers[example.answer[0][1]]
        if example.category == "binary":
            named = [word for word in asks.split() if word in (*COLOURS, *SHAPES)]
            agree.append((expected == "yes") == (np.mean([word in answers for word in named]) > 0.4))
        elif example.category != "number":
            values = COLOURS if example.category == "colour" else SHAPES
            mine = [text for text in answers if text in values]
            ranks[example.category].append(sorted(mine, key=lambda text: often[text]).index(expected))
    assert np.mean(agree) == pytest.approx(0.5, abs=0.09)
    for category in ("colour", "shape"):
        assert max(Counter(ranks[category]).values()) / len(ranks[category]) < 0.4


def test_vqa_the_other_colours_of_the_scene_are_candidates() -> None:
    for example, (scene,) in examples_of("scenes-vqa"):
        if example.category in ("colour", "shape"):
            shown = {getattr(thing.noun, example.category) for thing in scene.things}
            assert shown <= set(question(example)[1])


def test_vqa_categories_and_places() -> None:
    categories = Counter(example.category for example, _ in examples_of("scenes-vqa"))
    count = COUNT["scenes-vqa"]
    assert categories["binary"] / count == pytest.approx(0.5, abs=0.06)
    for category in ("colour", "shape", "number"):
        assert categories[category] / count == pytest.approx(1 / 6, abs=0.05)
    places = Counter(example.answer[0][1] for example, _ in examples_of("scenes-vqa"))
    assert set(places) == set(range(13))
    assert max(places.values()) < 0.12 * count


@pytest.mark.parametrize("binary", [0.0, 1.0])
def test_vqa_share_of_binary_questions(binary: float) -> None:
    for index in range(10):
        made = scenes_vqa.compose(
            f"share/{index}", index, "train", row("scenes-vqa").model_copy(update={"binary": binary})
        )
        assert (made.examples[0].category == "binary") == bool(binary)


# scenes-cls


def test_cls_classes_are_equally_frequent() -> None:
    found: Counter[str] = Counter()
    for example, (scene,) in examples_of("scenes-cls"):
        assert len(set(example.texts)) == 96
        (thing,) = scene.things
        text = example.texts[example.answer[0][1]]
        assert re.fullmatch(f"there is an? {thing.noun.colour} {thing.noun.shape} inside", text)
        assert example.category == thing.noun.shape
        found[text] += 1
    assert len(found) == 96
    assert set(found.values()) == {2}


# Downloads


def download(kind: str, folder: Path, *, seed: int = 0, workers: int = 1, **changes: object) -> list[RawExample]:
    entry, fields = benchmark(kind), row(kind, **changes)
    entry.download(fields, seed=seed, folder=folder, workers=workers)
    return list(entry.examples(folder, seed=seed))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", COMPOSE)
def test_a_download_has_the_images_of_the_splits(kind: str, tmp_path: Path) -> None:
    examples = download(kind, tmp_path)
    assert Counter(example.split for example in examples) == {"train": 3, "validation": 3, "test": 3}
    needed = {name for example in examples for name in example.images}
    assert {path.name for path in (tmp_path / "images").iterdir()} == needed
    assert len(needed) == (12 if kind == "scenes-com" else 9)
    images = {
        split: {n for e in examples if e.split == split for n in e.images} for split in ("train", "validation", "test")
    }
    assert sum(map(len, images.values())) == len(needed)
    with Image.open(tmp_path / "images" / min(needed)) as image:
        assert (image.size, image.mode, image.format) == ((128, 128), "RGB", "PNG")


def test_bytes_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    download("scenes-com", one, workers=1)
    download("scenes-com", two, workers=2)
    assert contents(one) == contents(two)


def test_a_second_download_removes_the_first(tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    download("scenes-cls", tmp_path / "again", seed=1)
    download("scenes-cls", tmp_path / "again", seed=0)
    download("scenes-cls", fresh, seed=0)
    assert contents(tmp_path / "again") == contents(fresh)


def test_annotations_of_another_seed_are_refused(tmp_path: Path) -> None:
    download("scenes-cls", tmp_path)
    with pytest.raises(DataError, match=r"annotations\.jsonl: scenes-cls/0/\d+ is not of scenes-cls/1/"):
        list(benchmark("scenes-cls").examples(tmp_path, seed=1))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("scenes-cls", {"test": 55}, r"^datasets\.mine\.size: 60 rows in whole groups are too few for"),
        ("scenes-com", {"size": 62, "test": 55}, r"^datasets\.mine\.size: 60 rows in whole groups are too few for"),
    ],
)
def test_invalid_params(kind: str, changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=message):
        download(kind, tmp_path / "mine", **changes)
    assert not (tmp_path / "mine").exists()


def test_annotations_round_trip(tmp_path: Path) -> None:
    examples = [example for example, _ in examples_of("scenes-ref")][:5]
    write_annotations(tmp_path, [replace(example, texts=("naïve\u2028“text”",)) for example in examples])
    assert [example.texts for example in read_annotations(tmp_path)] == [("naïve\u2028“text”",)] * 5
    write_annotations(tmp_path, examples)
    assert list(read_annotations(tmp_path)) == examples


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"annotations\.jsonl:2: Invalid JSON"),
        ('{"id": 3}', r"annotations\.jsonl:2: id: Input should be a valid string"),
        ('{"id": "a"}', r"annotations\.jsonl:2: split: (Field required|Missing)"),
    ],
)
def test_broken_annotations(line: str, message: str, tmp_path: Path) -> None:
    write_annotations(tmp_path, [next(examples_of("scenes-cls"))[0]])
    with (tmp_path / "annotations.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        list(read_annotations(tmp_path))


def test_missing_annotations(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotations\.jsonl: no such file; download the dataset first"):
        list(read_annotations(tmp_path))
