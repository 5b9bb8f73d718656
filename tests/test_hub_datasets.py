"""Published benchmarks on the Hub: from files with the real columns to examples."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets as hf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsd.config import Params, load
from dsd.data.examples import read_examples
from dsd.datasets import benchmark
from dsd.datasets.annotations import ANNOTATIONS, IMAGES, RawExample, read_annotations
from dsd.datasets.published import file_stem
from dsd.errors import DataError, DsdError, ParamsError
from dsd.evaluation.evaluate import ScoredSplit, evaluate, hits_of, ranked
from dsd.metrics import METRICS, rank
from tests.conftest import ROOT
from tests.hubdata import (
    MAKE,
    REFCOCOG,
    TEN,
    VQAV2,
    WINOGROUND,
    Files,
    downloaded,
    image_bytes,
    image_cell,
    parquet,
    questions,
    referred,
    row,
    samples,
    shard,
    squares,
    vqav2,
    written,
)
from tests.test_preparation import prepare

SIZES = {  # train, validation, test
    "cifar10": (8, 4, 20),
    "stl10": (6, 3, 10),
    "fgvc-aircraft": (4, 2, 10),
    "refcocog": (16, 8, 24),
    "vqav2": (15, 9, 24),
    "winoground": (0, 0, 9),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with the files of each kind."""
    return {kind: written(make(), tmp_path_factory.mktemp(kind)) for kind, make in MAKE.items()}


def mistake(row: Any, folder: Path) -> str:
    with pytest.raises(DsdError) as error:
        benchmark(row.kind).download(row, seed=0, folder=folder, workers=1)
    assert "\n" not in str(error.value) and not (folder / ANNOTATIONS).exists()
    return str(error.value)


@pytest.mark.parametrize("kind", MAKE)
def test_from_files_to_prepared_examples(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    found = downloaded(row(kind, made[kind]), tmp_path / "mine")
    assert tuple(Counter(e.split for e in found)[s] for s in ("train", "validation", "test")) == SIZES[kind]
    assert len({e.id for e in found}) == len(found) and all(e.id.startswith(f"{kind}/") for e in found)
    assert all(len(set(e.texts)) == len(e.texts) for e in found)
    by_split = {s: {name for e in found if e.split == s for name in e.images} for s in ("train", "validation", "test")}
    assert not by_split["test"] & (by_split["train"] | by_split["validation"])
    assert not by_split["train"] & by_split["validation"]

    params = load(ROOT / "params.yaml")
    params = params.model_copy(update={"datasets": {"mine": row(kind, made[kind])}})
    summary = prepare("mine", params, tmp_path / "mine", tmp_path / "prepared")
    assert (summary["train"], summary["validation"], summary["test"]) == SIZES[kind]
    assert summary["quarantined"] == summary["shared"] == 0

    tests = read_examples(tmp_path / "prepared" / "examples.parquet", "test")
    tables = [np.zeros((len(e.images), len(e.texts))) for e in tests]
    nothing = hits_of(kind, tests, ranked(tests, tables))
    for example, scores in zip(tests, tables, strict=True):
        for pair in example.answer:
            scores[pair] = 1
    everything = hits_of(kind, tests, ranked(tests, tables))
    answerable = [float(bool(e.answer)) for e in tests]
    for metric, (hits, _) in everything.items():
        assert hits.tolist() == answerable and (nothing[metric][0].sum() == 0)


@pytest.mark.parametrize("kind", MAKE)
def test_a_download_is_reproducible_and_resumes(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    mine = row(kind, made[kind])
    found = downloaded(mine, tmp_path / "a")
    images = sorted((tmp_path / "a" / IMAGES).iterdir())
    images[0].unlink()
    images[1].write_bytes(b"half a pic")
    (tmp_path / "a" / IMAGES / "of another seed.png").write_bytes(b"")
    before = images[2].stat()
    assert downloaded(mine, tmp_path / "a") == found
    assert images[2].stat().st_ino == before.st_ino  # not written again
    annotations = (tmp_path / "a" / ANNOTATIONS).read_bytes()
    downloaded(mine, tmp_path / "b")
    assert (tmp_path / "b" / ANNOTATIONS).read_bytes() == annotations
    assert all((tmp_path / "b" / IMAGES / file.name).read_bytes() == file.read_bytes() for file in images)


@pytest.mark.parametrize("kind", [kind for kind in MAKE if kind != "winoground"])
def test_samples_share_the_test(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    of = [downloaded(row(kind, made[kind], sample=sample), tmp_path / str(sample)) for sample in (0, 1)]
    tests = [{e.id for e in found if e.split != "train"} for found in of]
    trains = [{e.id for e in found if e.split == "train"} for found in of]
    assert tests[0] == tests[1] and trains[0] != trains[1]


def test_the_seed_selects_test_examples(made: dict[str, Path], tmp_path: Path) -> None:
    whole = downloaded(row("cifar10", made["cifar10"]), tmp_path / "whole")
    of = [downloaded(row("cifar10", made["cifar10"], test=7), tmp_path / str(s), seed=s) for s in (0, 1)]
    tests = [[e for e in found if e.split == "test"] for found in of]
    assert len(tests[0]) == len(tests[1]) == 7 and tests[0] != tests[1]
    assert all(e in whole for e in tests[0])
    assert [e for e in of[0] if e.split != "test"] == [e for e in whole if e.split != "test"]


def test_params_that_need_more_examples(made: dict[str, Path], tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    assert mistake(row("cifar10", made["cifar10"], test=21), mine) == (
        "datasets.mine: 20 rows in whole groups are too few for 0 few-shot, 0 validation and 21 test examples"
    )
    line = mistake(row("vqav2", made["vqav2"], test=None), mine)
    assert line.startswith("datasets.mine.test: null takes every example, and none is left for few_shot and validation")


# Classes


@pytest.mark.parametrize(("kind", "column"), [("cifar10", "img"), ("stl10", "image")])
def test_classes_of_a_parquet(kind: str, column: str, made: dict[str, Path], tmp_path: Path) -> None:
    found = downloaded(row(kind, made[kind]), tmp_path / "mine")
    file = next(made[kind].rglob("test-*.parquet"))
    rows = pq.read_table(file).to_pylist()
    tests = [e for e in found if e.split == "test"]
    assert [e.answer for e in tests] == [((0, r["label"]),) for r in rows]
    for example, cells in zip(tests, rows, strict=True):
        assert (tmp_path / "mine" / IMAGES / example.images[0]).read_bytes() == cells[column]["bytes"]
        assert example.texts[example.answer[0][1]] == f"a photo of a {example.category}"
    if kind == "cifar10":
        assert tests[0].texts == tuple(f"a photo of a {name}" for name in TEN)
        assert tests[3].id == "cifar10/plain_text/test-00000-of-00001/3/img"


def test_classes_of_tars(made: dict[str, Path], tmp_path: Path) -> None:
    found = downloaded(row("fgvc-aircraft", made["fgvc-aircraft"]), tmp_path / "mine")
    example = next(e for e in found if e.id == "fgvc-aircraft/test/0/s0000103")
    assert (len(example.texts), example.answer, example.category) == (100, ((0, 3),), "variant 3")
    assert example.texts[3] == "a photo of a variant 3, an aircraft"
    assert example.images[0].endswith(".webp")
    assert (tmp_path / "mine" / IMAGES / example.images[0]).read_bytes() == image_bytes(103, "WEBP")


LABELLED = {"img": hf.Image(), "label": hf.ClassLabel(names=["a", "b"])}


def labelled(features: dict[str, Any] | None = None, **columns: Any) -> bytes:
    rows = {"img": [image_cell(n) for n in range(4)], "label": [0, 1, 0, 1]} | columns
    return parquet(rows, features or LABELLED)


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            {"test": labelled({"img": hf.Image(), "label": hf.Value("int64")})},
            "test.parquet: needs one column of kind ClassLabel, has 0 (columns: img, label)",
        ),
        (
            {"test": labelled({**LABELLED, "img": hf.Value("string")}, img=list("abcd"))},
            "test.parquet: needs one column of kind Image, has 0 (columns: img, label)",
        ),
        (
            {"test": labelled(), "train": labelled({**LABELLED, "label": hf.ClassLabel(names=["b", "a"])})},
            "test.parquet: has other classes than {}/train.parquet",
        ),
        ({"test": labelled(label=[0, -1, 0, 1])}, "test.parquet, 1: class -1, but there are 2, from 0"),
        ({"test": labelled({**LABELLED, "label": hf.ClassLabel(names=["a", "a "])})}, ""),
    ],
)
def test_a_parquet_without_classes(files: Files, line: str, tmp_path: Path) -> None:
    patterns = {"train": "train.parquet" if "train" in files else None, "test": "test.parquet"}
    shares = {} if "train" in files else {"few_shot": 0, "validation": 0}
    source = written({f"{name}.parquet": data for name, data in files.items()}, tmp_path / "files")
    mine = row("cifar10", source, files=patterns, **shares)
    if line:
        assert mistake(mine, tmp_path / "mine") == f"{source}/{line.format(source)}"
    else:
        assert len(downloaded(mine, tmp_path / "mine")) == 4


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (b"one\ntwo\n", "test/0.tar, s0000002: class 2, but there are 2, from 0"),
        (b"one\none\n", "test/0.tar: classes must be distinct and not blank, found 'one'"),
        (b"one\n\n", "test/0.tar: classes must be distinct and not blank, found ''"),
        (b"\xff\n", "classnames.txt: not UTF-8"),
    ],
)
def test_invalid_class_names(names: bytes, line: str, tmp_path: Path) -> None:
    source = written({"classnames.txt": names, "test/0.tar": samples(range(3))}, tmp_path / "files")
    planes = row("fgvc-aircraft", source, files={"train": None, "test": "test/*.tar"}, few_shot=0, validation=0)
    assert mistake(planes, tmp_path / "mine") == f"{source}/{line}"


