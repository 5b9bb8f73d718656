"""Mutations of Visual Genome: true triplets are annotated, false ones are not, in no wording."""

from __future__ import annotations

import io
import json
import logging
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsd.config import VisualGenomeDataset, VisualGenomeParams
from dsd.data import downloads
from dsd.datasets import RawExample, benchmark, relations
from dsd.datasets.relations import Genome, Vocabulary, _entries, read_genome
from dsd.datasets.visual_genome import mutations, sentence
from dsd.errors import DataError, DsdError, ParamsError
from dsd.scenes.mutation import SLOTS
from tests.serving import Server, serve
from tests.test_preparation import params as params
from tests.test_preparation import prepare

Json = dict[str, Any]
Box = tuple[int, int, int, int]

OBJECT_ALIASES = "man,guy,gentleman\nwoman, lady\nbike,bicycle\n\nhorse\n"
RELATIONSHIP_ALIASES = "on,on top of\nriding,rides\nholding\n"
SYNSETS = {
    "man": "man.n.01", "guy": "man.n.01", "woman": "woman.n.01", "dog": "dog.n.01", "puppy": "dog.n.01",
    "bike": "bicycle.n.01", "bicycle": "bicycle.n.01", "horse": "horse.n.01", "hat": "hat.n.01", "sign": "sign.n.02",
    "riding": "ride.v.01", "rides": "ride.v.01", "holding": "hold.v.02", "feeding": "feed.v.01", "on": "along.r.01",
}  # fmt: skip
SUBJECTS = ("man", "guy", "woman", "lady", "dog", "puppy", "surfer", "girl")
PREDICATES = ("riding", " Rides", "ON", "on top of", "holding", "feeding", "near")
OBJECTS = ("bike", "bicycle", "horse", "hat", "stop sign", "street sign", "kite")
SIDE = 400  # pixels of an image


def thing(number: int, name: str, box: Box, names: bool = False) -> Json:
    naming: Json = {"names": [name]} if names else {"name": name}
    synsets = [SYNSETS[name]] if name in SYNSETS else []
    return {"object_id": number, **naming, **dict(zip("xywh", box, strict=True)), "synsets": synsets}


def relation(number: int, subject: Json, predicate: str, obj: Json) -> Json:
    word = predicate.strip().lower()
    synsets = [SYNSETS[word]] if word in SYNSETS else []
    return {"relationship_id": number, "predicate": predicate, "subject": subject, "object": obj, "synsets": synsets}


def image(number: int) -> Json:
    """An image with two relations, sometimes with the same one in other words, a tiny thing or odd names."""
    rng = Random(f"image {number}")
    boxes: list[Box] = [(0, 0, 180, 180), (200, 0, 180, 180), (0, 200, 180, 180), (200, 200, 180, 180)]
    things = [
        thing(10 * number + n, rng.choice(SUBJECTS if n % 2 == 0 else OBJECTS), box, names=number % 2 == 0)
        for n, box in enumerate(boxes)
    ]
    relations = [relation(1, things[0], rng.choice(PREDICATES), things[1])]
    if rng.random() < 0.3:
        relations.append(relation(2, things[2], rng.choice(PREDICATES), things[3]))
    first = relations[0]
    if first["predicate"] == "riding" and rng.random() < 0.5:
        relations.append(relation(3, things[0], "on", things[1]))  # who rides is on
    if "man" in things[0].values() or "surfer" in things[0].values():
        other = "surfer" if "man" in things[0].values() else "man"
        relations.append(relation(4, thing(10 * number + 4, other, (5, 5, 175, 175)), "near", things[3]))
    if rng.random() < 0.2:
        relations.append(relation(5, thing(10 * number + 5, "ant", (3, 3, 12, 12)), "on", things[1]))
        relations.append(relation(6, thing(10 * number + 6, "man's left-hand no. 2", boxes[0]), "on", things[1]))
    return {"image_id": number, "relationships": relations}


