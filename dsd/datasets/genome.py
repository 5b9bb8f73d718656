"""The annotations of Visual Genome: which words stand in which relation in which picture, and which mean the same."""

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
from dsd.data.downloads import opened
from dsd.datasets.by_url import fetched
from dsd.errors import DataError
from dsd.scenes.mutation import SLOTS, Slot

log = logging.getLogger(__name__)

LEAST_AREA = 0.01  # of a picture, that a box of a clear relation covers
FREQUENT = 20  # annotations of a word that triplets are made of
SAME_BOX = 0.7  # intersection over union from which two boxes are one thing
SAME_WORD = 0.02  # share of the rarer word's uses from which two words may mean the same
CHUNK = 1 << 20  # characters read at a time
LONGEST = 1 << 24  # characters of an entry
HEAD = re.compile(r"(?<=\w) (?:and|at|in|of|on|with) ")  # what follows is no part of "man" in "man in black"
PHRASE = {"noun": re.compile(r"[a-z]+( [a-z]+)?"), "predicate": re.compile(r"[a-z]+( [a-z]+){0,2}")}


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

    def shows(self, noun: Word) -> bool:
        return any(noun.same(other) for other in self.nouns)


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

    def plain(self) -> set[Word]:
        """Those that sentences can be made of."""
        words = self._words.values()
        return {w for w in words if self.uses[w.group] >= FREQUENT and PHRASE[self._kind].fullmatch(w.name)}

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


# Reading


def files(annotations: VisualGenomeParams, key: str) -> dict[str, UrlParams]:
    """The rows of the four files by their keys."""
    return {f"{key}.{name}": getattr(annotations, name) for name in VisualGenomeParams.model_fields}


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
            genome.pictures[number] = _picture(entry["relationships"], areas.get(number, 0), genome)
    for number in (lone := genome.pictures.keys() - areas.keys()):
        del genome.pictures[number]
    if lone:
        log.warning("%s: %d pictures left out that image_data does not list", key, len(lone))
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
