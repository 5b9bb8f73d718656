"""Races with a model: evidence at every draw, the same answers live as replayed, and what a user may get wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsd.engine import Engine
from dsd.errors import DataError, ParamsError
from dsd.evidence import UNCONDITIONAL
from dsd.matching import MatchingExample, Pair, pairs
from dsd.params import Params
from dsd.races import Folders, Track, choices, entrants, methods, proposals, right, run
from dsd.replay import Course, replay
from dsd.schedules import all_draws, hierarchical, shortlisted, staged
from dsd.store import Store
from tests.raced import few

DATASET, K = "scenes-com", 8


@pytest.fixture
def raced(params: Params) -> Params:
    """Images are compared: denoising is set off against the picture without a text, attention is not."""
    races = few(params.races)
    racing = races.racing.model_copy(update={"deltas": (0.9,), "confidence": 0.5, "threshold": (9.0, 1.0)})
    update = {"datasets": {DATASET: ("denoising", "dsd-zero-shot")}, "racing": racing, "timed": 60}
    return params.model_copy(update={"races": races.model_copy(update=update)})


@pytest.fixture
def folders(prepared: Path, cached: Path, tmp_path: Path) -> Folders:
    return Folders(prepared, cached, tmp_path / "train")


def test_values_are_those_of_single_passes(raced: Params, folders: Folders, tmp_path: Path) -> None:
    track = Track.of(raced.methods["denoising"], raced, folders)  # type: ignore[arg-type]
    examples = folders.examples("test")
    values = track.collect(examples, Store(tmp_path / "seen"), "x")
    pair, draw = pairs(examples[2:3])[1], track.draws[5]
    error, nothing = track.engine.compute([(pair, draw), (Pair(pair.image, UNCONDITIONAL), draw)])["error"]
    assert values[2].shape == (2, K) and values[2][1, 5] == pytest.approx(nothing - error, abs=1e-6)


def test_nothing_is_seen_twice(
    raced: Params, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    track, store = Track.of(raced.methods["denoising"], raced, folders), Store(tmp_path / "seen")  # type: ignore[arg-type]
    examples = folders.examples("test")
    first = track.collect(examples, store, "x")
    monkeypatch.setattr(Engine, "compute", None)
    again = track.collect(examples, store, "x")
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("row", ["denoising", "dsd-zero-shot"])
@pytest.mark.parametrize(
    "course",
    [
        Course(list(range(K)), all_draws(K), None),
        Course([3, 1, 7, 0], staged((2, 1), (1, 4)), None),
        Course(list(range(K)), hierarchical(4, 2, 2, 3, shrinking=False), None),
        Course([5, 2], shortlisted(all_draws(2), 1), "clip-zero-shot"),
    ],
)
@pytest.mark.parametrize("batch_size", [3, 50])
def test_live_races_end_as_replayed(
    row: str, course: Course, batch_size: int, raced: Params, folders: Folders, tmp_path: Path
) -> None:
    """In other batches, beside others, and with room made as races end."""
    runtime = raced.runtime.model_copy(update={"batch_size": batch_size})
    raced = raced.model_copy(update={"runtime": runtime})
    track, examples = Track.of(raced.methods[row], raced, folders), folders.examples("test")  # type: ignore[arg-type]
    said = {"clip-zero-shot": proposals("clip-zero-shot", examples, raced, folders)}
    races = entrants(examples, track.collect(examples, Store(tmp_path / "seen"), "x"), said)
    live = track.live(course, examples, races)
    assert live["differ"] == 0 and 1 <= live["images"] <= len(examples)
    assert 0 < live["fill"] <= 1 and live["seconds"] > 0


def test_a_run_tells_of_every_method(raced: Params, folders: Folders, tmp_path: Path) -> None:
    assert run(DATASET, raced, folders, tmp_path / "draws", tmp_path / "races") == {"races": 2 * 6 + 9}
    told = json.loads((tmp_path / "races" / f"{DATASET}.json").read_text())
    assert list(told) == ["denoising", "dsd-zero-shot"]
    for method in told.values():
        assert method["races"] == {"train": 12, "calibration": 6, "test": 9} and method["draws"] == K
        assert all(row["live"]["differ"] == 0 for row in method["chosen"].values())


def test_a_square_is_two_choices() -> None:
    square = MatchingExample("x", ("i", "j"), ("a", "b"), ((1, 0), (0, 1)), "all")
    assert choices(square) == [
        MatchingExample("x/0", ("i", "j"), ("a",), ((1, 0),), "all"),
        MatchingExample("x/1", ("i", "j"), ("b",), ((0, 0),), "all"),
    ]
    assert [right(choice) for choice in choices(square)] == [1, 0]


def test_the_right_pair_is_found_among_texts_that_repeat() -> None:
    example = MatchingExample("x", ("i",), ("a", "a", "b"), ((0, 2),), "all")
    assert pairs([example]) == [Pair("i", "a"), Pair("i", "b")] and right(example) == 1
    assert right(replace(example, answer=((0, 1),))) == -1  # a tie


@pytest.mark.parametrize("name", ["dsd-plus", "clip-zero-shot", "denoisin"])
def test_a_method_that_is_no_mean_over_draws_is_refused(name: str, raced: Params) -> None:
    races = raced.races.model_copy(update={"datasets": {DATASET: (name,)}})
    with pytest.raises(ParamsError, match=rf"races\.datasets\.{DATASET}: .*{name}") as error:
        methods(DATASET, raced.model_copy(update={"races": races}))
    assert "\n" not in str(error.value)


def test_a_proposer_that_needs_the_unet_is_refused(raced: Params, folders: Folders) -> None:
    with pytest.raises(ParamsError, match=r"races\.racing\.proposer: unknown contrastive method 'denoising'"):
        proposals("denoising", folders.examples("test"), raced, folders)


def test_without_preparation_there_is_one_line(raced: Params, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"examples\.parquet: no such file; run `make reproduce` first"):
        run(DATASET, raced, Folders(tmp_path, tmp_path, tmp_path), tmp_path, tmp_path)


def test_too_few_races_for_a_promise_are_one_line(raced: Params, folders: Folders, tmp_path: Path) -> None:
    racing = raced.races.racing.model_copy(update={"deltas": (0.01,), "confidence": 0.95})
    races = raced.races.model_copy(update={"racing": racing, "datasets": {DATASET: ("denoising",)}})
    with pytest.raises(DataError, match=r"races: .* it takes 299 races without an error") as error:
        run(DATASET, raced.model_copy(update={"races": races}), folders, tmp_path / "draws", tmp_path / "races")
    assert "\n" not in str(error.value)


def test_values_that_are_not_finite_are_dropped_and_counted(raced: Params, folders: Folders, tmp_path: Path) -> None:
    track, examples = Track.of(raced.methods["denoising"], raced, folders), folders.examples("test")  # type: ignore[arg-type]
    values = track.collect(examples, Store(tmp_path / "seen"), "x")
    values[0][0, 3] = np.nan
    outcome = replay(Course(list(range(K)), all_draws(K), None), entrants(examples, values, {}))
    kept = np.delete(values[0], 3, 1).mean(1)
    assert outcome.winners[0] == kept.argmax()