def annotate(folder: Path, images: list[Json], url: str = "http://127.0.0.1:1", pack: bool = False) -> Json:
    """Write the four files in the published format and return the row `annotations`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = [
        {
            "image_id": entry["image_id"], "url": f"{url}/VG_100K/{entry['image_id']}.jpg", "width": SIDE,
            "height": SIDE, "coco_id": None, "flickr_id": None,
        } for entry in images
    ]  # fmt: skip
    files = {
        "relationships": json.dumps(images), "image_data": json.dumps(data),
        "object_aliases": OBJECT_ALIASES, "relationship_aliases": RELATIONSHIP_ALIASES,
    }  # fmt: skip
    row = {}
    for name, text in files.items():
        path = folder / name
        if pack and name in ("relationships", "image_data"):
            path = path.with_suffix(".zip")
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(f"{name}.json", text)
        else:
            path.write_text(text)
        row[name] = {"source": str(path), "sha256": None}
    return row


def read(folder: Path, row: Json) -> Genome:
    return read_genome(VisualGenomeParams.model_validate(row), folder / "mine", "datasets.mine.annotations")


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    folder = tmp_path_factory.mktemp("genome")
    return read(folder, annotate(folder, [image(number) for number in range(1, 900)]))


# Words with the same meaning in this file

SAME = [
    {"man", "guy", "surfer"},
    {"woman", "lady"},
    {"dog", "puppy"},
    {"bike", "bicycle"},
    {"stop sign", "street sign"},
]
SAME_PREDICATES = [{"riding", "rides", "on", "on top of"}]


def same(a: str, b: str) -> bool:
    return a == b or any({a, b} <= words for words in (*SAME, *SAME_PREDICATES))


@cache
def annotated(number: int) -> list[tuple[str, str, str]]:
    def name(end: Json) -> str:
        return end["names"][0] if "names" in end else end["name"]

    found = image(number)["relationships"]
    return [(name(r["subject"]), r["predicate"].strip().lower(), name(r["object"])) for r in found]


def may_mean(number: int, triplet: tuple[str, str, str]) -> bool:
    return any(all(map(same, triplet, other)) for other in annotated(number))


def test_one_slot_is_mutated_and_verified(genome: Genome) -> None:
    made = mutations(genome, 90, 0)
    assert len(made) == 90
    assert Counter(m.slot for m in made) == {slot: 30 for slot in SLOTS}
    for m in made:
        changed = [slot for slot, a, b in zip(SLOTS, m.original, m.mutated, strict=True) if a != b]
        assert changed == [m.slot]
        was, now = (triplet[SLOTS.index(m.slot)] for triplet in (m.original, m.mutated))
        assert not same(was, now)
        assert m.original in annotated(m.positive)
        assert may_mean(m.negative, m.mutated)
        assert not may_mean(m.positive, m.mutated) and not may_mean(m.negative, m.original)
        if m.slot != "predicate":
            nouns = [{noun for s, _, o in annotated(number) for noun in (s, o)} for number in (m.positive, m.negative)]
            sure = [words for words in SAME if "surfer" not in words] + [{"man", "guy"}]
            for other, theirs in ((now, nouns[0]), (was, nouns[1])):
                assert not any(other == noun or any({other, noun} <= words for words in sure) for noun in theirs)


def test_every_word_is_used(genome: Genome) -> None:
    """The rules exclude no word altogether."""
    made = mutations(genome, 240, 0)
    words = {word for m in made for word in (*m.original, *m.mutated)}
    assert words == {*SUBJECTS, *(p.strip().lower() for p in PREDICATES), *OBJECTS}


def test_no_image_is_used_twice(genome: Genome) -> None:
    made = mutations(genome, 150, 0)
    images = [number for m in made for number in (m.positive, m.negative)]
    assert len(set(images)) == len(images)
    assert not {1, 2, 3} & {n for m in mutations(genome, 60, 0, without={1, 2, 3}) for n in (m.positive, m.negative)}


def test_the_order_of_the_files_does_not_matter(genome: Genome, tmp_path: Path) -> None:
    images = [image(number) for number in range(1, 900)]
    Random(0).shuffle(images)
    other = read(tmp_path, annotate(tmp_path, images, pack=True))
    assert mutations(other, 120, 0) == mutations(genome, 120, 0)
    assert mutations(other, 30, 0) == mutations(genome, 120, 0)[:30]
    assert mutations(genome, 120, 1) != mutations(genome, 120, 0)


def test_triplets_are_diverse(genome: Genome) -> None:
    positives = [m.original for m in mutations(genome, 90, 0) if m.slot == "subject"]
    assert len(set(positives)) > 0.8 * len(positives)


def test_words(genome: Genome) -> None:
    words = Vocabulary("noun", {"man": ["man"], "guy": ["man", "fellow"], "fellow": ["fellow"]})
    pairs = {("man", "guy"): True, ("guy", "fellow"): True, ("man", "fellow"): False, ("Old  Man ", "man"): True,
             ("tree", "trees"): True, ("man in black", "man"): True, ("man in black", "black"): False,
             ("tennis racket", "badminton racket"): True, ("hat", "cat"): False}  # fmt: skip
    for (a, b), expected in pairs.items():
        assert words([a], []).same(words([b], [])) is expected, (a, b)
    assert words(["pup"], ["dog.n.01"]).same(words(["dog"], ["dog.n.01"]))
    assert words(["thing", "lamp"], []).same(words(["lamp"], []))
    predicates = Vocabulary("predicate", {})
    assert not predicates(["sitting on"], []).same(predicates(["standing on"], []))
    assert not genome.nouns.distinct(*(genome.nouns([name], []) for name in ("man", "surfer")))
    assert genome.nouns.distinct(*(genome.nouns([name], []) for name in ("man", "girl")))
    assert not genome.predicates.distinct(*(genome.predicates([name], []) for name in ("on", "riding")))
    assert genome.predicates.distinct(*(genome.predicates([name], []) for name in ("near", "riding")))


@pytest.mark.parametrize(
    ("triplet", "text"),
    [
        (("man", "riding", "horse"), "a man riding a horse"),
        (("elephant", "near", "old umbrella"), "an elephant near an old umbrella"),
        (("men", "on", "grass"), "men on grass"),
        (("woman", "wearing", "glasses"), "a woman wearing glasses"),
        (("bus", "behind", "glass"), "a bus behind a glass"),
    ],
)
def test_sentences(triplet: tuple[str, str, str], text: str) -> None:
    assert sentence(triplet) == text


# Reading


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.lists(st.floats(0, 1)), max_size=4)),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
)
def test_entries_are_those_of_json(entries: list[Json], chunk: int, indent: int | None) -> None:
    text = json.dumps(entries, indent=indent, ensure_ascii=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relations, "CHUNK", chunk)
        patch.setattr(relations, "open_text", lambda path: io.StringIO(text))
        assert [entry for _, entry in _entries(Path("list"))] == entries


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid JSON after 0 entries: a '[' is missing"),
        ("{}", "invalid JSON after 0 entries: a '[' is missing"),
        ('[{"a": 1}', "invalid JSON after 1 entries: a ',' is missing"),
        ('[{"a": 1}, {"a"', "invalid JSON after 1 entries: Expecting ':' delimiter"),
        ('[{"a": 1} {"a": 2}]', "invalid JSON after 1 entries: a ',' is missing"),
        ('[{"a": 1},]', "invalid JSON after 1 entries: an entry is not an object"),
        ("[1, 2]", "invalid JSON after 0 entries: an entry is not an object"),
        ("[{'a': 1}]", "invalid JSON after 0 entries: Expecting property name"),
        ('[{"a": 1}] x', "data after the list"),
        ('[{"a": ' + "[" * 100_000, "invalid JSON after 0 entries: "),
    ],
)
def test_broken_json(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}: {message}')}"):
        list(_entries(path))


def without(key: str) -> Callable[[Json], object]:
    return lambda entry: entry["relationships"][0]["subject"].pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.pop("relationships"), "entry 2: no key 'relationships'"),
        (lambda entry: entry.update(image_id="2"), "entry 2: not as expected: '2' is not a number"),
        (lambda entry: entry.update(image_id=1), "entry 2: not as expected: image_id 1 is repeated"),
        (lambda entry: entry["relationships"][0].pop("predicate"), "entry 2: no key 'predicate'"),
        (lambda entry: entry["relationships"][0].update(predicate=3), "entry 2: not as expected: "),
        (lambda entry: entry["relationships"][0].update(subject="man"), "entry 2: not as expected: "),
        (
            lambda entry: entry["relationships"][0]["subject"].update(names="man"),
            "entry 2: not as expected: names 'man'",
        ),
        (lambda entry: entry["relationships"][0]["subject"].update(x="left"), "entry 2: not as expected: "),
        (lambda entry: entry["relationships"][0]["subject"].update(w=None), "entry 2: not as expected: "),
        (without("object_id"), "entry 2: no key 'object_id'"),
        (without("h"), "entry 2: no key 'h'"),
        (without("names"), "entry 2: no key 'name'"),
    ],
)
def test_invalid_entries(change: Callable[[Json], object], message: str, tmp_path: Path) -> None:
    images = [image(number) for number in (1, 2, 3)]
    row = annotate(tmp_path, images)
    change(images[1])
    (tmp_path / "relationships").write_text(json.dumps(images))
    with pytest.raises(DataError, match=rf"/relationships-[0-9a-f]{{12}}: {re.escape(message)}"):
        read(tmp_path, row)


@pytest.mark.parametrize("url", ["/etc/passwd", "file:///etc/passwd", "http://a b", ""])
def test_urls_must_be_http(url: str, tmp_path: Path) -> None:
    row = annotate(tmp_path, [image(1)])
    data = json.loads((tmp_path / "image_data").read_text())
    data[0]["url"] = url
    (tmp_path / "image_data").write_text(json.dumps(data))
    with pytest.raises(
        DataError, match=r"/image_data-[0-9a-f]{12}: entry 1: not as expected: url .* is not an http\(s\) address$"
    ):
        read(tmp_path, row)


# Downloads


def paint(path: Path, shade: int) -> None:
    """Write a small image, different for each shade."""
    rng = np.random.default_rng(shade)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(path, "JPEG")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host's folder, with the images and the annotations."""
    folder = tmp_path_factory.mktemp("host")
    for number in range(1, 900):
        paint(folder / "VG_100K" / f"{number}.jpg", number)
    annotate(folder, [image(number) for number in range(1, 900)], pack=True)
    return folder


