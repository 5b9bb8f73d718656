"""The user's own images: a table of matches, and a one-line error for each mistake in it."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dsd.config import load
from dsd.datasets import benchmark
from dsd.datasets.annotations import ANNOTATIONS, IMAGES
from dsd.datasets.protocol import Expected
from dsd.engine.races import answer_index
from dsd.errors import DataError, DsdError
from dsd.metrics import rank
from tests.conftest import ROOT
from tests.hubdata import downloaded, image_bytes
from tests.hubdata import row as row_of
from tests.test_preparation import prepare

SEVERAL_TEXTS = """image,text,label
dogs/1.png,a dog asleep,1
dogs/1.png,"a dog, awake",0
dogs/2.png,a dog asleep,0
dogs/2.png,"a dog, awake",1
dogs/2.png,"the ""other"" dog",0
"""
SEVERAL_IMAGES = """id,image,text,label,category
a,dogs/1.png,a dog asleep,1,asleep
a,dogs/2.png,a dog asleep,0,asleep
b,dogs/2.png,a dog awake,1,awake
b,dogs/3.jpg,a dog awake,0,awake
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with three images."""
    folder = tmp_path / "own images"
    (folder / "dogs").mkdir(parents=True)
    for number, (name, format) in enumerate({"1.png": "PNG", "2.png": "PNG", "3.jpg": "JPEG"}.items()):
        (folder / "dogs" / name).write_bytes(image_bytes(number, format))
    return folder


def row(mine: Path, table: str, **changes: Any) -> Any:
    (mine / "table.csv").write_text(table, encoding="utf-8")
    return row_of("folder", mine, **{"table": "table.csv", "few_shot": 0, "validation": 0, **changes})


def mistake(row: Any, folder: Path) -> str:
    with pytest.raises(DsdError) as error:
        benchmark("folder").download(row, seed=0, folder=folder, workers=1)
    assert "\n" not in str(error.value) and not (folder / ANNOTATIONS).exists()
    return str(error.value)


def test_several_texts_for_an_image(mine: Path, tmp_path: Path) -> None:
    found = downloaded(row(mine, SEVERAL_TEXTS), tmp_path / "d")
    assert [(e.id, e.split, e.category) for e in found] == [
        ("folder/dogs/1.png", "test", "all"),
        ("folder/dogs/2.png", "test", "all"),
    ]
    assert [e.texts for e in found] == [
        ("a dog asleep", "a dog, awake"),
        ("a dog asleep", "a dog, awake", 'the "other" dog'),
    ]
    assert [e.answer for e in found] == [((0, 0),), ((0, 1),)]
    assert [(tmp_path / "d" / IMAGES / e.images[0]).read_bytes() for e in found] == [image_bytes(0), image_bytes(1)]


def test_several_images_for_a_text(mine: Path, tmp_path: Path) -> None:
    found = downloaded(row(mine, "\ufeff" + SEVERAL_IMAGES.replace("\n", "\r\n")), tmp_path / "d")
    assert [(e.id, len(e.images), e.texts, e.answer, e.category) for e in found] == [
        ("folder/a", 2, ("a dog asleep",), ((0, 0),), "asleep"),
        ("folder/b", 2, ("a dog awake",), ((0, 0),), "awake"),
    ]
    assert found[0].images[1] == found[1].images[0] and found[1].images[1].endswith(".jpg")
    params = load(ROOT / "params.yaml")
    params = params.model_copy(update={"datasets": {"d": row(mine, SEVERAL_IMAGES)}})
    assert prepare("d", params, tmp_path / "d", tmp_path / "prepared")["test"] == 2


def many(examples: int, column: str = "") -> str:
    """Examples on two images each; of every three images the first is shared with the example before."""
    lines = [f"id,image,text,label{',split' if column else ''}"]
    for n in range(examples):
        for image, label in ((n // 2 * 3 + n % 2, 1), (n // 2 * 3 + n % 2 + 1, 0)):
            lines.append(f"{n},{image}.png,text {n},{label}" + (f",{column.split()[n % 3]}" if column else ""))
    return "\n".join(lines) + "\n"


@pytest.fixture
def images(mine: Path) -> Path:
    for number in range(60):
        (mine / f"{number}.png").write_bytes(image_bytes(number))
    return mine


def test_splits_share_no_image(images: Path, tmp_path: Path) -> None:
    found = downloaded(row(images, many(40), few_shot=0.5, validation=0.2, test=10), tmp_path / "d")
    assert Counter(e.split for e in found) == {"test": 10, "train": 16, "validation": 6}
    shown = {
        split: {i for e in found if e.split == split for i in e.images} for split in ("train", "validation", "test")
    }
    assert not any(shown[a] & shown[b] for a, b in product(shown, shown) if a != b)
    lines = many(40).splitlines()
    turned = row(images, "\n".join([lines[0], *reversed(lines[1:])]), few_shot=0.5, validation=0.2, test=10)
    again = downloaded(turned, tmp_path / "again")
    assert {e.id: e.split for e in again} == {e.id: e.split for e in found}  # the order of the rows does not matter


def test_splits_from_the_table(images: Path, tmp_path: Path) -> None:
    table = many(30, "train validation test")
    found = downloaded(row(images, table), tmp_path / "d")
    assert {e.split: int(e.id.removeprefix("folder/")) % 3 for e in found} == {"train": 0, "validation": 1, "test": 2}
    assert len(found) == 30
    some = downloaded(row(images, table, test=4), tmp_path / "some")
    assert Counter(e.split for e in some) == {"train": 10, "validation": 10, "test": 4}
    line = f"datasets.d.few_shot: must be 0, because {images}/table.csv has a column split"
    assert mistake(row(images, table, few_shot=0.05), tmp_path / "other" / "d") == line


def test_a_missing_image(mine: Path, tmp_path: Path) -> None:
    table = SEVERAL_TEXTS + "dogs/4.png,a dog,1\ndogs/4.png,a cat,0\n"
    line = f"0, but 1 of 3 images are missing: {mine}/table.csv:7: dogs/4.png: No such file or directory"
    assert mistake(row(mine, table), tmp_path / "d") == f"datasets.d.missing: {line}"
    assert len(downloaded(row(mine, table, missing=1), tmp_path / "d")) == 2


@pytest.mark.parametrize(("content", "reason"), [(b"", "an empty file"), (b"GIF", "not an image")])
def test_what_is_no_image_is_named_with_its_line(content: bytes, reason: str, mine: Path, tmp_path: Path) -> None:
    (mine / "dogs" / "2.png").write_bytes(content)
    line = f"0, but 1 of 2 images are missing: {mine}/table.csv:4: dogs/2.png: {reason}"
    assert mistake(row(mine, SEVERAL_TEXTS), tmp_path / "d") == f"datasets.d.missing: {line}"


def test_no_test_example_is_left(mine: Path, tmp_path: Path) -> None:
    for file in mine.glob("dogs/*"):
        file.unlink()
    line = mistake(row(mine, SEVERAL_TEXTS, missing=2), tmp_path / "d")
    assert line.startswith("datasets.d: every test example lacks an image; 2 of 2 images are missing")


def test_few_shot_examples_that_all_share_an_image_with_the_test(mine: Path, tmp_path: Path) -> None:
    sides = [f"{split},dogs/1.png,{text}" for split in ("train", "test") for text in ("a,1", "b,0")]
    rows = "\n".join(["id,split,image,text,label", *(f"{side[:2]},{side}" for side in sides)])
    downloaded(row(mine, rows), tmp_path / "d")
    params = load(ROOT / "params.yaml").model_copy(update={"datasets": {"d": row(mine, rows)}})
    expected = "no example is left for train, 0 files quarantined, 1 examples with an image of a later split"
    with pytest.raises(DataError, match=expected):
        prepare("d", params, tmp_path / "d", tmp_path / "prepared")


def test_several_right_texts(mine: Path, tmp_path: Path) -> None:
    table = HEAD + "dogs/1.png,a dog,1\ndogs/1.png,an animal,1\ndogs/1.png,a cat,0\n"
    [example] = downloaded(row(mine, table), tmp_path / "d")
    assert example.answer == ((0, 0), (0, 1))
    assert [rank([scores], example.answer) for scores in ([1, 3, 2], [1, 2, 2], [0, 1, 2])] == [1, 2, 2]
    with pytest.raises(DataError, match=r"has 2 right pairs; a schedule needs exactly one"):
        answer_index(example)


def test_the_estimate_knows_the_shapes_and_splits(images: Path) -> None:
    expected = benchmark("folder").expected
    assert expected(row(images, SEVERAL_TEXTS)) == Expected(0, 2, 1, 3)
    assert expected(row(images, SEVERAL_IMAGES, test=1)) == Expected(1, 1, 2, 1)
    given = expected(row(images, many(30, "train validation test")))
    assert given == Expected(20, 10, 2, 1, train=10) and given.few_shot(0) == 10
    assert expected(row(images, many(30, "train validation test"), test=4)).test == 4


def test_too_few_rows_name_the_shared_images(mine: Path, tmp_path: Path) -> None:
    rows = [f"dogs/{n % 2 + 1}.png,{n},text {n} {label},{label}" for n in range(8) for label in (1, 0)]
    table = "image,id,text,label\n" + "\n".join(rows) + "\n"
    line = mistake(row(mine, table, few_shot=0.5, validation=0.2, test=4), tmp_path / "d")
    assert line.startswith("datasets.d: 8 rows in whole groups are too few for 2 few-shot, 1 validation and 4 test")
    assert "; 4 of them share images, among them dogs-" in line


def test_links_stay_in_the_folder(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(image_bytes(9))
    (mine / "out.png").symlink_to(tmp_path / "secret.png")
    (mine / "within.png").symlink_to(mine / "dogs" / "1.png")
    assert len(downloaded(row(mine, "image,text,label\nwithin.png,a,1\nwithin.png,b,0\n"), tmp_path / "d")) == 1
    line = mistake(row(mine, "image,text,label\nout.png,a,1\nout.png,b,0\n"), tmp_path / "e")
    assert line == f"{mine}/table.csv:2: 'out.png' is a link out of the folder {mine}"
    (mine / "out").symlink_to(tmp_path)
    line = mistake(row(mine, "image,text,label\nout/secret.png,a,1\nout/secret.png,b,0\n"), tmp_path / "e")
    assert line == f"{mine}/table.csv:2: 'out/secret.png' is a link out of the folder {mine}"


HEAD = "image,text,label\n"


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("", ":1: no column 'image' (columns: none)"),
        ("image,text,right\n", ":1: no column 'label' (columns: image, text, right)"),
        ("image;text;label\ndogs/1.png;a;1\n", ":1: delimited by ';', must be by ','"),
        ("image\ttext\tlabel\ndogs/1.png\ta\t1\n", ":1: delimited by '\\t', must be by ','"),
        ("image,text,label,spilt\n", ":1: unknown column 'spilt': did you mean 'split'?"),
        ("image,text,label,text\n", ":1: column 'text' occurs 2 times"),
        (HEAD + "dogs/1.png,a\n", ":2: 2 fields, the header has 3"),
        (HEAD + "dogs/1.png,a,b,1\n", ":2: 4 fields, the header has 3"),
        (HEAD + "dogs/1.png,,1\n", ":2: text is empty"),
        (HEAD + '\ndogs/1.png,"two\nlines",yes\n', ":4: label must be 1 or 0, found 'yes'"),
        (HEAD + 'dogs/1.png,"a"b,1\n', ":2: not CSV: ',' expected after '\"'"),
        (HEAD + "../1.png,a,1\n", ":2: '../1.png' must be a path in the folder"),
        (HEAD + "dogs/../../1.png,a,1\n", ":2: 'dogs/../../1.png' must be a path in the folder"),
        (HEAD + "/etc/passwd,a,1\n", ":2: '/etc/passwd' must be a path in the folder"),
        (HEAD + "dogs/1.png,a,1\n", ":2: example 'dogs/1.png' has only one row; at least two candidates are needed"),
        (HEAD + "dogs/1.png,a,0\ndogs/1.png,b,0\n", ":2: example 'dogs/1.png' has no row with label 1; it needs a"),
        (HEAD + "dogs/1.png,a,1\ndogs/1.png,b,1\n", ":2: example 'dogs/1.png' has no row with label 0; it needs a"),
        (HEAD, ": has no row below the header"),
        ("image,text,label,category\ndogs/1.png,a,1,x$\n", ":2: category 'x$': may have letters, digits, spaces and"),
        ("image,text,label,category\ndogs/1.png,a,1,a//b\n", ":2: category 'a//b': may have letters, digits"),
        ("image,text,label,category\ndogs/1.png,a,1,a/../b\n", ":2: category 'a/../b': may have letters, digits"),
        (HEAD + "dogs/1.png,a,1\ndogs/1.png,b,0\n./dogs/1.png,a,1\n", ":4: repeats line 2"),
        (
            "id,image,text,label\n1,dogs/1.png,a,1\n1,dogs/2.png,b,0\n",
            ":2: example '1' has 2 images and 2 texts; one of the two must be single",
        ),
        (
            "image,text,label,category\ndogs/1.png,a,1,x\ndogs/1.png,b,0,y\n",
            ":3: another category than in line 2, of the same example",
        ),
        ("image,text,label,split\ndogs/1.png,a,1,tset\n", ":2: unknown split 'tset': did you mean 'test'?"),
        (
            "image,text,label,split\ndogs/1.png,a,1,test\ndogs/1.png,b,0,train\n",
            ":3: another split than in line 2, of the same example",
        ),
        (
            "image,text,label,split\ndogs/1.png,a,1,train\ndogs/1.png,b,0,train\n",
            ": no row has split test; every method is measured on those",
        ),
    ],
)
def test_a_mistake_in_the_table_is_one_line(table: str, line: str, mine: Path, tmp_path: Path) -> None:
    assert mistake(row(mine, table), tmp_path / "d").startswith(f"{mine}/table.csv{line}")


def test_an_unreadable_table(mine: Path, tmp_path: Path) -> None:
    good = row(mine, SEVERAL_TEXTS)
    (mine / "table.csv").write_bytes("image,text,label\ndogs/1.png,é,1\n".encode("latin-1"))
    assert mistake(good, tmp_path / "d") == f"{mine}/table.csv: not UTF-8"
    (mine / "table.csv").write_text(SEVERAL_TEXTS, encoding="utf-16")
    assert mistake(good, tmp_path / "d") == f"{mine}/table.csv: UTF-16; save it as UTF-8"
    assert mistake(good.model_copy(update={"table": "other.csv"}), tmp_path / "d") == f"{mine}/other.csv: no such file"
    assert mistake(good.model_copy(update={"table": "../t.csv"}), tmp_path / "d") == (
        f"datasets.d.table: '../t.csv' must be a path in the folder {mine}"
    )
    with pytest.raises(DataError, match=r"^datasets.d.source: nowhere is not a folder$"):
        row_ = good.model_copy(update={"source": "nowhere"})
        benchmark("folder").download(row_, seed=0, folder=tmp_path / "d", workers=1)
