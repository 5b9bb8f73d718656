"""ComVG's published list: every row is an example; each image is fetched once, each text and pair computed once."""

from __future__ import annotations

import csv
import re
import time
from collections import Counter
from collections.abc import Callable, Sized
from functools import partial
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd.config import ComvgDataset, Params, load
from dsd.data.examples import read_examples
from dsd.datasets import RawExample, benchmark
from dsd.datasets.comvg import COLUMNS, Entry, read_list
from dsd.errors import DataError, DsdError, ParamsError
from dsd.metrics import SLOTS
from dsd.scenes.captions import TEMPLATES
from dsd.scenes.captions import sentence as caption
from dsd.scenes.world import random_triplet
from dsd.scorers.evidence import requests, with_unconditional
from tests.serving import Server
from tests.test_preparation import prepare
from tests.test_visual_genome import Json, annotate, host, hosted, image, names, paint, server

__all__ = ["host", "server"]  # fixtures

ROOT = Path(__file__).parent.parent
LABELS = ("subject", "object", "verb")
ROWS, IMAGES, SENTENCES = 5400, 524, 279  # of the published list


def line(number: int, sentence: str, positive: object, negative: object, label: str = "subject") -> dict[str, object]:
    return dict(
        zip(
            COLUMNS,
            (number, sentence, "man,sit,table", "('dog', 'sit', 'table')", positive, negative, label),
            strict=True,
        )
    )


def write(path: Path, lines: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(lines)
    return path


# The list


def test_odd_sentences_and_triplets(tmp_path: Path) -> None:
    text = (
        "\ufeffid,sentence,pos_triplet,neg_triplet,pos_image_id,neg_image_id,neg_value\r\n"
        "1,a man is sitting at a table,\"man,sit,table\",\"('dog', 'sit', 'table')\",2358258,2357994,subject\r\n"
        '2,"a man, who has a ""big"" hat.","man,layingin,hat","(\'man\', \'wears\', \'a ""big"" hat\')",1,2,object\r\n'
        '3,a man\'s 5" phone ,"man,hold,phone","(""man\'s"", \'hold\', \'5"" phone\')",3,1,verb\r\n'
        "4,\"une fille naïve\nand a “cat”\",\"girl,see,cat\",\"('girl', 'see', 'dog')\",0004,5,object\r\n"
        "\r\n"
    )
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode())
    assert read_list(path) == [
        Entry("a man is sitting at a table", 2358258, 2357994, "subject"),
        Entry('a man, who has a "big" hat.', 1, 2, "object"),
        Entry("a man's 5\" phone", 3, 1, "predicate"),
        Entry("une fille naïve\nand a “cat”", 4, 5, "object"),
    ]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(lambda text: text.strip())


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(TEXT, st.tuples(TEXT, TEXT, TEXT), st.sampled_from(LABELS)), min_size=1, max_size=5))
def test_read_list_inverts_writing(
    rows: list[tuple[str, tuple[str, str, str], str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines = [line(n, text, n, 2, label) | {"neg_triplet": triplet} for n, (text, triplet, label) in enumerate(rows)]
    slots = {"verb": "predicate"}
    assert read_list(write(tmp_path_factory.mktemp("list") / "list.csv", lines)) == [
        Entry(text.strip(), n, 2, slots.get(label, label)) for n, (text, _, label) in enumerate(rows)
    ]


def broken(tmp_path: Path, changes: dict[str, object]) -> Path:
    good = line(1, "a man", 1, 2)
    return write(tmp_path / "list.csv", [good, good | changes])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sentence": " "}, "sentence: empty"),
        ({"pos_image_id": "2358258.0"}, "pos_image_id: '2358258.0' is not an image number"),
        ({"neg_image_id": ""}, "neg_image_id: '' is not an image number"),
        ({"neg_image_id": "../1"}, "neg_image_id: '../1' is not an image number"),
        ({"pos_triplet": "man,sit"}, "pos_triplet: 'man,sit' is not of the form a,b,c"),
        ({"pos_triplet": "man,,table"}, "pos_triplet: 'man,,table' is not of the form a,b,c"),
        ({"neg_triplet": "dog,sit,table"}, "neg_triplet: 'dog,sit,table' is not of the form ('a', 'b', 'c')"),
        ({"neg_triplet": "('dog', 'sit')"}, "neg_triplet: \"('dog', 'sit')\" is not of the form ('a', 'b', 'c')"),
        ({"neg_triplet": "('dog', 'sit', 3)"}, "neg_triplet: \"('dog', 'sit', 3)\" is not of the form ('a', 'b', 'c')"),
        ({"neg_triplet": "(exit(), 'sit', 'a')"}, "neg_triplet: \"(exit(), 'sit', 'a')\" is not of the form"),
        ({"neg_triplet": "(" * 900}, "neg_triplet: '" + "(" * 60 + "' is not of the form"),
        ({"neg_triplet": "('a', 'b', '" + "c" * 2000 + "')"}, "neg_triplet: \"('a', 'b', '" + "c" * 48),
        ({"neg_value": "predicate"}, "neg_value: 'predicate' is none of subject, object, verb"),
    ],
)
def test_invalid_values(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = broken(tmp_path, changes)
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}:3: {message}')}"):
        read_list(path)


HEADER = ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1: no column 'id' in ''; columns are separated by commas"),
        (
            HEADER.replace(",", ";"),
            f"1: no column 'id' in '{HEADER.replace(',', ';')}'; columns are separated by commas",
        ),
        (HEADER.replace("neg_value", "label"), "1: no column 'neg_value' in 'id, sentence, pos_triplet, neg_triplet, "),
        (f'{HEADER}\n1,a man,"a,b,c"', "2: 3 values for 7 columns"),
        (f'{HEADER}\n1,"a man', "2: invalid CSV: unexpected end of data"),
        (f'{HEADER}\n1,"a "big" man",', "2: invalid CSV: ',' expected after '\"'"),
    ],
)
def test_invalid_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}:{message}')}"):
        read_list(path)


