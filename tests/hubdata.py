"""Small datasets with the files and columns of the real ones, as their publishers' tools write them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets as hf
import numpy as np
from PIL import Image

from dsd.config import DatasetParams
from dsd.datasets import benchmark
from dsd.datasets.annotations import ANNOTATIONS, IMAGES, RawExample

hf.disable_progress_bars()

Files = dict[str, bytes]
TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def image_bytes(number: int, format: str = "PNG") -> bytes:
    """An image file, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format)
    return data.getvalue()


def image_cell(number: int, format: str = "PNG") -> dict[str, Any]:
    """A cell of a column of images."""
    return {"bytes": image_bytes(number, format), "path": f"{number:04d}.{format.lower()}"}


def parquet(columns: dict[str, Sequence[Any]], features: dict[str, Any], batch: int = 4) -> bytes:
    """A Parquet file as `datasets` writes it, with few rows per group."""
    data = io.BytesIO()
    table = hf.Dataset.from_dict(
        {name: list(values) for name, values in columns.items()}, features=hf.Features(features)
    )
    table.to_parquet(data, batch_size=batch)
    return data.getvalue()


def shard(columns: dict[str, Sequence[Any]], features: dict[str, Any], prefix: str, count: int = 2) -> Files:
    """The rows in several files."""
    rows = len(next(iter(columns.values())))
    cuts = [rows * n // count for n in range(count + 1)]
    return {
        f"{prefix}-{n:05d}-of-{count:05d}.parquet": parquet({k: v[a:b] for k, v in columns.items()}, features)
        for n, (a, b) in enumerate(pairwise(cuts))
    }


def cifar10(train: int = 40, test: int = 20) -> Files:
    def rows(count: int, first: int) -> dict[str, Any]:
        return {"img": [image_cell(first + n) for n in range(count)], "label": [n % 10 for n in range(count)]}

    features = {"img": hf.Image(), "label": hf.ClassLabel(names=TEN)}
    return {
        **shard(rows(train, 0), features, "plain_text/train", 1),
        **shard(rows(test, 1000), features, "plain_text/test", 1),
        "README.md": b"---\n",
    }


def stl10() -> Files:
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    features = {"image": hf.Image(), "label": hf.ClassLabel(names=names)}
    rows = {"image": [image_cell(n) for n in range(30)], "label": [n % 10 for n in range(30)]}
    more = {"image": [image_cell(100 + n) for n in range(10)], "label": list(range(10))}
    return {**shard(rows, features, "data/train", 1), **shard(more, features, "data/test", 1)}


def tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def samples(numbers: Iterable[int], classes: int = 100) -> bytes:
    return tar(
        member
        for n in numbers
        for member in (
            (f"s{n:07d}.cls", str(n % classes).encode()),
            (f"s{n:07d}.webp", image_bytes(n, "WEBP")),
        )
    )


def fgvc_aircraft() -> Files:
    return {
        "classnames.txt": "".join(f"variant {n}\n" for n in range(100)).encode(),
        "train/0.tar": samples(range(10)),
        "train/1.tar": samples(range(10, 20)),
        "train/nshards.txt": b"2",
        "test/0.tar": samples(range(100, 110)),
        "test/nshards.txt": b"1",
        "zeroshot_classification_templates.txt": b"a photo of a {c}, a type of aircraft.\n",
    }


REFCOCOG = {
    "question_id": hf.Value("string"),
    "image": hf.Image(),
    "question": hf.Value("string"),
    "answer": hf.Sequence(hf.Value("string")),
    "segmentation": hf.Sequence(hf.Value("float32")),
    "bbox": hf.Sequence(hf.Value("float32")),
    "iscrowd": hf.Value("int8"),
    "file_name": hf.Value("string"),
}


def referred(images: Sequence[int]) -> dict[str, Any]:
    """Two objects per image, each with two expressions."""
    rows = [(n, part) for n in images for part in ("left", "right")]
    return {
        "question_id": [str(100 * n + len(part)) for n, part in rows],
        "image": [image_cell(n, "JPEG") for n, _ in rows],
        "question": ["Describe the region."] * len(rows),
        "answer": [[f"the {part} one of {n}", f"that on the {part}, of {n}"] for n, part in rows],
        "segmentation": [[0.0, 0.0, 4.0, 4.0, 0.0, 4.0]] * len(rows),
        "bbox": [[0.0 if part == "left" else 4.0, 0.0, 4.0, 8.0] for _, part in rows],
        "iscrowd": [0] * len(rows),
        "file_name": [f"COCO_train2014_{n:012d}.jpg" for n, _ in rows],
    }


def refcocog() -> Files:
    """The last two images of the validation are also in the test."""
    val, test = referred(range(42)), referred(range(40, 52))
    return {**shard(val, REFCOCOG, "data/val"), **shard(test, REFCOCOG, "data/test")}


VQAV2 = {
    "question_type": hf.Value("string"),
    "multiple_choice_answer": hf.Value("string"),
    "answers": [
        {
            "answer": hf.Value("string"),
            "answer_confidence": hf.Value("string"),
            "answer_id": hf.Value("int64"),
        }
    ],
    "image_id": hf.Value("int64"),
    "answer_type": hf.Value("string"),
    "question_id": hf.Value("int64"),
    "question": hf.Value("string"),
    "image": hf.Image(),
}


def questions(images: Sequence[int]) -> dict[str, Any]:
    """Three questions per image: yes or no, a number, and other; some of the last have a rare answer."""
    pairs = [(n, kind) for n in images for kind in range(3)]
    given = [(("yes", "no")[n % 2], str(n % 2 + 1), f"rare {n}" if n % 5 == 0 else "red")[kind] for n, kind in pairs]
    return {
        "question_type": [("is the", "how many", "what")[kind] for _, kind in pairs],
        "multiple_choice_answer": given,
        "answers": [[{"answer": a, "answer_confidence": "yes", "answer_id": i} for i in (1, 2)] for a in given],
        "image_id": [n for n, _ in pairs],
        "answer_type": [("yes/no", "number", "other")[kind] for _, kind in pairs],
        "question_id": [1000 * n + kind for n, kind in pairs],
        "question": [f"{('Is it so', 'How many', 'Which colour')[kind]} in {n}?" for n, kind in pairs],
        "image": [image_cell(n, "JPEG") for n, _ in pairs],
    }


def vqav2(images: Sequence[int] = range(30)) -> Files:
    return shard(questions(images), VQAV2, "data/validation")


WINOGROUND = {
    "id": hf.Value("int32"),
    "image_0": hf.Image(),
    "image_1": hf.Image(),
    "caption_0": hf.Value("string"),
    "caption_1": hf.Value("string"),
    "tag": hf.Value("string"),
    "secondary_tag": hf.Value("string"),
    "num_main_preds": hf.Value("int32"),
    "collapsed_tag": hf.Value("string"),
}


def squares(count: int = 9) -> dict[str, Any]:
    return {
        "id": list(range(count)),
        "image_0": [image_cell(2 * n) for n in range(count)],
        "image_1": [image_cell(2 * n + 1) for n in range(count)],
        "caption_0": [f"{n} above {n + 1}" for n in range(count)],
        "caption_1": [f"{n + 1} above {n}" for n in range(count)],
        "tag": ["Scope, Preposition"] * count,
        "secondary_tag": [""] * count,
        "num_main_preds": [1] * count,
        "collapsed_tag": [("Object", "Relation", "Both")[n % 3] for n in range(count)],
    }


def winoground() -> Files:
    return shard(squares(), WINOGROUND, "data/test", 1)


FILES = {
    "cifar10": {"train": "plain_text/train-*.parquet", "test": "plain_text/test-*.parquet"},
    "stl10": {"train": "data/train-*.parquet", "test": "data/test-*.parquet"},
    "fgvc-aircraft": {"train": "train/*.tar", "test": "test/*.tar"},
    "refcocog": {"train": "data/val-*", "test": "data/test-*"},
    "vqav2": {"train": None, "test": "data/validation-*"},
    "winoground": {"train": None, "test": "data/test-*.parquet"},
}
OWN: dict[str, dict[str, Any]] = {
    "cifar10": {"template": "a photo of a {}"},
    "stl10": {"template": "a photo of a {}"},
    "fgvc-aircraft": {"template": "a photo of a {}, an aircraft"},
    "refcocog": {"candidates": 10},
    "vqav2": {"answers": 5, "test": 24},
    "winoground": {"few_shot": 0, "validation": 0},
}
MAKE = {
    "cifar10": cifar10,
    "stl10": stl10,
    "fgvc-aircraft": fgvc_aircraft,
    "refcocog": refcocog,
    "vqav2": vqav2,
    "winoground": winoground,
}


def row(kind: str, source: Path | str, **changes: Any) -> Any:
    """A row of params for a folder with the files of a kind."""
    fields: dict[str, Any] = dict(few_shot=0.2, sample=0, validation=0.1, test=None, missing=0)
    of_kind = dict(revision=None, files=FILES[kind], **OWN[kind]) if kind in MAKE else {}
    return DatasetParams.kinds[kind].model_validate(
        {"kind": kind, "source": str(source), **fields, **of_kind, **changes}
    )


def downloaded(row: Any, folder: Path, seed: int = 0) -> list[RawExample]:
    """Download and return the examples; checks that the folder has exactly their images."""
    entry = benchmark(row.kind)
    entry.download(row, seed=seed, folder=folder, workers=2)
    found = list(entry.examples(folder, seed=seed))
    assert {file.name for file in (folder / IMAGES).iterdir()} == {name for e in found for name in e.images}
    assert {file.name for file in folder.iterdir()} == {ANNOTATIONS, IMAGES}
    return found


def written(files: Files, folder: Path) -> Path:
    """Write the files of a repository to a folder."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder
