"""visual-genome: two real pictures, one sentence; which picture is it true of? Made by mutation, as ComVG is (2 × 1).

The triplets are the relations that Visual Genome's annotators have put down. Its names are free text, and what is not
annotated may be there all the same, so a negative is taken only where much speaks for it:

- *Clear relations.* Both boxes cover a hundredth of the picture or more, the nouns are one or two plain words, the
  predicate up to three, each of them (its aliases counted) annotated 20 times or more, and subject and object are two
  things.
- *Same or other.* Nouns, and predicates, are the same where their names share a class of the alias files, a synset, or
  (nouns) the last word. Annotators use more synonyms than the files know: two words are also taken for the same where
  they are given to one and the same thing in more than one in fifty uses of the rarer of them. One thing is, for nouns,
  two boxes that overlap by seven tenths ("man", "surfer"), and for predicates the same two boxes ("on", "riding").
- *Verified negatives.* The original holds in the positive picture, the mutated triplet in the negative one, and neither
  the other way round, with no relation there that may be meant as it. A noun that was changed is nowhere in the other
  picture, in whatever relation.

A picture is in one example only, so no two examples share anything, and the three slots come in turns: splits are dealt
in threes, one of each. What is chosen goes by hashes of names and numbers, not by the order of the files.
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

from dsd.config import ComvgDataset, VisualGenomeDataset
from dsd.data.splits import Split, split
from dsd.datasets import by_url
from dsd.datasets.genome import Genome, Relation, Word, files, read_genome
from dsd.datasets.raw import ANNOTATIONS, Benchmark, Expected, RawExample, annotated
from dsd.errors import DataError, ParamsError
from dsd.scenes.mutation import SLOTS, Slot, valid_negative

TRIES = 50  # pictures that are looked at for a negative of one value
# Nouns that take no article, among them those that end in a single s.
UNCOUNTED = re.compile(
    r"bread|cheese|children|clothing|dirt|feet|food|fruit|grass|gravel|hair|ice|men|mud|people|rice|sand|sheep|snow|"
    r"teeth|traffic|water|women|wood|\w*[^su]s"
)

Row = tuple[int, Relation]  # the number of a picture, and a relation of it


@dataclass(frozen=True, slots=True)
class Mutation:
    """A triplet that holds in one picture, and a mutated one that holds in another."""

    slot: Slot
    original: tuple[str, str, str]
    mutated: tuple[str, str, str]
    positive: int
    negative: int

    @property
    def name(self) -> str:
        return f"{self.slot}/{self.positive}-{self.negative}"


def mutations(genome: Genome, size: int, seed: int, *, without: Set[int] = frozenset()) -> list[Mutation]:
    """`size` examples, or as many as there are, the slots in turns, no picture twice and none of `without`."""
    index = _Index(genome, seed, without)
    used: set[int] = set()
    found: list[Mutation] = []
    streams = {slot: index.positives(slot) for slot in SLOTS}
    while len(found) < size:
        slot = SLOTS[len(found) % len(SLOTS)]
        made = (index.negative(slot, *positive, used) for positive in streams[slot] if positive[0] not in used)
        mutation = next((mutation for mutation in made if mutation is not None), None)
        if mutation is None:
            break
        used |= {mutation.positive, mutation.negative}
        found.append(mutation)
    return found


class _Index:
    """Clear relations of plain words, by triplet and by what a mutation keeps of it, in the order of hashes."""

    def __init__(self, genome: Genome, seed: int, without: Set[int]) -> None:
        self._genome, self._seed = genome, seed
        nouns, predicates = genome.nouns.plain(), genome.predicates.plain()
        by_triplet: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
        for number in sorted(genome.pictures.keys() - without):
            for relation in genome.pictures[number].clear:
                subject, predicate, obj = relation
                if predicate in predicates and {subject, obj} <= nouns and not subject.same(obj):
                    by_triplet[relation.names()].append((number, relation))
        self._rows = {triplet: by_triplet[triplet] for triplet in sorted(by_triplet)}
        self._values: dict[Slot, dict[tuple[str, ...], dict[str, list[list[Row]]]]] = {}
        for slot in SLOTS:
            self._values[slot] = defaultdict(lambda: defaultdict(list))
        for triplet, rows in self._rows.items():
            rows.sort(key=lambda row: self._hash(row[0], *triplet))
            for slot, name in zip(SLOTS, triplet, strict=True):
                self._values[slot][rows[0][1].groups(slot)][name].append(rows)

    def _hash(self, *parts: object) -> bytes:
        return hashlib.sha256("/".join(map(str, (self._seed, *parts))).encode()).digest()

    def positives(self, slot: Slot) -> Iterator[Row]:
        """Each triplet once, then each that there is a second time, and so on: the frequent ones are not all."""
        order = sorted(self._rows, key=lambda triplet: self._hash(slot, *triplet))
        for turn in count():
            order = [triplet for triplet in order if len(self._rows[triplet]) > turn]
            if not order:
                return
            yield from (self._rows[triplet][turn] for triplet in order)

    def negative(self, slot: Slot, number: int, original: Relation, used: Set[int]) -> Mutation | None:
        """A valid negative of a triplet that holds in a picture, in a picture that is not used yet."""
        genome, was, positive = self._genome, getattr(original, slot), self._genome.pictures[number]
        for other, now in self._others(slot, number, original, used):
            mutated, negative = original._replace(**{slot: now}), genome.pictures[other]
            if slot != "predicate" and (positive.shows(now) or negative.shows(was)):
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
        """Pictures with another value in the slot, each value as likely as another, and `TRIES` of each at most."""
        words, was = self._genome.words(slot), getattr(original, slot)
        rng = Random(f"{self._seed}/{slot}/{number}/{'/'.join(original.names())}")
        values = self._values[slot][original.groups(slot)]
        for value in rng.sample(sorted(values), len(values)):
            rows = list(chain.from_iterable(values[value]))
            start = rng.randrange(len(rows))
            free = ((other, getattr(relation, slot)) for other, relation in chain(rows[start:], rows[:start]))
            unused = (row for row in free if row[0] not in used and row[0] != number)
            yield from (row for row in islice(unused, TRIES) if words.distinct(was, row[1]))


def sentence(triplet: tuple[str, str, str]) -> str:
    subject, predicate, obj = triplet
    return f"{_a(subject)} {predicate} {_a(obj)}"


def _a(noun: str) -> str:
    if UNCOUNTED.fullmatch(noun.split()[-1]):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def mutated_examples(
    genome: Genome,
    row: VisualGenomeDataset | ComvgDataset,
    size: int,
    test: int,
    *,
    seed: int,
    key: str,
    without: Set[int] = frozenset(),
) -> list[RawExample]:
    """The examples that the splits of a row ask for, out of `size` mutations.

    In the few-shot split an example also has the mutated sentence, which is true of the negative picture (2 × 2).

    Args:
        key: that of the row.

    Raises:
        ParamsError: the annotations give fewer than `size`, or these are too few for the splits.
    """
    made = mutations(genome, size, seed, without=without)
    if len(made) < size:
        raise ParamsError(f"{key}.size: {size} asked for, the annotations give {len(made)}")
    groups = [made[n - n % len(SLOTS)].name for n in range(size)]
    few_shot, validation = round(row.few_shot * size), round(row.validation * size)
    try:
        splits = split(groups, few_shot=few_shot, validation=validation, test=test, seed=seed, sample=row.sample)
    except DataError as error:
        raise ParamsError(f"{key}.size: {error}") from None
    prefix = f"{row.kind}/{seed}"
    return [_example(prefix, m, splits[group]) for m, group in zip(made, groups, strict=True) if group in splits]


def _example(prefix: str, mutation: Mutation, name: Split) -> RawExample:
    identity = f"{prefix}/{mutation.name}"
    images, true = (by_url.picture(mutation.positive), by_url.picture(mutation.negative)), Random(identity).randrange(2)
    texts: tuple[str, ...] = (sentence(mutation.original),)
    answer: tuple[tuple[int, int], ...] = ((true, 0),)
    if name == "train":
        texts, answer = (*texts, sentence(mutation.mutated)), (*answer, (1 - true, 1))
    return RawExample(identity, name, images[::-1] if true else images, texts, answer, mutation.slot)


def _download(row: VisualGenomeDataset, *, seed: int, folder: Path, workers: int) -> None:
    """See `dsd.datasets.raw.Download`; the threads that fetch are not those of `workers`, which decode.

    Raises:
        ParamsError: `size` is more than the annotations give, or less than the splits ask for.
        DataError: files or pictures that cannot be had, or files that are not what they should be.
    """
    key = f"datasets.{folder.name}"
    (folder / ANNOTATIONS).unlink(missing_ok=True)
    genome = read_genome(row.annotations, folder, f"{key}.annotations")
    examples = mutated_examples(genome, row, row.size, row.test, seed=seed, key=key)
    addresses = {by_url.picture(number): (url,) for number, url in genome.addresses.items()}
    by_url.prune_raw(files(row.annotations, f"{key}.annotations"), folder)
    by_url.complete(examples, addresses, folder, row.missing, key=key)


BENCHMARK = Benchmark(
    _download,
    annotated,
    metrics="slots",
    citation="Krishna et al., Visual Genome, IJCV 2017 (arXiv:1602.07332)",
    licence="annotations CC BY 4.0; pictures are those of YFCC100M and MS-COCO, under their owners' licences",
    expected=lambda row: Expected(row.size, row.test, 2, 1),
    remote=lambda name, row: by_url.remote(files(row.annotations, f"datasets.{name}.annotations")),
)