def test_a_list_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"list\.csv: no rows$"):
        read_list(write(tmp_path / "list.csv", []))


# Downloads


def row(source: object, *images: str, **changes: object) -> ComvgDataset:
    fields = dict(
        kind="comvg", list={"source": str(source), "sha256": None}, images=images, annotations=None, size=None,
        few_shot=0, sample=0, validation=0, test=None, missing=0,
    )  # fmt: skip
    return ComvgDataset.model_validate(fields | changes)


def download(fields: ComvgDataset, folder: Path, seed: int = 0) -> list[RawExample]:
    entry = benchmark("comvg")
    entry.download(fields, seed=seed, folder=folder, workers=1)
    return list(entry.examples(folder, seed=seed))


def params_with(fields: ComvgDataset, base: Params | None = None) -> Params:
    return (base or load(ROOT / "params.yaml")).model_copy(update={"datasets": {"mine": fields}})


LINES = [
    line(1, "a man is sitting", 1, 2),
    line(2, "a man is sitting", 1, 3, "object"),
    line(3, "a man is sitting", 1, 2),
    line(4, "a man is standing", 2, 1, "verb"),
    line(1, "a man is standing", 4, 1, "verb"),
]


def test_every_row_is_an_example(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(server.folder / "list.csv", LINES)
    fields, folder = row(f"{server.url}/list.csv", f"{server.url}/VG_100K/{{}}.jpg"), tmp_path / "mine"
    examples = download(fields, folder)
    assert "datasets.mine.list: 1 of 5 rows repeat another; all are kept" in caplog.text
    assert [e.id for e in examples] == [f"comvg/0/{n}" for n in range(1, 6)]
    for example, entry in zip(examples, LINES, strict=True):
        ((true, text),) = example.answer
        assert (example.split, example.texts, text) == ("test", (entry["sentence"],), 0)
        assert example.images[true] == f"{entry['pos_image_id']}.jpg"
        assert example.images[1 - true] == f"{entry['neg_image_id']}.jpg"
        assert example.category == {"verb": "predicate"}.get(str(entry["neg_value"]), entry["neg_value"])
    assert server.counts == {"list.csv": 1, **{f"VG_100K/{n}.jpg": 1 for n in (1, 2, 3, 4)}}
    server.requests.clear()
    assert download(fields, folder) == examples
    assert not server.requests


def test_some_rows(server: Server, tmp_path: Path) -> None:
    lines = [line(n, f"sentence {n % 7}", n, n + 1, LABELS[n % 3]) for n in range(1, 61)]
    fields = partial(row, write(server.folder / "list.csv", lines), f"{server.url}/VG_100K/{{}}.jpg")
    every = {e.id: e for e in download(fields(), tmp_path / "every")}
    some = download(fields(test=20), tmp_path / "mine")
    more = download(fields(test=30), tmp_path / "mine")
    assert len(some) == 20 and all(every[e.id] == e for e in more) and set(some) < set(more)
    assert names(tmp_path / "mine" / "images") == {name for e in more for name in e.images}
    other = download(fields(test=20), tmp_path / "mine", seed=1)
    assert {e.id.split("/")[2] for e in other} != {e.id.split("/")[2] for e in some}
    with pytest.raises(ParamsError, match=r"^datasets\.mine\.test: 61 requested, the list has 60 rows$"):
        download(fields(test=61), tmp_path / "mine")


def test_urls_are_tried_in_order(server: Server, tmp_path: Path) -> None:
    local = tmp_path / "local"
    paint(local / "4.jpg", 4)
    for name in ("1.jpg", "4.jpg"):
        server.failing[f"VG_100K/{name}"] = (404, 99)
    paint(server.folder / "VG_100K_2" / "1.jpg", 1)
    images = [f"{server.url}/VG_100K/{{}}.jpg", f"{server.url}/VG_100K_2/{{}}.jpg", f"{local}/{{}}.jpg"]
    fields = row(write(tmp_path / "list.csv", LINES), *images)
    assert len(download(fields, tmp_path / "mine")) == 5
    assert names(tmp_path / "mine" / "images") == {f"{n}.jpg" for n in (1, 2, 3, 4)}


def test_a_missing_image(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = partial(
        row, write(tmp_path / "list.csv", [*LINES, line(6, "a dog", 1, 999999)]), f"{server.url}/VG_100K/{{}}.jpg"
    )
    with pytest.raises(DataError) as raised:
        download(fields(), tmp_path / "mine")
    assert str(raised.value) == (
        "datasets.mine.missing: 0, but 1 of 5 images are missing: 999999.jpg (not found (404 Not Found))"
    )
    examples = download(fields(missing=1), tmp_path / "mine")
    assert [e.id for e in examples] == [f"comvg/0/{n}" for n in range(1, 6)]
    assert "1 of 6 examples left out" in caplog.text


def test_training_images_are_not_in_the_list(server: Server, tmp_path: Path) -> None:
    lines = [line(n, "a man", n, n + 1, LABELS[n % 3]) for n in range(1, 40)]
    source = write(server.folder / "list.csv", lines)
    annotations = hosted(server, tmp_path / "published")
    fields = partial(row, source, f"{server.url}/VG_100K_2/{{}}.jpg")
    for n in range(1, 41):
        paint(server.folder / "VG_100K_2" / f"{n}.jpg", n)
    learning = fields(annotations=annotations, size=120, few_shot=0.1, validation=0.05)
    examples = download(learning, tmp_path / "mine")
    assert Counter(e.split for e in examples) == {"train": 12, "validation": 6, "test": 39}
    listed = {name for e in examples if e.split == "test" for name in e.images}
    others = [name for e in examples if e.split != "test" for name in e.images]
    assert len(set(others)) == len(others) == 36 and not set(others) & listed
    assert {len(e.texts) for e in examples if e.split == "train"} == {2}
    assert all(server.counts[f"VG_100K_2/{name}"] == server.counts[f"VG_100K/{name}"] == 1 for name in others)
    summary = prepare("mine", params_with(learning), tmp_path / "mine", tmp_path / "prepared")
    assert summary["shared"] == summary["dropped"] == 0

    server.requests.clear()
    alone = download(fields(annotations=annotations, size=120), tmp_path / "mine")
    assert alone == [e for e in examples if e.split == "test"] and not server.requests
    again = download(learning, tmp_path / "mine")
    assert again == examples and not {"relationships.zip", "image_data.zip", "list.csv"} & set(server.counts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"few_shot": 0.1}, r"^datasets\.mine\.annotations: null, so few_shot and validation must be 0"),
        ({"validation": 0.1, "size": 10}, r"^datasets\.mine\.annotations: null, so few_shot and validation must be 0"),
        ({"few_shot": 0.1, "annotations": {}}, r"^datasets\.mine\.size: null, but few_shot and validation are shares"),
    ],
)
def test_invalid_params(changes: Json, message: str, tmp_path: Path) -> None:
    if "annotations" in changes:
        changes = changes | {"annotations": annotate(tmp_path, [image(1)])}
    with pytest.raises(ParamsError, match=message):
        download(row(tmp_path / "list.csv", "{}", **changes), tmp_path / "mine")


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_an_unavailable_list(status: int, server: Server, tmp_path: Path) -> None:
    server.failing["list.csv"] = (status, 99)
    with pytest.raises(DsdError, match=rf"^datasets\.mine\.list: {server.url}/list\.csv: .*\({status} "):
        download(row(f"{server.url}/list.csv", "{}"), tmp_path / "mine")


# At the size of the published list


def published() -> list[dict[str, object]]:
    """A list with as many rows, images and sentences as the published one: 3 positives × 9 negatives a sentence."""
    rng = Random(0)
    sentences = set()
    while len(sentences) < SENTENCES:
        sentences.add(caption(random_triplet(rng), TEMPLATES[0]))
    pools = [rng.sample(range(1, IMAGES + 1), 12) for _ in range(SENTENCES)]
    for unused in set(range(1, IMAGES + 1)) - {number for pool in pools for number in pool}:
        pools[rng.randrange(SENTENCES)][-1] = unused
    rows = []
    for sentence, pool in zip(sorted(sentences), pools, strict=True):
        rows += [(sentence, positive, negative) for positive in pool[:3] for negative in pool[3:]]
    spare = sorted(rng.sample(range(len(rows)), len(rows) - ROWS))
    kept = [row for n, row in enumerate(rows) if n not in set(spare)]
    return [line(n, *row, LABELS[n % 3]) for n, row in enumerate(kept, start=1)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the list and its images."""
    folder = tmp_path_factory.mktemp("local")
    write(folder / "list.csv", published())
    for number in range(1, IMAGES + 1):
        paint(folder / f"{number}.jpg", number)
    return folder


def test_the_size_of_the_published_list(local: Path, tmp_path: Path) -> None:
    lines = published()
    images = {n for entry in lines for n in (entry["pos_image_id"], entry["neg_image_id"])}
    assert (len(lines), len(images), len({entry["sentence"] for entry in lines})) == (ROWS, IMAGES, SENTENCES)
    fields = row(local / "list.csv", f"{local}/{{}}.jpg")
    params = params_with(fields)

    start = time.perf_counter()
    download(fields, tmp_path / "raw")
    downloaded = time.perf_counter()
    summary = prepare("mine", params, tmp_path / "raw", tmp_path / "prepared")
    assert downloaded - start < 10 and time.perf_counter() - downloaded < 10

    assert summary == {
        "train": 0, "validation": 0, "test": ROWS, "images": IMAGES,
        "repeated": 0, "quarantined": 0, "dropped": 0, "shared": 0,
    }  # fmt: skip
    assert pq.read_metadata(tmp_path / "prepared" / "images.parquet").num_rows == IMAGES
    examples = read_examples(tmp_path / "prepared" / "examples.parquet", "test")
    assert Counter(e.category for e in examples) == {slot: ROWS // 3 for slot in SLOTS}
    assert len({text for e in examples for text in e.texts}) == SENTENCES

    requested = with_unconditional(examples, compares=False)
    distinct = {(entry["sentence"], entry[key]) for entry in lines for key in ("pos_image_id", "neg_image_id")}
    assert sum(len(e.images) * len(e.texts) for e in examples) == 2 * ROWS
    assert len(requested) == len(set(requested)) == len(distinct)
    assert 3000 < len(distinct) < 3400
    seen = requests(examples, params.noise, params.seed, compares=True)
    assert len(seen) == len(set(seen)) == (len(distinct) + IMAGES) * len(params.noise.levels)


def test_every_image_and_text_is_encoded_once(
    params: Params, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsd.engine.cache import encode
    from dsd.engine.session import Folders, Session
    from dsd.models.clip import Clip  # they load torch, which the other tests do without
    from dsd.models.stable_diffusion import StableDiffusion  # they load torch, which the other tests do without

    counts: Counter[str] = Counter()
    for owner, name in (
        (StableDiffusion, "encode_images"), (StableDiffusion, "encode_texts"),
        (Clip, "image_features"), (Clip, "text_features"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, counted(counts, name, getattr(owner, name)))
    fields = row(local / "list.csv", f"{local}/{{}}.jpg")
    mine = params_with(fields, params)
    download(fields, tmp_path / "raw")
    prepare("mine", mine, tmp_path / "raw", tmp_path / "prepared")
    for _ in range(2):
        folders = Folders(tmp_path / "prepared", tmp_path / "cached", tmp_path / "trained")
        encode(Session("mine", mine, folders))
        texts = SENTENCES + 1  # and the empty one
        assert counts == {
            "encode_images": IMAGES, "image_features": IMAGES, "encode_texts": texts, "text_features": texts,
        }  # fmt: skip


def counted(counts: Counter[str], name: str, method: Callable[..., object]) -> Callable[..., object]:
    def count(self: object, batch: Sized) -> object:
        counts[name] += len(batch)
        return method(self, batch)

    return count