# Missing images


def test_missing_images_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = pq.read_table(pa.BufferReader(labelled()))
    cells = table["img"].to_pylist()
    cells[1], cells[2] = {"bytes": None, "path": "1.png"}, {"bytes": b"no image", "path": "2.png"}
    source = tmp_path / "files"
    source.mkdir()
    broken = table.set_column(0, "img", pa.array(cells, table["img"].type)).replace_schema_metadata(
        table.schema.metadata
    )
    pq.write_table(broken, source / "test.parquet")
    options = {"files": {"train": None, "test": "*.parquet"}, "few_shot": 0, "validation": 0}
    line = mistake(row("cifar10", source, missing=1, **options), tmp_path / "mine")
    assert line == (
        f"datasets.mine.missing: 1, but 2 of 4 images are missing: {source}/test.parquet, row 1: a path ('1.png') "
        f"without the bytes of the image; {file_stem('test/2/img')}: not an image (formats read: JPEG, PNG, WEBP, GIF, "
        "BMP, TIFF, PPM)"
    )
    with caplog.at_level(logging.WARNING):
        found = downloaded(row("cifar10", source, missing=2, **options), tmp_path / "mine")
    assert [e.answer[0][1] for e in found] == [0, 1]
    assert "mine: 2 of 4 images are missing: " in caplog.text and "2 of 4 examples left out" in caplog.text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=120), unique=True, max_size=8))
def test_file_stems_are_unique_and_stay_in_the_folder(places: list[str]) -> None:
    names = [file_stem(place) for place in places]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,89}", name)


def test_examples_of_another_kind_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    downloaded(row("cifar10", made["cifar10"]), tmp_path / "mine")
    with pytest.raises(DataError, match=r"is not of stl10/; download the dataset again"):
        list(benchmark("stl10").examples(tmp_path / "mine", seed=0))


# RefCOCOg


def words(example: RawExample) -> list[tuple[str, str]]:
    """(part, image) that each of its texts refers to."""
    return [("left" if "left" in text else "right", text.rpartition(" ")[2]) for text in example.texts]


