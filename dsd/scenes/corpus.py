"""Images and captions for pretraining, rendered once and stored as memory-mapped arrays.

Shapes: N images, R resolution of the diffusion model, P resolution of CLIP (the parity size), K captions per image.
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

NATIVE = 128  # side of a rendered image in pixels, before it is resized for either model


@dataclass(frozen=True)
class Corpus:
    """`direct` [N,R,R,3] and `parity` [N,R,R,3] (through P×P) and `small` [N,P,P,3], uint8; `captions` [N][K].

    `things` [N] is the number of things in each image.
    """

    direct: np.ndarray
    parity: np.ndarray
    small: np.ndarray
    captions: list[list[str]]
    things: list[int]


def _sample(
    index: int, seed: int, captions: int, parity: int, resolution: int
) -> tuple[list[np.ndarray], list[str], int]:
    scene, rng = pretraining_scene(seed, index)
    image = render(scene, NATIVE)
    texts = [caption(scene, rng) for _ in range(captions)]
    views = (
        resize(image, parity=None, resolution=resolution),
        resize(image, parity=parity, resolution=resolution),
        resize(image, parity=None, resolution=parity),
    )
    return [np.asarray(view) for view in views], texts, len(scene.things)


def build(root: Path, *, seed: int, size: int, captions: int, parity: int, resolution: int, workers: int) -> Corpus:
    """Render the corpus into `root`, unless the marker there has the same recipe, and open it."""
    marker = root / "corpus.json"
    recipe = dict(seed=seed, size=size, captions=captions, parity=parity, resolution=resolution)
    if not (marker.exists() and json.loads(marker.read_text())["recipe"] == recipe):
        root.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)  # an interrupted run must not leave it beside other arrays
        sides = {"direct": resolution, "parity": resolution, "small": parity}
        arrays = {
            name: np.lib.format.open_memmap(root / f"{name}.npy", "w+", np.uint8, (size, side, side, 3))
            for name, side in sides.items()
        }
        texts, things = [], []
        with ProcessPoolExecutor(workers) as pool:
            sample = partial(_sample, seed=seed, captions=captions, parity=parity, resolution=resolution)
            samples = progress(pool.map(sample, range(size), chunksize=64), total=size, desc="corpus")
            for index, (images, of_image, count) in enumerate(samples):
                for array, image in zip(arrays.values(), images, strict=True):
                    array[index] = image
                texts.append(of_image)
                things.append(count)
        for array in arrays.values():
            array.flush()
        write_atomic(marker, json.dumps({"recipe": recipe, "captions": texts, "things": things}).encode())
    loaded = {name: np.load(root / f"{name}.npy", mmap_mode="r") for name in ("direct", "parity", "small")}
    content = json.loads(marker.read_text())
    return Corpus(**loaded, captions=content["captions"], things=content["things"])
