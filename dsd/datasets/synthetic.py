"""What the embedded benchmarks share: naming, rendering and annotating synthetic scenes.

An item is what a benchmark samples at once: an image or a sentence, with all examples about it. It depends only on its
name (`<kind>/<seed>/<index>`), so neither the order of the work nor the number of workers changes it, and no item is a
scene of the pretraining data.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from dsd.config import DrawnDataset
from dsd.data.examples import MatchingExample
from dsd.data.splits import Split, split_groups
from dsd.datasets.annotations import ANNOTATIONS, IMAGES, RawExample, write_annotations
from dsd.datasets.protocol import Benchmark, Expected
from dsd.errors import DataError, ParamsError
from dsd.progress import progress
from dsd.scenes.corpus import NATIVE
from dsd.scenes.render import render
from dsd.scenes.world import PREDICATES, Noun, Scene, Test, Thing, Triplet, holds
from dsd.store import write_atomic


class Composed(NamedTuple):
    """Scenes by image file name, and the examples about them."""

    scenes: dict[str, Scene]
    examples: list[RawExample]


# Makes an item of a split from its name and index; the examples' ids start with the name.
Compose = Callable[[str, int, Split, DrawnDataset], Composed]


def synthetic(
    kind: str,
    compose: Compose,
    *,
    metrics: str,
    citation: str,
    candidates: Callable[[DrawnDataset], tuple[int, int]],
    examples: int = 1,
    own_kind: Callable[[MatchingExample], Sequence[int]] | None = None,
) -> Benchmark[DrawnDataset]:
    """Return a benchmark of rendered scenes.

    Args:
        candidates: numbers of images and texts per example.
        examples: number of examples per item.
        own_kind: see `Benchmark`.
    """
    return Benchmark(
        kind,
        partial(_download, compose, examples),
        metrics,
        citation,
        licence="not needed: rendered by dsd",
        expected=lambda row: Expected(row.size, row.test, *candidates(row)),
        remote=lambda name, row: 0,
        own_kind=own_kind,
    )


def image_name(index: int, role: str = "") -> str:
    """Return the file name of an item's image."""
    return f"{index:06d}{'-' if role else ''}{role}.png"


# The most lenient reading of each relation, as tests of (subject, object, subject is painted later).
# It includes everything that `dsd.scenes.world.PREDICATES` calls true; a diagonal is both left and above.
_LENIENT: dict[str, Test] = {
    "left of": lambda a, b, later: _towards(b.x - a.x, b.y - a.y),
    "right of": lambda a, b, later: _towards(a.x - b.x, b.y - a.y),
    "above": lambda a, b, later: _towards(b.y - a.y, b.x - a.x),
    "below": lambda a, b, later: _towards(a.y - b.y, b.x - a.x),
    "inside": lambda a, b, later: later and a.size < b.size and _within(a, b, b.size),
    "in front of": lambda a, b, later: later and _within(a, b, 0.95 * (a.size + b.size)),
    "larger than": lambda a, b, later: a.size >= 1.15 * b.size,
}


def _towards(offset: float, across: float) -> bool:
    return offset >= 0.06 and abs(across) <= 1.5 * offset


def _within(a: Thing, b: Thing, distance: float) -> bool:
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 <= distance**2


def arguable(scene: Scene, triplet: Triplet) -> bool:
    """Whether the triplet is true of the scene on a lenient reading. Only texts for which this fails count as false."""
    return holds(scene, triplet, _LENIENT)


def rivals(predicate: str) -> list[str]:
    """Return the predicates that can be clearly false when this one is true, and the reverse.

    A thing inside another is arguably in front of it, so these two are never rivals.
    """
    either = {"inside", "in front of"}
    return [other for other in PREDICATES if other != predicate and {other, predicate} != either]


def distractors(scene: Scene, triplet: Triplet) -> list[Noun]:
    """Return the nouns of the scene that are not in the triplet, in paint order."""
    return [thing.noun for thing in scene.things if thing.noun not in (triplet.subject, triplet.object)]


def rename(scene: Scene, nouns: Mapping[Noun, Noun]) -> Scene:
    """Replace nouns of the scene, and with them colours and shapes; the layout stays."""
    return replace(scene, things=tuple(replace(t, noun=nouns.get(t.noun, t.noun)) for t in scene.things))


def _items(row: DrawnDataset, dataset: str, seed: int, examples: int) -> list[tuple[str, int, Split]]:
    """Return (name, index, split) of the items in a split; the others are never rendered."""
    few_shot, validation = round(row.few_shot * row.size), round(row.validation * row.size)
    names = [f"{row.kind}/{seed}/{index}" for index in range(row.size // examples)]
    groups = [name for name in names for _ in range(examples)]
    try:
        splits = split_groups(
            groups, few_shot=few_shot, validation=validation, test=row.test, seed=seed, sample=row.sample
        )
    except DataError as error:
        raise ParamsError(f"datasets.{dataset}.size: {error}") from None
    return [(name, index, splits[name]) for index, name in enumerate(names) if name in splits]


def _render_item(compose: Compose, row: DrawnDataset, images: Path, item: tuple[str, int, Split]) -> Composed:
    composed = compose(*item, row)
    for name, scene in composed.scenes.items():
        png = io.BytesIO()
        render(scene, NATIVE).save(png, "PNG")
        write_atomic(images / name, png.getvalue())
    return composed


def _download(compose: Compose, examples: int, row: DrawnDataset, *, seed: int, folder: Path, workers: int) -> None:
    """Implement `protocol.Download` by rendering the images of all three splits.

    Raises:
        ParamsError: size is too small.
    """
    items, images = _items(row, folder.name, seed, examples), folder / IMAGES
    (folder / ANNOTATIONS).unlink(missing_ok=True)
    work = partial(_render_item, compose, row, images)
    if workers == 1:
        composed = list(progress(map(work, items), total=len(items), desc=folder.name))
    else:
        # Spawned, not forked: the caller may have threads.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            composed = list(progress(pool.map(work, items, chunksize=8), total=len(items), desc=folder.name))
    names = {name for item in composed for name in item.scenes}
    for stale in images.glob("*.png"):
        if stale.name not in names:
            stale.unlink()
    write_annotations(folder, [example for item in composed for example in item.examples])
