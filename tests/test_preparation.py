"""Preparation: each image stored once, reproducible bytes, unreadable files quarantined."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dsd.config import Params, load
from dsd.data.examples import MatchingExample, read_examples
from dsd.data.image_table import ImageTable
from dsd.data.images import image_id, load_image, resize, to_array
from dsd.data.splits import Split
from dsd.datasets import RawExample, preparation
from dsd.datasets.annotations import write_annotations
from dsd.errors import DataError

NAME = "scenes-cls"
FILES = ("examples.parquet", "images.parquet", "quarantine.json", "summary.json")


@pytest.fixture(scope="module")
def params() -> Params:
    return load(Path(__file__).parent.parent / "params.yaml")


def prepare(name: str, params: Params, source: Path, target: Path) -> dict[str, int]:
    """`preparation.prepare` with the settings of params."""
    row, workers = params.datasets[name], params.runtime.workers
    return preparation.prepare(name, row, source, target, images=params.images, seed=params.seed, workers=workers)


def paint(folder: Path, name: str, shade: int, size: tuple[int, int] = (70, 60)) -> None:
    """Write an image with a gradient, different for each shade."""
    pixels = np.add.outer(np.arange(size[1]), np.arange(size[0]))[..., None] % 200 + np.array([shade, 0, 50]) % 55
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name)


def example(number: int, *images: str, split: Split = "train", texts: tuple[str, ...] = ("a", "b")) -> RawExample:
    return RawExample(f"{NAME}/0/{number}", split, images, texts, ((0, 0),), "circle")


def dataset(folder: Path, count: int = 6) -> list[RawExample]:
    """Write `count` examples with an image each, alternating over the splits, as a download does."""
    splits: tuple[Split, ...] = ("train", "validation", "test")
    examples = [example(number, f"{number}.png", split=splits[number % 3]) for number in range(count)]
    for number in range(count):
        paint(folder, f"{number}.png", number)
    write_annotations(folder, examples)
    return examples


def read_all(target: Path) -> dict[str, MatchingExample]:
    return {
        e.id: e for split in ("train", "validation", "test") for e in read_examples(target / "examples.parquet", split)
    }


def test_counts_and_files(params: Params, tmp_path: Path) -> None:
    source, target = tmp_path / "raw", tmp_path / "prepared"
    raw = dataset(source)
    counts = prepare(NAME, params, source, target)
    assert counts == {
        "train": 2, "validation": 2, "test": 2,
        "images": 6, "repeated": 0, "quarantined": 0, "dropped": 0, "shared": 0,
    }  # fmt: skip
    assert sorted(path.name for path in target.iterdir()) == sorted(FILES)
    assert json.loads((target / "summary.json").read_text()) == counts
    assert json.loads((target / "quarantine.json").read_text()) == []
    prepared = read_all(target)
    assert [(e.id, e.texts, e.answer, e.category) for e in raw] == [
        (e.id, e.texts, e.answer, e.category) for e in sorted(prepared.values(), key=lambda e: e.id)
    ]
    assert {i for e in prepared.values() for i in e.images} == set(ImageTable(target / "images.parquet").ids)


@pytest.mark.parametrize(("parity", "side"), [(48, 48), (None, 64)])
def test_the_stored_image_is_what_clip_sees(params: Params, parity: int | None, side: int, tmp_path: Path) -> None:
    source, target = tmp_path / "raw", tmp_path / "prepared"
    dataset(source, 3)
    images = params.images.model_copy(update={"parity": parity, "resolution": 64})
    prepare(NAME, params.model_copy(update={"images": images}), source, target)
    images = ImageTable(target / "images.parquet")
    for number in range(3):
        (id,) = read_all(target)[f"{NAME}/0/{number}"].images
        expected = resize(
            load_image(source / "images" / f"{number}.png", max_pixels=10**6), parity=None, resolution=side
        )
        assert images[id].size == (side, side)
        assert np.array_equal(to_array(images[id]), to_array(expected))
        assert id == image_id(to_array(expected))


def test_the_same_input_gives_the_same_bytes(params: Params, tmp_path: Path) -> None:
    source = tmp_path / "raw"
    dataset(source, 9)
    (source / "images" / "4.png").write_bytes(b"not an image")
    for workers in (1, 3):
        runtime = params.runtime.model_copy(update={"workers": workers})
        prepare(NAME, params.model_copy(update={"runtime": runtime}), source, tmp_path / str(workers))
    for name in FILES:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_unreadable_images_drop_only_their_examples(params: Params, tmp_path: Path) -> None:
    source, target = tmp_path / "raw", tmp_path / "prepared"
    raw = dataset(source, 9)
    images = source / "images"
    whole = (images / "0.png").read_bytes()
    (images / "0.png").write_bytes(whole[: len(whole) // 2])  # truncated: its header is right
    (images / "1.png").unlink()
    (images / "2.png").write_bytes(b"<html>404</html>")
    paint(source, "3.png", 3, size=(900, 900))  # more than max_pixels
    two = example(9, "4.png", "2.png")  # one of its two images is readable
    write_annotations(source, [*raw, two])
    images = params.images.model_copy(update={"max_pixels": 500_000})
    counts = prepare(NAME, params.model_copy(update={"images": images}), source, target)
    assert (counts["quarantined"], counts["dropped"], counts["images"]) == (4, 5, 5)
    assert set(read_all(target)) == {f"{NAME}/0/{number}" for number in range(4, 9)}
    rows = json.loads((target / "quarantine.json").read_text())
    assert [row["name"] for row in rows] == ["0.png", "1.png", "2.png", "3.png"]
    assert all(row["reason"] and str(tmp_path) not in row["reason"] for row in rows)
    assert "max_pixels" in rows[3]["reason"]


def test_an_image_under_two_names_is_stored_once(params: Params, tmp_path: Path) -> None:
    source, target = tmp_path / "raw", tmp_path / "prepared"
    raw = dataset(source, 6)
    (source / "images" / "copy.png").write_bytes((source / "images" / "0.png").read_bytes())
    write_annotations(source, [*raw, example(6, "copy.png", split="train")])
    counts = prepare(NAME, params, source, target)
    assert (counts["images"], counts["repeated"], counts["shared"], counts["train"]) == (6, 1, 0, 3)
    prepared = read_all(target)
    assert prepared[f"{NAME}/0/6"].images == prepared[f"{NAME}/0/0"].images


def test_no_image_is_in_two_splits(params: Params, tmp_path: Path) -> None:
    """Example 0 trains on what 2 tests, and 1 validates on what 6 trains on: the later split keeps it."""
    source, target = tmp_path / "raw", tmp_path / "prepared"
    raw = dataset(source, 6)
    for name, of in (("0.png", "2.png"), ("6.png", "1.png")):
        (source / "images" / name).write_bytes((source / "images" / of).read_bytes())
    write_annotations(source, [*raw, example(6, "6.png", split="train")])
    counts = prepare(NAME, params, source, target)
    assert counts["shared"] == 2
    assert set(read_all(target)) == {f"{NAME}/0/{number}" for number in (1, 2, 3, 4, 5)}


def test_random_access(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsd.data.image_table.ROW_GROUP", 4)
    monkeypatch.setattr(preparation, "AHEAD", 3)
    source, target = tmp_path / "raw", tmp_path / "prepared"
    dataset(source, 42)
    prepare(NAME, params, source, target)
    assert pq.ParquetFile(target / "images.parquet").num_row_groups == 11
    images = ImageTable(target / "images.parquet")
    assert len(images) == len(set(images.ids)) == 42
    for id in reversed(images.ids):
        assert image_id(to_array(images[id])) == id


def test_missing_images_and_tables(params: Params, tmp_path: Path) -> None:
    source, target = tmp_path / "raw", tmp_path / "prepared"
    dataset(source, 3)
    prepare(NAME, params, source, target)
    with pytest.raises(KeyError, match="no image 'nothing'"):
        ImageTable(target / "images.parquet")["nothing"]
    with pytest.raises(DataError, match=r"absent\.parquet: no such file; prepare the dataset first"):
        ImageTable(tmp_path / "absent.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"broken\.parquet: not a table of images"):
        ImageTable(tmp_path / "broken.parquet")
    with pytest.raises(DataError, match=r"examples\.parquet: not a table of images"):
        ImageTable(target / "examples.parquet")


def test_an_unknown_kind_of_dataset(params: Params, tmp_path: Path) -> None:
    unknown = params.datasets[NAME].model_copy(update={"kind": "scenes-clss"})
    with pytest.raises(DataError, match=r"unknown kind of dataset 'scenes-clss': did you mean 'scenes-cls'\?"):
        prepare(NAME, params.model_copy(update={"datasets": {NAME: unknown}}), tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (dict(texts=("a", " ")), r"^scenes-cls: example scenes-cls/0/9: a text is empty$"),
        (dict(texts=()), r"^scenes-cls: example scenes-cls/0/9: 1 images and 0 texts, needs both$"),
        (dict(texts=("a",)), r"^scenes-cls: example scenes-cls/0/9: one image and one text are only one candidate$"),
        (
            dict(answer=((0, 2),)),
            r"^scenes-cls: example scenes-cls/0/9: answer .* outside 1 images × 2 texts$",
        ),
        (dict(answer=()), r"^scenes-cls: example scenes-cls/0/9: no right pair, so it cannot be trained on$"),
    ],
)
def test_invalid_examples(params: Params, broken: dict[str, object], message: str, tmp_path: Path) -> None:
    source, target = tmp_path / "raw", tmp_path / "prepared"
    raw = dataset(source, 3)
    fields = dict(
        id=f"{NAME}/0/9",
        split="train",
        images=("0.png",),
        texts=("a", "b"),
        answer=((0, 0),),
        category="ring",
    )
    write_annotations(source, [*raw, RawExample(**{**fields, **broken})])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        prepare(NAME, params, source, target)
    assert not target.exists()


def test_a_slot_without_test_examples_is_an_error(params: Params, tmp_path: Path) -> None:
    source, name = tmp_path / "raw", "scenes-com"
    dataset(source, 2)
    some = [
        RawExample(f"{name}/0/{slot}", "test", ("0.png", "1.png"), ("a",), ((0, 0),), slot)
        for slot in ("subject", "predicate")
    ]
    write_annotations(source, some)
    message = r"^scenes-com: the test split: no examples of category 'object'; raise datasets\.scenes-com\.test$"
    with pytest.raises(DataError, match=message):
        prepare(name, params, source, tmp_path / "prepared")


def test_a_split_that_loses_all_its_images(params: Params, tmp_path: Path) -> None:
    source, target = tmp_path / "raw", tmp_path / "prepared"
    dataset(source, 6)
    for number in (2, 5):
        (source / "images" / f"{number}.png").unlink()
    with pytest.raises(DataError, match="no example is left for test, 2 files quarantined"):
        prepare(NAME, params, source, target)
    assert not (target / "summary.json").exists()


def test_an_interrupted_run_keeps_the_old_images_and_no_summary(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "raw", tmp_path / "prepared"
    dataset(source, 6)
    prepare(NAME, params, source, target)
    before = (target / "images.parquet").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    paint(source, "5.png", 77)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "image_id", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(NAME, params, source, target)
    assert (target / "images.parquet").read_bytes() == before
    assert sorted(path.name for path in target.iterdir()) == sorted(set(FILES) - {"summary.json"})


def test_images_of_any_mode_become_rgb(params: Params, tmp_path: Path) -> None:
    source, target = tmp_path / "raw", tmp_path / "prepared"
    dataset(source, 3)
    Image.new("L", (20, 30), 128).save(source / "images" / "0.png")
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(buffer, "PNG")
    (source / "images" / "1.png").write_bytes(buffer.getvalue())
    prepare(NAME, params, source, target)
    examples, images = read_all(target), ImageTable(target / "images.parquet")
    grey, clear = (to_array(images[examples[f"{NAME}/0/{n}"].images[0]]) for n in (0, 1))
    assert (grey == 128).all()
    assert (clear == 255).all()
