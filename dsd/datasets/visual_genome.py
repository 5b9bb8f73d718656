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
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from dsd.datasets.raw import ANNOTATIONS, IMAGES, Benchmark, RawExample, read_annotations, write_annotations
from dsd.downloads import fetch, fetch_all, opened
from dsd.errors import DataError, ParamsError
from dsd.fewshot import Split, split
from dsd.mutation import SLOTS, Slot, valid_negative
from dsd.params import ComvgDataset, UrlParams, VisualGenomeDataset, VisualGenomeParams
from dsd.store import digest

log = logging.getLogger(__name__)

RAW = "raw"  # the folder of the files as published
LEAST_AREA = 0.01  # of a picture, that a box of a clear relation covers
FREQUENT = 20  # annotations of a word that triplets are made of
SAME_BOX = 0.7  # intersection over union from which two boxes are one thing
SAME_WORD = 0.02  # share of the rarer word's uses from which two words may mean the same
TRIES = 50  # pictures that are looked at for a negative of one value
CHUNK = 1 << 20  # characters read at a time
LONGEST = 1 << 24  # characters of an entry
HEAD = re.compile(r"(?<=\w) (?:and|at|in|of|on|with) ")  # what follows is no part of "man" in "man in black"
PHRASE = {"noun": re.compile(r"[a-z]+( [a-z]+)?"), "predicate": re.compile(r"[a-z]+( [a-z]+){0,2}")}
# Nouns that take no article, among them those that end in a single s.
UNCOUNTED = re.compile(
    r"bread|cheese|children|clothing|dirt|feet|food|fruit|grass|gravel|hair|ice|men|mud|people|rice|sand|sheep|snow|"
    r"teeth|traffic|water|women|wood|\w*[^su]s"
)


@dataclass(frozen=True, eq=False, slots=True)
class Word:
    """A noun or predicate as it was annotated: its name, and everything that a word for the same would share."""

    name: str
    keys: frozenset[str]
    group: str  # the first name of its class of aliases

    def same(self, other: Word) -> bool:
        return not self.keys.isdisjoint(other.keys)


class Relation(NamedTuple):
    subject: Word
    predicate: Word
    object: Word

    def names(self) -> tuple[str, str, str]:
        return self.subject.name, self.predicate.name, self.object.name

    def groups(self, without: Slot) -> tuple[str, ...]:
        """What a triplet that is mutated in a slot keeps."""
        return tuple(getattr(self, slot).group for slot in SLOTS if slot != without)


@dataclass(frozen=True, slots=True)
class Picture:
    """What is annotated: all nouns, all relations, and those of the relations that are clear."""

    nouns: list[Word]
    relations: list[Relation]
    clear: list[Relation]


class Words:
    """Nouns, or predicates: one `Word` for each that is annotated, how often each is, and which mean the same."""

    def __init__(self, kind: str, aliases: Mapping[str, Sequence[str]]) -> None:
        self.uses: Counter[str] = Counter()
        self.together: Counter[tuple[str, str]] = Counter()
        self._kind, self._aliases = kind, aliases
        self._words: dict[tuple[tuple[str, ...], tuple[str, ...]], Word] = {}

    def __call__(self, names: Sequence[str], synsets: Sequence[str]) -> Word:
        known = self._words.get(key := (tuple(names), tuple(synsets)))
        if known is None:
            plain = [" ".join(name.lower().split()) for name in names] or [""]
            heads = {HEAD.split(name)[0].split()[-1] for name in plain if name and self._kind == "noun"}
            keys = {*plain, *synsets, *heads, *(head.removesuffix("s") for head in heads)} - {""}
            keys |= {first for name in keys for first in self._aliases.get(name, ())}
            group = min(self._aliases.get(plain[0], plain[:1]))
            known = self._words[key] = Word(plain[0], frozenset(keys), group)
        return known

    def count(self, words: Iterable[Word], same: Iterable[tuple[Word, Word]]) -> None:
        """Takes note of uses, and of pairs of words for one thing; aliases count as one word."""
        self.uses.update(word.group for word in words)
        self.together.update(_pair(a, b) for a, b in same if a.group != b.group)

    def plain(self, word: Word) -> bool:
        """Whether sentences can be made of it."""
        return self.uses[word.group] >= FREQUENT and PHRASE[self._kind].fullmatch(word.name) is not None

    def distinct(self, a: Word, b: Word) -> bool:
        """Whether what the one is said of is surely none of the other."""
        rarer = min(self.uses[a.group], self.uses[b.group])
        return not a.same(b) and self.together[_pair(a, b)] <= SAME_WORD * rarer