@pytest.fixture
def server(host: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "BACKOFF", 0.001)
    monkeypatch.setattr(downloads, "CHUNK", 1000)
    monkeypatch.setattr(downloads, "RATE", 5000.0)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    with serve(host) as served:
        yield served


def hosted(server: Server, folder: Path) -> Json:
    """Serve the annotations and return their row; the URLs of images are the server's."""
    annotate(folder, [image(number) for number in range(1, 900)], server.url, pack=True)
    for path in folder.iterdir():
        (server.folder / path.name).write_bytes(path.read_bytes())
    names = {"relationships": ".zip", "image_data": ".zip", "object_aliases": "", "relationship_aliases": ""}
    return {name: {"source": f"{server.url}/{name}{ending}", "sha256": None} for name, ending in names.items()}


def row(annotations: Json, **changes: object) -> VisualGenomeDataset:
    fields = dict(kind="visual-genome", size=120, few_shot=0.1, sample=0, validation=0.05, test=30, missing=0)
    return VisualGenomeDataset.model_validate(fields | {"annotations": annotations} | changes)


def download(fields: VisualGenomeDataset, folder: Path, seed: int = 0) -> list[RawExample]:
    entry = benchmark("visual-genome")
    entry.download(fields, seed=seed, folder=folder, workers=1)
    return list(entry.examples(folder, seed=seed))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_download(server: Server, tmp_path: Path, params: Any) -> None:
    fields, folder = row(hosted(server, tmp_path / "published")), tmp_path / "mine"
    examples = download(fields, folder)
    assert Counter(e.split for e in examples) == {"train": 12, "validation": 6, "test": 30}
    for split, count in (("train", 4), ("validation", 2), ("test", 10)):
        assert Counter(e.category for e in examples if e.split == split) == {slot: count for slot in SLOTS}
    needed = [name for e in examples for name in e.images]
    assert names(folder / "images") == set(needed) and len(set(needed)) == len(needed)
    assert names(folder) == {"annotations.jsonl", "images", "raw"}
    assert all(server.counts[f"VG_100K/{name}"] == 1 for name in needed)
    assert len(server.requests) == len(needed) + 4

    for e in examples:
        places = {text: image for image, text in e.answer}
        assert sorted(places) == list(range(len(e.texts))) and len(set(e.texts)) == len(e.texts)
        if e.split == "train":
            assert len(e.texts) == 2 and {*places.values()} == {0, 1}
        else:
            assert len(e.texts) == 1
    assert 0.2 < np.mean([e.answer[0][0] for e in examples]) < 0.8

    mine = params.model_copy(update={"datasets": {"mine": fields}})
    summary = prepare("mine", mine, folder, tmp_path / "prepared")
    assert summary == {
        "train": 12, "validation": 6, "test": 30, "images": len(needed),
        "repeated": 0, "quarantined": 0, "dropped": 0, "shared": 0,
    }  # fmt: skip


