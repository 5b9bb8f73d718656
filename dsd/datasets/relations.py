"""Visual Genome annotations: the relations between objects in each image, and which words mean the same.

Shapes: N boxes of an image.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsd.config import UrlParams, VisualGenomeParams
from dsd.data.downloads import open_text
from dsd.datasets.raw_files import fetch_raw
from dsd.errors import DataError
from dsd.scenes.mutation import SLOTS, Slot

log = logging.getLogger(__name__)

LEAST_AREA = 0.01  # of the image, that each box of a clear relation covers
FREQUENT = 20  # annotations of a word before triplets may contain it
SAME_BOX = 0.7  # intersection over union above which two boxes are one object
SAME_WORD = 0.02  # share of the rarer word's uses above which two words may mean the same
CHUNK = 1 << 20  # characters read at a time
LONGEST = 1 << 24  # characters of an entry
HEAD = re.compile(r"(?<=\w) (?:and|at|in|of|on|with) ")  # ends the head of a noun phrase: "man in black" is a man
PHRASE = {"noun": re.compile(r"[a-z]+( [a-z]+)?"), "predicate": re.compile(r"[a-z]+( [a-z]+){0,2}")}


@dataclass(frozen=True, eq=False, slots=True)
class Word:
    """An annotated noun or predicate, with the keys that words of the same meaning share."""

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
        """The groups of the other two slots, which a mutation keeps."""
        return tuple(getattr(self, slot).group for slot in SLOTS if slot != without)


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """All nouns, all relations, and those of the relations that are clear."""

    nouns: list[Word]
    relations: list[Relation]
    clear: list[Relation]

    def shows(self, noun: Word) -> bool:
        return any(noun.same(other) for other in self.nouns)


class Vocabulary:
    """All annotated nouns, or all predicates: how often each is used, and which mean the same."""

    def __init__(self, kind: str, aliases: Mapping[str, Sequence[str]]) -> None:
        self.uses: Counter[str] = Counter()
        self.together: Counter[tuple[str, str]] = Counter()
        self._kind, self._aliases = kind, aliases
        self._words: dict[tuple[tuple[str, ...], tuple[str, ...]], Word] = {}

    def __call__(self, names: Sequence[str], synsets: Sequence[str]) -> Word:
        """Return the word with these names and synsets."""
        word = self._words.get(key := (tuple(names), tuple(synsets)))
        if word is None:
            plain = [" ".join(name.lower().split()) for name in names] or [""]
            heads = {HEAD.split(name)[0].split()[-1] for name in plain if name and self._kind == "noun"}
            keys = {*plain, *synsets, *heads, *(head.removesuffix("s") for head in heads)} - {""}
            keys |= {first for name in keys for first in self._aliases.get(name, ())}
            group = min(self._aliases.get(plain[0], plain[:1]))
            word = self._words[key] = Word(plain[0], frozenset(keys), group)
        return word

    def count(self, words: Iterable[Word], same: Iterable[tuple[Word, Word]]) -> None:
        """Count uses of words, and pairs of words for the same object; aliases count as one word."""
        self.uses.update(word.group for word in words)
        self.together.update(_pair(a, b) for a, b in same if a.group != b.group)

    def plain(self) -> set[Word]:
        """Frequent words of plain letters; sentences consist of these only."""
        words = self._words.values()
        return {w for w in words if self.uses[w.group] >= FREQUENT and PHRASE[self._kind].fullmatch(w.name)}

    def distinct(self, a: Word, b: Word) -> bool:
        """Whether the two words certainly differ in meaning."""
        rarer = min(self.uses[a.group], self.uses[b.group])
        return not a.same(b) and self.together[_pair(a, b)] <= SAME_WORD * rarer


def _pair(a: Word, b: Word) -> tuple[str, str]:
    return (a.group, b.group) if a.group < b.group else (b.group, a.group)


@dataclass
class Genome:
    """The annotations: images by number, their URLs, and the vocabularies."""

    nouns: Vocabulary
    predicates: Vocabulary
    images: dict[int, AnnotatedImage] = field(default_factory=dict)
    urls: dict[int, str] = field(default_factory=dict)

    def vocabulary(self, slot: Slot) -> Vocabulary:
        return self.predicates if slot == "predicate" else self.nouns

    def may_hold(self, image: AnnotatedImage, triplet: Relation) -> bool:
        """Whether a relation of the image may mean the triplet. A triplet is false only if none may."""

        def same(relation: Relation) -> bool:
            return not any(
                self.vocabulary(slot).distinct(getattr(relation, slot), getattr(triplet, slot)) for slot in SLOTS
            )

        return any(map(same, image.relations))


# Reading


def annotation_files(annotations: VisualGenomeParams, key: str) -> dict[str, UrlParams]:
    """Return the rows of the four files by key."""
    return {f"{key}.{name}": getattr(annotations, name) for name in VisualGenomeParams.model_fields}


def read_genome(annotations: VisualGenomeParams, folder: Path, key: str) -> Genome:
    """Fetch and read the annotations.

    Raises:
        DataError: a file cannot be fetched, or an entry is invalid; names file and entry.
    """
    paths = {name: fetch_raw(row, folder, name) for name, row in annotation_files(annotations, key).items()}
    genome = Genome(
        Vocabulary("noun", read_aliases(paths[f"{key}.object_aliases"])),
        Vocabulary("predicate", read_aliases(paths[f"{key}.relationship_aliases"])),
    )
    areas: dict[int, int] = {}
    for where, entry in _entries(paths[f"{key}.image_data"]):
        with _entry_errors(where):
            number, url = _number(entry["image_id"]), entry["url"]
            if re.fullmatch(r"https?://\S+", url) is None:
                raise ValueError(f"url {url!r} is not an http(s) address")
            areas[number], genome.urls[number] = _number(entry["width"]) * _number(entry["height"]), url
    for where, entry in _entries(paths[f"{key}.relationships"]):
        with _entry_errors(where):
            number = _number(entry["image_id"])
            if number in genome.images:
                raise ValueError(f"image_id {number} is repeated")
            genome.images[number] = _image(entry["relationships"], areas.get(number, 0), genome)
    for number in (unlisted := genome.images.keys() - areas.keys()):
        del genome.images[number]
    if unlisted:
        log.warning("%s: %d images left out that image_data does not list", key, len(unlisted))
    return genome


def read_aliases(path: Path) -> dict[str, list[str]]:
    """Return the first names of the classes that each name is in; a line is a class, with its names between commas."""
    aliases: dict[str, list[str]] = defaultdict(list)
    with open_text(path) as lines:
        for line in lines:
            names = [name for name in (" ".join(name.lower().split()) for name in line.split(",")) if name]
            for name in names:
                aliases[name].append(names[0])
    return dict(aliases)


@contextmanager
def _entry_errors(where: str) -> Iterator[None]:
    """Translate what an invalid entry raises into a one-line error."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{where}: no key {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: not as expected: {error}") from None


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a number")
    return value


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, entry) of a JSON list of objects; only one entry is in memory at a time.

    Raises:
        DataError: the file is not such a list, ends early, or has anything else between or after its entries.
    """
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    with open_text(path) as text:
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
                    raise ValueError("an entry is not an object")
                entry, at = decode(buffer, start)
            except (ValueError, RecursionError) as error:
                # Perhaps the buffer ends inside an entry: read on before giving up.
                more = text.read(CHUNK) if len(buffer) - at < LONGEST else ""
                if not more:
                    raise DataError(f"{path}: invalid JSON after {number} entries: {error}") from None
                buffer, at = buffer[at:] + more, 0
                continue
            number, before = number + 1, ","
            yield f"{path}: entry {number}", entry
        while buffer:
            if _end(blank, buffer, at + 1) < len(buffer):
                raise DataError(f"{path}: data after the list")
            buffer, at = text.read(CHUNK), -1


def _end(blank: re.Pattern[str], buffer: str, at: int) -> int:
    match = blank.match(buffer, at)
    assert match is not None  # the pattern also matches nothing
    return match.end()


def _image(relationships: Any, area: int, genome: Genome) -> AnnotatedImage:
    """Read an image's relations and count its words."""
    objects: dict[Any, Word] = {}
    boxes: dict[Any, tuple[float, float, float, float]] = {}
    predicates_of: dict[tuple[Any, Any], set[Word]] = defaultdict(set)
    relations: dict[Relation, None] = {}
    clear: dict[Relation, None] = {}
    for entry in relationships:
        ends = entry["subject"], entry["object"]
        for end in ends:
            objects[end["object_id"]] = genome.nouns(_names(end), end.get("synsets", ()))
            boxes[end["object_id"]] = end["x"], end["y"], end["w"], end["h"]
        subject, obj = (end["object_id"] for end in ends)
        predicate = genome.predicates((entry["predicate"],), entry.get("synsets", ()))
        predicates_of[subject, obj].add(predicate)
        relation = Relation(objects[subject], predicate, objects[obj])
        relations[relation] = None
        if min(end["w"] * end["h"] for end in ends) >= max(LEAST_AREA * area, 1) and subject != obj:
            clear[relation] = None
    genome.nouns.count(objects.values(), _same_object(list(objects.values()), list(boxes.values())))
    for predicates in predicates_of.values():
        genome.predicates.count(predicates, combinations(predicates, 2))
    return AnnotatedImage(list(dict.fromkeys(objects.values())), list(relations), list(clear))


def _names(end: Mapping[str, Any]) -> Sequence[str]:
    """Read the names of an object: some versions have one `name`, others a list of `names`."""
    names = end["names"] if "names" in end else [end["name"]]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names {names!r}")
    return names


def _same_object(words: Sequence[Word], boxes: Sequence[tuple[float, ...]]) -> Iterator[tuple[Word, Word]]:
    """Yield the pairs of words whose boxes [N, 4] of x, y, width and height nearly coincide."""
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