def _pair(a: Word, b: Word) -> tuple[str, str]:
    return (a.group, b.group) if a.group < b.group else (b.group, a.group)


@dataclass
class Genome:
    """The annotations: pictures by their number, the address of each, and the words."""

    nouns: Words
    predicates: Words
    pictures: dict[int, Picture] = field(default_factory=dict)
    addresses: dict[int, str] = field(default_factory=dict)

    def words(self, slot: Slot) -> Words:
        return self.predicates if slot == "predicate" else self.nouns

    def may_hold(self, picture: Picture, triplet: Relation) -> bool:
        """Whether a relation of the picture might be meant as the triplet. A triplet is false only where none is."""

        def meant(relation: Relation) -> bool:
            return not any(self.words(slot).distinct(getattr(relation, slot), getattr(triplet, slot)) for slot in SLOTS)

        return any(map(meant, picture.relations))


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


# Reading


def fetched(row: UrlParams, folder: Path, key: str) -> Path:
    """The file of a row of params, the part of its `key` after the last dot in its name; what is there is kept."""
    target = folder / RAW / _raw_name(row, key)
    fetch(row.source, target, setting=key, sha256=row.sha256)
    return target


def prune_raw(rows: Mapping[str, UrlParams], folder: Path) -> None:
    """Removes published files that are of none of these rows, by key."""
    keep = {_raw_name(row, key) for key, row in rows.items()}
    for path in (folder / RAW).glob("*"):
        if path.name not in keep:
            path.unlink()


def files(annotations: VisualGenomeParams, key: str) -> dict[str, UrlParams]:
    """The rows of the four files by their keys."""
    return {f"{key}.{name}": getattr(annotations, name) for name in VisualGenomeParams.model_fields}


def _raw_name(row: UrlParams, key: str) -> str:
    return f"{key.rpartition('.')[2]}-{digest(row.source)[:12]}"


def read_genome(annotations: VisualGenomeParams, folder: Path, key: str) -> Genome:
    """Fetches the annotations and reads them.

    Raises:
        DataError: a file that cannot be fetched, or one that is not what it should be; says where.
    """
    paths = {name: fetched(row, folder, name) for name, row in files(annotations, key).items()}
    genome = Genome(
        Words("noun", read_aliases(paths[f"{key}.object_aliases"])),
        Words("predicate", read_aliases(paths[f"{key}.relationship_aliases"])),
    )
    areas: dict[int, int] = {}
    for place, entry in _entries(paths[f"{key}.image_data"]):
        with _told(place):
            number, url = _number(entry["image_id"]), entry["url"]
            if re.fullmatch(r"https?://\S+", url) is None:
                raise ValueError(f"url {url!r} is no http(s) address")
            areas[number], genome.addresses[number] = _number(entry["width"]) * _number(entry["height"]), url
    for place, entry in _entries(paths[f"{key}.relationships"]):
        with _told(place):
            number = _number(entry["image_id"])
            if number in genome.pictures:
                raise ValueError(f"image_id {number} has come before")
            if number in areas:
                genome.pictures[number] = _picture(entry["relationships"], areas[number], genome)
    return genome


