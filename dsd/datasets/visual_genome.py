"""visual-genome: two real images, one sentence; which image is it true of? Made by mutation, as in ComVG (2 × 1).

The triplets are the relations annotated in Visual Genome. The annotations are free text and incomplete, so a negative
has to pass strict tests:

- *Clear relations.* Both boxes cover at least a hundredth of the image, the nouns are one or two plain words, the
  predicate up to three, each is annotated at least 20 times (aliases included), and subject and object are two objects.
- *Same or different words.* Nouns, and predicates, are the same if they share a class of the alias files, a synset,
  or (nouns) the last word. Annotators use more synonyms than the files list. Two words therefore also count as the
  same if more than one in fifty uses of the rarer word is for the same object as the other word. The same object is,
  for nouns, two boxes that overlap by seven tenths ("man", "surfer"), and for predicates the same two boxes ("on",
  "riding").
- *Verified negatives.* The original holds in the positive image, the mutated triplet in the negative one, and neither
  image has a relation that may mean the other triplet. A noun that was replaced is nowhere in the other image.

Each image is in one example only, so no two examples share anything. The three slots take turns, and splits are
assigned in groups of three, one of each slot. The selection depends on hashes of names and numbers, not on the order of
the files.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from random import Random

from dsd.config import PublishedDataset, VisualGenomeDataset
from dsd.data.splits import Split, split_groups
from dsd.datasets.annotations import ANNOTATIONS, RawExample, image_choice
from dsd.datasets.protocol import Benchmark, Expected
from dsd.datasets.published import fetch_images
from dsd.datasets.raw_files import prune_raw, raw_size
from dsd.datasets.relations import Genome, Relation, Word, annotation_files, read_genome
from dsd.errors import DataError, ParamsError
from dsd.scenes.captions import with_article
from dsd.scenes.mutation import SLOTS, Slot, valid_negative

TRIES = 50  # images that are tested as the negative for one value
# Nouns without an article, among them those that end in a single s.
UNCOUNTED = re.compile(
    r"bread|cheese|children|clothing|dirt|feet|food|fruit|grass|gravel|hair|ice|men|mud|people|rice|sand|sheep|snow|"
    r"teeth|traffic|water|women|wood|\w*[^su]s"
)

Occurrence = tuple[int, Relation]  # the number of an image, and a relation in it


@dataclass(frozen=True, slots=True)
class Mutation:
    """A triplet that holds in the positive image, and a mutated one that holds in the negative image."""

    slot: Slot
    original: tuple[str, str, str]
    mutated: tuple[str, str, str]
    positive: int
    negative: int

    @property
    def name(self) -> str:
        return f"{self.slot}/{self.positive}-{self.negative}"


def mutations(genome: Genome, size: int, seed: int, *, without: Set[int] = frozenset()) -> list[Mutation]:
    """Return up to `size` mutations; the slots take turns, and no image is used twice or is in `without`."""
    index = _Index(genome, seed, without)
    used: set[int] = set()
    result: list[Mutation] = []
    streams = {slot: index.positives(slot) for slot in SLOTS}
    while len(result) < size:
        slot = SLOTS[len(result) % len(SLOTS)]
        candidates = (index.negative(slot, *positive, used) for positive in streams[slot] if positive[0] not in used)
        mutation = next((mutation for mutation in candidates if mutation is not None), None)
        if mutation is None:
            break
        used |= {mutation.positive, mutation.negative}
        result.append(mutation)
    return result


class _Index:
    """Clear relations of plain words, by triplet and by what a mutation keeps of it, ordered by hash."""

    def __init__(self, genome: Genome, seed: int, without: Set[int]) -> None:
        self._genome, self._seed = genome, seed
        nouns, predicates = genome.nouns.plain(), genome.predicates.plain()
        by_triplet: dict[tuple[str, str, str], list[Occurrence]] = defaultdict(list)
        for number in sorted(genome.images.keys() - without):
            for relation in genome.images[number].clear:
                subject, predicate, obj = relation
                if predicate in predicates and {subject, obj} <= nouns and not subject.same(obj):
                    by_triplet[relation.names()].append((number, relation))
        self._by_triplet = {triplet: by_triplet[triplet] for triplet in sorted(by_triplet)}
        # slot → what a mutation of the slot keeps → value of the slot → occurrences of each triplet
        self._values: dict[Slot, dict[tuple[str, ...], dict[str, list[list[Occurrence]]]]] = {}
        for slot in SLOTS:
            self._values[slot] = defaultdict(lambda: defaultdict(list))
        for triplet, occurrences in self._by_triplet.items():
            occurrences.sort(key=lambda occurrence: self._hash(occurrence[0], *triplet))
            for slot, name in zip(SLOTS, triplet, strict=True):
                self._values[slot][occurrences[0][1].groups(slot)][name].append(occurrences)

    def _hash(self, *parts: object) -> bytes:
        return hashlib.sha256("/".join(map(str, (self._seed, *parts))).encode()).digest()

    def positives(self, slot: Slot) -> Iterator[Occurrence]:
        """Yield each triplet once, then each that occurs a second time, and so on, so frequent ones do not dominate."""
        order = sorted(self._by_triplet, key=lambda triplet: self._hash(slot, *triplet))
        for turn in count():
            order = [triplet for triplet in order if len(self._by_triplet[triplet]) > turn]
            if not order:
                return
            yield from (self._by_triplet[triplet][turn] for triplet in order)

    def negative(self, slot: Slot, number: int, original: Relation, used: Set[int]) -> Mutation | None:
        """Return a mutation with a valid negative for the triplet of image `number`, in an unused image."""
        genome, old, positive = self._genome, getattr(original, slot), self._genome.images[number]
        for other, new in self._others(slot, number, original, used):
            mutated, negative = original._replace(**{slot: new}), genome.images[other]
            if slot != "predicate" and (positive.shows(new) or negative.shows(old)):
                continue
            if valid_negative(
                original,
                mutated,
                true_of_positive=partial(genome.may_hold, positive),
                true_of_negative=partial(genome.may_hold, negative),
            ):
                return Mutation(slot, original.names(), mutated.names(), number, other)
        return None

    def _others(self, slot: Slot, number: int, original: Relation, used: Set[int]) -> Iterator[tuple[int, Word]]:
        """Yield unused images with another value in the slot; values in random order, at most `TRIES` images each."""
        vocabulary, old = self._genome.vocabulary(slot), getattr(original, slot)
        rng = Random(f"{self._seed}/{slot}/{number}/{'/'.join(original.names())}")
        values = self._values[slot][original.groups(slot)]
        for value in rng.sample(sorted(values), len(values)):
            occurrences = list(chain.from_iterable(values[value]))
            start = rng.randrange(len(occurrences))
            rotated = chain(occurrences[start:], occurrences[:start])
            pairs = ((other, getattr(relation, slot)) for other, relation in rotated)
            unused = (pair for pair in pairs if pair[0] not in used and pair[0] != number)
            yield from (pair for pair in islice(unused, TRIES) if vocabulary.distinct(old, pair[1]))


def sentence(triplet: tuple[str, str, str]) -> str:
    subject, predicate, obj = triplet
    return f"{_with_article(subject)} {predicate} {_with_article(obj)}"


def _with_article(noun: str) -> str:
    if UNCOUNTED.fullmatch(noun.split()[-1]):
        return noun
    return with_article(noun)


def mutated_examples(
    genome: Genome, row: PublishedDataset, size: int, test: int, *, seed: int, key: str, without: Set[int] = frozenset()
) -> list[RawExample]:
    """Return the examples of the row's splits, out of `size` mutations.

    In the few-shot split an example also has the mutated sentence, which is true of the negative image (2 × 2).

    Args:
        key: the row's key.

    Raises:
        ParamsError: the annotations give fewer than `size` mutations, or these are too few for the splits.
    """
    made = mutations(genome, size, seed, without=without)
    if len(made) < size:
        raise ParamsError(f"{key}.size: {size} requested, the annotations give {len(made)}")
    groups = [made[n - n % len(SLOTS)].name for n in range(size)]
    few_shot, validation = round(row.few_shot * size), round(row.validation * size)
    try:
        splits = split_groups(groups, few_shot=few_shot, validation=validation, test=test, seed=seed, sample=row.sample)
    except DataError as error:
        raise ParamsError(f"{key}.size: {error}") from None
    prefix = f"{row.kind}/{seed}"
    return [_example(prefix, m, splits[group]) for m, group in zip(made, groups, strict=True) if group in splits]


def file_name(number: int) -> str:
    """Return the file name of an image."""
    return f"{number}.jpg"


def _example(prefix: str, mutation: Mutation, split: Split) -> RawExample:
    images = file_name(mutation.positive), file_name(mutation.negative)
    texts = sentence(mutation.original), sentence(mutation.mutated)
    return image_choice(f"{prefix}/{mutation.name}", split, images, texts, mutation.slot)


def _download(row: VisualGenomeDataset, *, seed: int, folder: Path, workers: int) -> None:
    """Implement `protocol.Download`; `workers` is not used: the threads that fetch are those of `downloads`.

    Raises:
        ParamsError: `size` is more than the annotations give, or less than the splits require.
        DataError: files or images cannot be fetched, or files are invalid.
    """
    key = f"datasets.{folder.name}"
    (folder / ANNOTATIONS).unlink(missing_ok=True)
    genome = read_genome(row.annotations, folder, f"{key}.annotations")
    examples = mutated_examples(genome, row, row.size, row.test, seed=seed, key=key)
    prune_raw(annotation_files(row.annotations, f"{key}.annotations"), folder)
    fetch_images(folder, examples, {file_name(number): (url,) for number, url in genome.urls.items()}, row.missing)


BENCHMARK = Benchmark(
    "visual-genome",
    _download,
    metrics="slots",
    citation="Krishna et al., Visual Genome, IJCV 2017 (arXiv:1602.07332)",
    licence="annotations CC BY 4.0; images are those of YFCC100M and MS-COCO, under their owners' licences",
    expected=lambda row: Expected(row.size, row.test, 2, 1),
    remote=lambda name, row: raw_size(annotation_files(row.annotations, f"datasets.{name}.annotations")),
)
