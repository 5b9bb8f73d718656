"""The pictures and texts of pretraining, drawn once and kept as memory-mapped arrays.

Shapes: N pictures, R resolution of the diffusion model, P resolution of CLIP (the parity size), K captions a picture.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dsd.data.images import resize
from dsd.progress import progress
from dsd.scenes.captions import caption, pretraining_scene
from dsd.scenes.render import render
from dsd.store import write_atomic

NATIVE = 128  # side of a drawn picture, in pixels: the "photo" that both models see a resized version of


@dataclass(frozen=True)
class Corpus:
    """`direct` [N,R,R,3] and `parity` [N,R,R,3] (through P×P) and `small` [N,P,P,3], uint8; `captions` [N][K].

    `things` [N] says how many things a picture shows.
    """

    direct: np.ndarray
    parity: np.ndarray
    small: np.ndarray
    captions: list[list[str]]
    things: list[int]


def _draw(index: int, seed: int, captions: int, parity: int, resolution: int) -> tuple[np.ndarray, ...]:
    scene, rng = pretraining_scene(seed, index)
    picture = render(scene, NATIVE)
    texts = [caption(scene, rng) for _ in range(captions)]
    images = (
        resize(picture, parity=None, resolution=resolution),
        resize(picture, parity=parity, resolution=resolution),
        resize(picture, parity=None, resolution=parity),
    )
    return (*(np.asarray(image) for image in images), np.array(json.dumps([texts, len(scene.things)])))


def build(root: Path, *, seed: int, size: int, captions: int, parity: int, resolution: int, workers: int) -> Corpus:
    """Draws the corpus into `root`, or reads it where its marker says that this very corpus is there."""
    marker, recipe = (
        root / "corpus.json",
        dict(seed=seed, size=size, captions=captions, parity=parity, resolution=resolution),
    )
    if not (marker.exists() and json.loads(marker.read_text())["recipe"] == recipe):
        root.mkdir(parents=True, exist_ok=True)
        sides = {"direct": resolution, "parity": resolution, "small": parity}
        arrays = {
            name: np.lib.format.open_memmap(root / f"{name}.npy", "w+", np.uint8, (size, side, side, 3))
            for name, side in sides.items()
        }
        texts, things = [], []
        with ProcessPoolExecutor(workers) as pool:
            draw = partial(_draw, seed=seed, captions=captions, parity=parity, resolution=resolution)
            drawn = progress(pool.map(draw, range(size), chunksize=64), total=size, desc="corpus")
            for index, (*images, row) in enumerate(drawn):
                for array, image in zip(arrays.values(), images, strict=True):
                    array[index] = image
                said, count = json.loads(str(row))
                texts.append(said)
                things.append(count)
        for array in arrays.values():
            array.flush()
        write_atomic(marker, json.dumps({"recipe": recipe, "captions": texts, "things": things}).encode())
    loaded = {name: np.load(root / f"{name}.npy", mmap_mode="r") for name in ("direct", "parity", "small")}
    told = json.loads(marker.read_text())
    return Corpus(**loaded, captions=told["captions"], things=told["things"])