def read_aliases(path: Path) -> dict[str, list[str]]:
    """The first names of the classes that each name is in; a line is a class, its names are between commas."""
    aliases: dict[str, list[str]] = defaultdict(list)
    with opened(path) as lines:
        for line in lines:
            names = [name for name in (" ".join(name.lower().split()) for name in line.split(",")) if name]
            for name in names:
                aliases[name].append(names[0])
    return dict(aliases)


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Turns what is wrong with an entry into one line that says where."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{place}: no key {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{place}: not as expected: {error}") from None


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no number")
    return value


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Each entry of a JSON list of objects with its place; no more of the file than one entry is held at a time.

    Raises:
        DataError: no such list, or one that ends early or has anything else between its entries.
    """
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    with opened(path) as text:
        buffer, at, number, before = "", 0, 0, "["
        while True:
            try:
                at = _end(blank, buffer, at)
                if buffer[at : at + 1] == "]" and number:
                    break
                if buffer[at : at + 1] != before:
                    raise ValueError(f"a {before!r} is missing")
                start = _end(blank, buffer, at + 1)
                if buffer[start : start + 1] == "]" and not number:
                    at = start
                    break
                if buffer[start : start + 1] != "{":
                    raise ValueError("an entry is no object")
                entry, at = decode(buffer, start)
            except (ValueError, RecursionError) as error:
                # Also what a piece of the file looks like that ends inside an entry: one more may complete it.
                more = text.read(CHUNK) if len(buffer) - at < LONGEST else ""
                if not more:
                    raise DataError(f"{path}: broken JSON after {number} entries: {error}") from None
                buffer, at = buffer[at:] + more, 0
                continue
            number, before = number + 1, ","
            yield f"{path}: entry {number}", entry
        while buffer:
            if _end(blank, buffer, at + 1) < len(buffer):
                raise DataError(f"{path}: something follows the list")
            buffer, at = text.read(CHUNK), -1


def _end(blank: re.Pattern[str], buffer: str, at: int) -> int:
    found = blank.match(buffer, at)
    assert found is not None  # it matches nothing, too
    return found.end()


def _picture(relationships: Any, area: int, genome: Genome) -> Picture:
    """A picture's relations; its words are counted."""
    things: dict[Any, Word] = {}
    boxes: dict[Any, tuple[float, float, float, float]] = {}
    said: dict[tuple[Any, Any], set[Word]] = defaultdict(set)
    relations: dict[Relation, None] = {}
    clear: dict[Relation, None] = {}
    for entry in relationships:
        ends = entry["subject"], entry["object"]
        for end in ends:
            things[end["object_id"]] = genome.nouns(_names(end), end.get("synsets", ()))
            boxes[end["object_id"]] = end["x"], end["y"], end["w"], end["h"]
        subject, obj = (end["object_id"] for end in ends)
        predicate = genome.predicates((entry["predicate"],), entry.get("synsets", ()))
        said[subject, obj].add(predicate)
        relation = Relation(things[subject], predicate, things[obj])
        relations[relation] = None
        if min(end["w"] * end["h"] for end in ends) >= max(LEAST_AREA * area, 1) and subject != obj:
            clear[relation] = None
    genome.nouns.count(things.values(), _one_thing(list(things.values()), list(boxes.values())))
    for predicates in said.values():
        genome.predicates.count(predicates, combinations(predicates, 2))
    return Picture(list(dict.fromkeys(things.values())), list(relations), list(clear))


def _names(end: Mapping[str, Any]) -> Sequence[str]:
    """Some versions have one `name`, others a list of `names`."""
    names = end["names"] if "names" in end else [end["name"]]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names {names!r}")
    return names


def _one_thing(words: Sequence[Word], boxes: Sequence[tuple[float, ...]]) -> Iterator[tuple[Word, Word]]:
    """The pairs of words whose boxes [N, 4] of x, y, width and height are nearly the same."""
    if len(boxes) < 2:
        return
    box_N4 = np.array(boxes, dtype=np.float64)
    low_N2, size_N2 = box_N4[:, :2], np.maximum(box_N4[:, 2:], 0)
    high_N2 = low_N2 + size_N2
    sides_NN2 = np.minimum(high_N2[:, None], high_N2) - np.maximum(low_N2[:, None], low_N2)
    both_NN, area_N = np.maximum(sides_NN2, 0).prod(axis=-1), size_N2.prod(axis=-1)
    same_NN = both_NN > SAME_BOX * (area_N[:, None] + area_N - both_NN)
    for i, j in np.argwhere(np.triu(same_NN, 1)):
        yield words[i], words[j]


# Mutating


def mutations(genome: Genome, size: int, seed: int, *, without: Collection[int] = ()) -> list[Mutation]:
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
    """Clear relations of frequent words, in an order that goes by hashes, and by what a mutation keeps of them."""

    def __init__(self, genome: Genome, seed: int, without: Collection[int]) -> None:
        self._genome, self._seed = genome, seed
        usable = (
            (self._hash(number, *relation.names()), number, relation)
            for number, picture in genome.pictures.items()
            if number not in without
            for relation in picture.clear
            if not relation.subject.same(relation.object)
            and all(genome.words(slot).plain(getattr(relation, slot)) for slot in SLOTS)
        )
        self._relations = [(number, relation) for _, number, relation in sorted(usable, key=lambda row: row[:2])]
        self._values: dict[Slot, dict[tuple[str, ...], dict[str, list[tuple[int, Relation]]]]] = {}
        for slot in SLOTS:
            groups = self._values[slot] = defaultdict(lambda: defaultdict(list))
            for number, relation in self._relations:
                groups[relation.groups(slot)][getattr(relation, slot).name].append((number, relation))

    def _hash(self, *parts: object) -> bytes:
        return hashlib.sha256("/".join(map(str, (self._seed, *parts))).encode()).digest()

    def positives(self, slot: Slot) -> Iterator[tuple[int, Relation]]:
        """Each triplet once, then each that there is a second time, and so on: the frequent ones are not all."""
        seen: Counter[tuple[str, str, str]] = Counter()
        rounds: dict[int, list[tuple[int, Relation]]] = defaultdict(list)
        for number, relation in self._relations:
            seen[relation.names()] += 1
            rounds[seen[relation.names()]].append((number, relation))
        for turn in sorted(rounds):
            yield from sorted(rounds[turn], key=lambda row: self._hash(slot, *row[1].names()))

    def negative(self, slot: Slot, number: int, original: Relation, used: Collection[int]) -> Mutation | None:
        """A valid negative of a triplet that holds in a picture, its value in the slot chosen evenly."""
        genome, was, positive = self._genome, getattr(original, slot), self._genome.pictures[number]
        rng = Random(f"{self._seed}/{slot}/{number}/{'/'.join(original.names())}")
        values = self._values[slot][original.groups(slot)]
        for value in rng.sample(sorted(values), len(values)):
            start, rows = rng.randrange(len(values[value])), values[value]
            free = (row for row in (*rows[start:], *rows[:start]) if row[0] not in used and row[0] != number)
            for _, (other, relation) in zip(range(TRIES), free, strict=False):
                now, negative = getattr(relation, slot), genome.pictures[other]
                if not genome.words(slot).distinct(was, now):
                    break
                mutated = original._replace(**{slot: now})
                if slot != "predicate" and (_shows(positive, now) or _shows(negative, was)):
                    continue
                if valid_negative(
                    original,
                    mutated,
                    true_of_positive=partial(genome.may_hold, positive),
                    true_of_negative=partial(genome.may_hold, negative),
                ):
                    return Mutation(slot, original.names(), mutated.names(), number, other)
        return None