def test_refcocog_has_one_true_expression_among_ten(made: dict[str, Path], tmp_path: Path) -> None:
    found = downloaded(row("refcocog", made["refcocog"]), tmp_path / "mine")
    for example in found:
        ((_, true),) = example.answer
        images = [number for _, number in words(example)]
        own = str(int(example.images[0].removesuffix(".jpg").rpartition("_")[2]))
        assert len(example.texts) == 10 and images[true] == own and images.count(own) == 1
        # candidates of the test come from the test only, and are not trained on
        among = range(40, 52) if example.split == "test" else range(40)
        assert {int(number) for number in images} <= set(among)
    places = Counter(example.answer[0][1] for example in found)
    assert len(places) > 5
    assert len({example.texts for example in found}) == len(found)


def test_refcocog_candidates_depend_on_id_and_seed_only(made: dict[str, Path], tmp_path: Path) -> None:
    one, more = (
        downloaded(row("refcocog", made["refcocog"], few_shot=share), tmp_path / str(share)) for share in (0.2, 0.4)
    )
    assert {e.id: e.texts for e in one}.items() <= {e.id: e.texts for e in more}.items()
    other = downloaded(row("refcocog", made["refcocog"]), tmp_path / "other", seed=1)
    tests = [{e.id: e.texts for e in found if e.split == "test"} for found in (one, other)]
    assert tests[0].keys() == tests[1].keys() and tests[0] != tests[1]


def test_refcocog_texts_of_the_same_words_are_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    columns = referred(range(6))
    columns["answer"] = [
        ["The dog.", ""], ["a cat"],  # of image 0
        ["the dog", "a horse"], ["a cow"],
        ["a bird "], ["A BIRD"],
        ["the  dog"], ["a pig"],
        [" "], ["a fly"],
        ["a bee"], ["an ant"],
    ]  # fmt: skip
    columns["file_name"] = [f"COCO_train2014_{n // 2:012d}_{n}.jpg" for n in range(12)]  # the object's number behind
    source = written({"test.parquet": parquet(columns, REFCOCOG)}, tmp_path / "files")
    options = {"files": {"train": None, "test": "*.parquet"}, "few_shot": 0, "validation": 0}
    with caplog.at_level(logging.WARNING):
        found = downloaded(row("refcocog", source, candidates=6, **options), tmp_path / "mine")
    assert len(found) == 11 and len({e.images for e in found}) == 6
    assert "mine: 1 objects have no expression: left out" in caplog.text
    for example in found:
        spoken = [text.casefold().strip(". ").replace("  ", " ") for text in example.texts]
        assert len(set(spoken)) == 6 and all(spoken)
        if "000000000000" in example.images[0]:
            assert spoken.count("the dog") == (example.texts[example.answer[0][1]] == "The dog.")
    line = mistake(row("refcocog", source, candidates=10, **options), tmp_path / "few")
    assert line.startswith("datasets.few.candidates: 10, but test has only 7 expressions of other images than COCO_t")