def test_a_change_fetches_new_images_and_removes_old_ones(server: Server, tmp_path: Path) -> None:
    annotations, folder = hosted(server, tmp_path / "published"), tmp_path / "mine"
    before = download(row(annotations), folder)
    server.requests.clear()
    after = download(row(annotations, few_shot=0.2), folder)
    new = {name for e in after for name in e.images} - {name for e in before for name in e.images}
    assert set(server.counts) == {f"VG_100K/{name}" for name in new}
    assert [e for e in after if e.split == "test"] == [e for e in before if e.split == "test"]
    server.requests.clear()
    (folder / "images" / ".1.jpg.part").touch()
    assert download(row(annotations, few_shot=0.1), folder) == before
    assert names(folder / "images") == {name for e in before for name in e.images}
    assert not server.requests


def test_files_at_another_url_replace_the_first(server: Server, tmp_path: Path) -> None:
    annotations, folder = hosted(server, tmp_path / "published"), tmp_path / "mine"
    download(row(annotations), folder)
    moved = annotations | {"object_aliases": {"source": str(tmp_path / "published" / "object_aliases"), "sha256": None}}
    before = names(folder / "raw")
    download(row(moved), folder)
    assert len(names(folder / "raw")) == 4 and len(names(folder / "raw") & before) == 3