def _shows(picture: Picture, noun: Word) -> bool:
    return any(noun.same(other) for other in picture.nouns)


# Examples


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
    without: Collection[int] = (),
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
    images, true = (picture(mutation.positive), picture(mutation.negative)), Random(identity).randrange(2)
    texts: tuple[str, ...] = (sentence(mutation.original),)
    answer: tuple[tuple[int, int], ...] = ((true, 0),)
    if name == "train":
        texts, answer = (*texts, sentence(mutation.mutated)), (*answer, (1 - true, 1))
    return RawExample(identity, name, images[::-1] if true else images, texts, answer, mutation.slot)


def picture(number: int) -> str:
    """The file name of a picture."""
    return f"{number}.jpg"


def complete(
    examples: Sequence[RawExample], addresses: Mapping[str, Sequence[str]], folder: Path, missing: int, *, key: str
) -> None:
    """Fetches the pictures of the examples from their addresses by name, and writes the annotations.

    What is left of other params is removed. Where `missing` pictures or fewer cannot be had, the examples that need
    them are left out.

    Raises:
        DataError: more pictures cannot be had.
    """
    needed, images = list(dict.fromkeys(name for example in examples for name in example.images)), folder / IMAGES
    lost = dict(fetch_all({name: addresses[name] for name in needed}, images, setting=key))
    if lost:
        some = ", ".join(f"{name} ({reason})" for name, reason in list(lost.items())[:3])
        told = f"{len(lost)} of {len(needed)} pictures cannot be had: {some}{', …' if len(lost) > 3 else ''}"
        if len(lost) > missing:
            raise DataError(f"{key}.missing: {missing}, but {told}; with {len(lost)} the run goes on without them")
        log.warning("%s: %s", key, told)
    whole = [example for example in examples if lost.keys().isdisjoint(example.images)]
    if len(whole) < len(examples):
        log.warning("%s: %d of %d examples left out with them", key, len(examples) - len(whole), len(examples))
    for stale in images.glob("*"):
        if stale.name not in needed:
            stale.unlink()
    write_annotations(folder, whole)


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
    addresses = {picture(number): (url,) for number, url in genome.addresses.items()}
    prune_raw(files(row.annotations, f"{key}.annotations"), folder)
    complete(examples, addresses, folder, row.missing, key=key)


def examples(folder: Path, row: VisualGenomeDataset | ComvgDataset, *, seed: int) -> Iterator[RawExample]:
    """What a download has annotated; see `dsd.datasets.raw.Examples`.

    Raises:
        DataError: no annotations, broken ones, or annotations of another kind or seed.
    """
    prefix = f"{row.kind}/{seed}/"
    for example in read_annotations(folder):
        if not example.id.startswith(prefix):
            raise DataError(f"{folder / ANNOTATIONS}: {example.id} is not of {prefix}; download the dataset again")
        yield example


BENCHMARK = Benchmark(
    _download,
    examples,
    metrics="slots",
    citation="Krishna et al., Visual Genome, IJCV 2017 (arXiv:1602.07332)",
    licence="annotations CC BY 4.0; pictures are those of YFCC100M and MS-COCO, under their owners' licences",
)