def test_refcocog_does_not_train_on_test_images(
    made: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = downloaded(row("refcocog", made["refcocog"], few_shot=0.9, test=4), tmp_path / "mine")
    assert "mine: 4 training rows share an image with the test: left out" in caplog.text
    assert not {f"COCO_train2014_{n:012d}.jpg" for n in range(40, 52)} & {
        name for e in found if e.split != "test" for name in e.images
    }


# VQAv2


def test_vqav2_candidates_are_the_frequent_answers(made: dict[str, Path], tmp_path: Path) -> None:
    found = downloaded(row("vqav2", made["vqav2"]), tmp_path / "mine")
    columns = questions(range(30))
    index = {id: n for n, id in enumerate(columns["question_id"])}
    kinds: Counter[tuple[str, bool]] = Counter()
    for example in found:
        n = index[int(example.id.removeprefix("vqav2/"))]
        question, right = columns["question"][n], columns["multiple_choice_answer"][n]
        assert example.category == ("binary" if columns["answer_type"][n] == "yes/no" else "other")
        assert set(example.texts) == {f"{question} {answer}" for answer in ("red", "yes", "no", "1", "2")}
        true_texts = [example.texts[t] for _, t in example.answer]
        assert true_texts == ([] if right.startswith("rare") else [f"{question} {right}"])
        assert true_texts or example.split != "train"
        kinds[example.split, bool(true_texts)] += 1
    assert kinds["test", False] > 0
    METRICS["answers"](np.ones(len(found), int), [e.category for e in found])


def test_vqav2_questions_with_rare_answers_count_as_wrong(
    made: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = downloaded(row("vqav2", made["vqav2"], few_shot=0.7), tmp_path / "mine")
    lost = [e for e in found if not e.answer]
    count = sum(e.split == "test" for e in lost)
    assert f"mine: the answers of {count} test questions are not among 5: counted as wrong" in caplog.text
    assert "train questions are not among 5: left out" in caplog.text
    assert rank([[0.0] * 5], lost[0].answer) == 6


def test_vqav2_candidates_do_not_come_from_the_test(tmp_path: Path) -> None:
    """An answer that is frequent only in the test is not a candidate, whether files are shared or not."""
    columns = questions(range(30))
    source = written(vqav2(), tmp_path / "shared")
    tested = {
        int(e.id.removeprefix("vqav2/")) for e in downloaded(row("vqav2", source), tmp_path / "a") if e.split == "test"
    }
    columns["multiple_choice_answer"] = [
        "of the test" if id in tested else answer
        for id, answer in zip(columns["question_id"], columns["multiple_choice_answer"], strict=True)
    ]
    source = written(shard(columns, VQAV2, "data/validation"), tmp_path / "changed")
    found = downloaded(row("vqav2", source), tmp_path / "b")
    assert not any("of the test" in text for e in found for text in e.texts)
    assert all(not e.answer for e in found if e.split == "test")
    two = vqav2(range(30, 40)) | {
        f"train/{name.rpartition('/')[2]}": data for name, data in shard(questions(range(30)), VQAV2, "x").items()
    }
    apart = row(
        "vqav2", written(two, tmp_path / "two"), files={"train": "train/*", "test": "data/validation-*"}, test=None
    )
    found = downloaded(apart, tmp_path / "c")
    assert Counter(e.split for e in found)["test"] == 30


def test_vqav2_rows_that_repeat_a_question(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    columns = questions([*range(30), 3, 3])
    source = written(shard(columns, VQAV2, "data/validation"), tmp_path / "files")
    once = downloaded(row("vqav2", written(vqav2(), tmp_path / "once")), tmp_path / "a")
    with caplog.at_level(logging.WARNING):
        assert downloaded(row("vqav2", source), tmp_path / "b") == once
    assert "b: 6 rows repeat a question" in caplog.text
    columns["multiple_choice_answer"][-1] = "otherwise"
    source = written(shard(columns, VQAV2, "data/validation"), tmp_path / "files")
    assert mistake(row("vqav2", source), tmp_path / "c") == (
        f"{source}/data/validation-00001-of-00002.parquet, row 47: question 3002 differs from that in "
        "data/validation-00000-of-00002.parquet"
    )


def test_vqav2_with_too_few_answers(made: dict[str, Path], tmp_path: Path) -> None:
    line = mistake(row("vqav2", made["vqav2"], answers=3129), tmp_path / "mine")
    assert line.startswith("datasets.mine.answers: 3129, but the questions outside the test have ")


# Winoground


def test_winoground_examples_are_two_by_two(made: dict[str, Path], tmp_path: Path) -> None:
    found = downloaded(row("winoground", made["winoground"]), tmp_path / "mine")
    assert [e.id for e in found] == [f"winoground/{n}" for n in range(9)]
    for n, example in enumerate(found):
        assert example.texts == (f"{n} above {n + 1}", f"{n + 1} above {n}")
        assert example.answer == ((0, 0), (1, 1))
        bytes_ = [(tmp_path / "mine" / IMAGES / name).read_bytes() for name in example.images]
        assert bytes_ == [image_bytes(2 * n), image_bytes(2 * n + 1)]
    assert Counter(e.category for e in found) == {"Object": 3, "Relation": 3, "Both": 3}
    some = downloaded(row("winoground", made["winoground"], test=4), tmp_path / "some")
    assert len(some) == 4 and all(e in found for e in some)


def test_winoground_end_to_end(params: Params, made: dict[str, Path], tmp_path: Path) -> None:
    """From files to text, image and group score, by zero-shot methods."""
    from dsd.engine.cache import encode
    from dsd.engine.score import score
    from dsd.engine.session import Folders, Session

    mine = row("winoground", made["winoground"], test=4)
    methods = {name: params.methods[name] for name in ("dsd-zero-shot", "denoising", "clip-zero-shot")}
    params = params.model_copy(update={"datasets": {"mine": mine}, "methods": methods})
    raw, prepared, cached, scored = (tmp_path / part / "mine" for part in ("raw", "prepared", "cached", "scored"))
    benchmark("winoground").download(mine, seed=0, folder=raw, workers=1)
    prepare("mine", params, raw, prepared)
    session = Session("mine", params, Folders(prepared, cached, tmp_path))
    encode(session)
    assert score(session, scored, split="test")["pairs"] == 16
    split = ScoredSplit.of("mine", params, prepared, scored)
    results = evaluate("mine", split, params.evaluate, params.seed, tmp_path / "evaluated").results
    for found in results.values():
        assert list(found) == ["text", "image", "group"]
        assert found["group"].value <= min(found["text"].value, found["image"].value) and found["group"].n == 4


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"few_shot": 0.05}, "datasets.mine.few_shot: Winoground has only a test, must be 0, found 0.05"),
        ({"validation": 0.05}, "datasets.mine.validation: Winoground has only a test, must be 0, found 0.05"),
        (
            {"files": {"train": "data/*", "test": "data/*"}},
            "datasets.mine.files.train: Winoground has only a test, must be null, found data/*",
        ),
    ],
)
def test_winoground_has_no_training_examples(
    changes: dict[str, Any], line: str, made: dict[str, Path], tmp_path: Path
) -> None:
    mine = row("winoground", made["winoground"], **changes)
    with pytest.raises(ParamsError) as error:
        benchmark("winoground").download(mine, seed=0, folder=tmp_path / "mine", workers=1)
    assert str(error.value) == line