def test_missing_images(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields, folder = row(hosted(server, tmp_path / "published")), tmp_path / "mine"
    gone = [name for e in download(fields, folder)[:5] for name in e.images][::2]
    for name in gone:
        (folder / "images" / name).unlink()
        server.failing[f"VG_100K/{name}"] = (404, 99)
    with pytest.raises(DataError) as raised:
        download(fields, folder)
    assert re.fullmatch(
        r"datasets\.mine\.missing: 0, but 5 of 96 images are missing: "
        r"(\d+\.jpg \(not found \(404 Not Found\)\); ){3}and 2 more",
        str(raised.value),
    )
    assert not (folder / "annotations.jsonl").exists()
    with caplog.at_level(logging.WARNING):
        examples = download(row(fields.annotations.model_dump(), missing=5), folder)
    assert len(examples) == 43
    assert "5 of 96 images are missing" in caplog.text and "5 of 48 examples left out" in caplog.text


def test_an_interrupted_download_is_resumed(server: Server, tmp_path: Path) -> None:
    fields, folder = row(hosted(server, tmp_path / "published")), tmp_path / "mine"
    server.ranges, server.cutting = False, {"relationships.zip": (10_000, 5)}
    with pytest.raises(DataError, match=r"^datasets\.mine\.annotations\.relationships: \S+: cut off"):
        download(fields, folder)
    server.ranges = True
    assert len(download(fields, folder)) == 48
    ranges = [headers.get("Range") for _, path, headers in server.requests if path == "relationships.zip"]
    assert len(ranges) == 6 and ranges[-1] is not None


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"size": 5000}, ParamsError, r"^datasets\.mine\.size: 5000 requested, the annotations give \d+$"),
        (
            {"test": 110},
            ParamsError,
            r"^datasets\.mine\.size: 120 rows in whole groups are too few for 12 few-shot, 6 validation and 110 test",
        ),
        (
            {"sha256": "0" * 64},
            DataError,
            r"^datasets\.mine\.annotations\.image_data\.sha256: 000000000000… expected, ",
        ),
        (
            {"source": "nowhere.zip"},
            DataError,
            r"^datasets\.mine\.annotations\.image_data: nowhere\.zip: no such file$",
        ),
    ],
)
def test_invalid_params(changes: Json, kind: type[DsdError], message: str, host: Path, tmp_path: Path) -> None:
    annotations = annotate(tmp_path, [image(number) for number in range(1, 900)])
    for name in ("sha256", "source"):
        if name in changes:
            annotations["image_data"][name] = changes[name]
    with pytest.raises(kind, match=message):
        download(row(annotations, **{k: v for k, v in changes.items() if k in ("size", "test")}), tmp_path / "mine")


def test_annotations_of_another_seed_are_refused(server: Server, tmp_path: Path) -> None:
    fields = row(hosted(server, tmp_path / "published"), test=3, few_shot=0, validation=0)
    download(fields, tmp_path / "mine")
    with pytest.raises(DataError, match=r"visual-genome/0/\S+ is not of visual-genome/1/; download the dataset again$"):
        list(benchmark("visual-genome").examples(tmp_path / "mine", seed=1))
