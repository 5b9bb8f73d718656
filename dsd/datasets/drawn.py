"""What the embedded benchmarks share: how their scenes are named, proven, painted and annotated.

An item is what a benchmark samples at once: a picture or a sentence, with all examples about it. It is made
from its name alone (`<kind>/<seed>/<index>`), so neither the order of the work nor the number of workers
moves it, and no item is a scene of pretraining.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from dsd.config import DrawnDataset
from dsd.data.splits import Split, split
from dsd.datasets.raw import ANNOTATIONS, IMAGES, Benchmark, Expected, RawExample, annotated, write_annotations
from dsd.errors import ParamsError
from dsd.progress import progress
from dsd.scenes.corpus import NATIVE
from dsd.scenes.render import render
from dsd.scenes.world import PREDICATES, Noun, Scene, Thing, Triplet
from dsd.store import write_atomic


class Item(NamedTuple):
    """Scenes by picture file name, and the examples that are asked about them."""

    scenes: dict[str, Scene]
    examples: list[RawExample]


# Makes an item of a split from its name and index; the examples' ids start with the name.
Compose = Callable[[str, int, Split, DrawnDataset], Item]

# The optional fields of a dataset's row that a kind needs, with the least and the most that each number may be.
Requires = Mapping[str, tuple[int, int] | None]


def embedded(
    compose: Compose,
    *,
    metrics: str,
    citation: str,
    candidates: Callable[[DrawnDataset], tuple[int, int]],
    examples: int = 1,
    requires: Requires | None = None,
) -> Benchmark[DrawnDataset]:
    """A benchmark of painted scenes, `examples` to an item, each of so many candidates: images and texts."""
    return Benchmark(
        partial(_download, compose, examples, requires or {}),
        annotated,
        metrics,
        citation,
        licence="none needed: drawn here",
        expected=lambda row: Expected(row.size, row.test, *candidates(row)),
        remote=lambda name, row: 0,
    )


def picture(index: int, role: str = "") -> str:
    """The file name of an item's picture."""
    return f"{index:06d}{'-' if role else ''}{role}.png"


# Relations as loosely as anyone might put them, as tests of (subject, object, subject is painted later).
# What `dsd.scenes.world.PREDICATES` calls true is true here too; a diagonal is both left and above.
_LOOSELY: dict[str, Callable[[Thing, Thing, bool], bool]] = {
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
    """Whether anyone might call the triplet true of the scene. A text counts as false only where this is."""
    subject, obj = scene.thing(triplet.subject), scene.thing(triplet.object)
    if subject is None or obj is None or subject is obj:
        return False
    return _LOOSELY[triplet.predicate](subject, obj, scene.things.index(subject) > scene.things.index(obj))


def rivals(predicate: str) -> list[str]:
    """The predicates that can be clearly false where this one is true, and the reverse.

    What is painted inside a thing is arguably in front of it, so these two never stand against each other.
    """
    either = {"inside", "in front of"}
    return [other for other in PREDICATES if other != predicate and {other, predicate} != either]


def distractors(scene: Scene, triplet: Triplet) -> list[Noun]:
    """The nouns of the scene that are not in the triplet, in paint order."""
    return [thing.noun for thing in scene.things if thing.noun not in (triplet.subject, triplet.object)]


def rename(scene: Scene, nouns: Mapping[Noun, Noun]) -> Scene:
    """The same layout with other names, and so other colours and shapes, for some of the things."""
    return replace(scene, things=tuple(replace(t, noun=nouns.get(t.noun, t.noun)) for t in scene.things))


def _items(row: DrawnDataset, dataset: str, seed: int, examples: int) -> list[tuple[str, int, Split]]:
    """(name, index, split) of the items that a split asks for; the others are never painted."""
    few_shot, validation = round(row.few_shot * row.size), round(row.validation * row.size)
    wanted, groups = few_shot + validation + row.test, row.size // examples
    if wanted > groups * examples:
        raise ParamsError(
            f"datasets.{dataset}.size: {groups * examples} examples are fewer than the {few_shot} few-shot, "
            f"{validation} validation and {row.test} test ones asked for"
        )
    names = [f"{row.kind}/{seed}/{index}" for index in range(groups)]
    splits = split(
        [name for name in names for _ in range(examples)],
        few_shot=few_shot,
        validation=validation,
        test=row.test,
        seed=seed,
        sample=row.sample,
    )
    return [(name, index, splits[name]) for index, name in enumerate(names) if name in splits]


def _paint(compose: Compose, row: DrawnDataset, images: Path, item: tuple[str, int, Split]) -> Item:
    composed = compose(*item, row)
    for name, scene in composed.scenes.items():
        png = io.BytesIO()
        render(scene, NATIVE).save(png, "PNG")
        write_atomic(images / name, png.getvalue())
    return composed


def _download(
    compose: Compose,
    examples: int,
    requires: Requires,
    row: DrawnDataset,
    *,
    seed: int,
    folder: Path,
    workers: int,
) -> None:
    """Paints the pictures of all three splits in place of a download; see `dsd.datasets.raw.Download`.

    Raises:
        ParamsError: a field that the kind needs is missing or out of range, or size is too small.
    """
    for field, limits in requires.items():
        value, needed = getattr(row, field), f"{limits[0]} to {limits[1]}" if limits else "one"
        if value is None or (limits and not limits[0] <= value <= limits[1]):
            found = "it is missing" if value is None else f"found {value}"
            raise ParamsError(f"datasets.{folder.name}.{field}: {row.kind} needs {needed}, {found}")
    items, images = _items(row, folder.name, seed, examples), folder / IMAGES
    (folder / ANNOTATIONS).unlink(missing_ok=True)
    work = partial(_paint, compose, row, images)
    if workers == 1:
        composed = list(progress(map(work, items), total=len(items), desc=folder.name))
    else:
        # Not forked: whoever calls may run threads.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            composed = list(progress(pool.map(work, items, chunksize=8), total=len(items), desc=folder.name))
    painted = {name for item in composed for name in item.scenes}
    for stale in images.glob("*.png"):
        if stale.name not in painted:
            stale.unlink()
    write_annotations(folder, [example for item in composed for example in item.examples])