def test_winoground_ids_that_repeat(tmp_path: Path) -> None:
    columns = squares(3)
    columns["id"] = [0, 1, 1]
    source = written(shard(columns, WINOGROUND, "data/test", 1), tmp_path / "files")
    line = "datasets.mine.files.test: data/test-*.parquet has rows with the same id"
    assert mistake(row("winoground", source), tmp_path / "mine") == line


# All kinds


@pytest.mark.parametrize(
    ("kind", "column", "change"),
    [
        ("refcocog", "file_name", "filename"),
        ("refcocog", "answer", "expressions"),
        ("refcocog", "image", "photo"),
        ("vqav2", "answer_type", "type"),
        ("winoground", "caption_1", "caption"),
        ("winoground", "image_1", "image"),
    ],
)
def test_a_missing_column_is_one_line(kind: str, column: str, change: str, tmp_path: Path) -> None:
    files = {}
    for path, data in MAKE[kind]().items():
        table = pq.read_table(pa.BufferReader(data))
        sink = pa.BufferOutputStream()
        pq.write_table(table.rename_columns([change if n == column else n for n in table.column_names]), sink)
        files[path] = sink.getvalue().to_pybytes()
    source = written(files, tmp_path / "files")
    line = mistake(row(kind, source), tmp_path / "mine")
    assert line.startswith(str(source)) and f": no column {column!r} (columns: " in line and change in line


def test_images_are_stored_as_original_bytes(made: dict[str, Path], tmp_path: Path) -> None:
    found = downloaded(row("refcocog", made["refcocog"]), tmp_path / "mine")
    for name in {name for e in found for name in e.images}:
        data = (tmp_path / "mine" / IMAGES / name).read_bytes()
        assert data == image_bytes(int(name.removesuffix(".jpg").rpartition("_")[2]), "JPEG")
        with Image.open(tmp_path / "mine" / IMAGES / name) as kept:
            assert kept.format == "JPEG"
    assert list(read_annotations(tmp_path / "mine")) == found
