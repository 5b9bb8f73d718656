"""The engine: each pair once, the same numbers in any batch and after any interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from threading import get_ident

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dsd.engine.engine
from dsd.config import NoiseParams, Params, noise_of, trained
from dsd.data.draws import Draw, draws
from dsd.data.examples import MatchingExample, Pair, pairs, read_examples
from dsd.data.image_table import ImageTable
from dsd.engine.encodings import all_texts, diffusion_encodings, read_all
from dsd.engine.engine import Engine
from dsd.engine.score import score
from dsd.errors import DataError
from dsd.models import load_diffusion
from dsd.schedules.race import all_rows
from dsd.scorers.evidence import INDEX, UNCONDITIONAL, plan, read_evidence, requests, wanted
from dsd.store import Store


@pytest.fixture
def zero_shot(params: Params) -> Params:
    untrained = params.methods.keys() - {*trained(params), "dsd-plus"}
    methods = {name: method for name, method in params.methods.items() if name in untrained}
    return params.model_copy(update={"methods": methods})


def make(params: Params, prepared: Path, cached: Path, batch_size: int) -> tuple[Engine, list[MatchingExample]]:
    backbone = load_diffusion(params.backbones["embedded"], torch.device("cpu"))
    texts = all_texts(read_all(prepared))
    tables = diffusion_encodings(backbone, ImageTable(prepared / "images.parquet"), texts, 32, Store(cached), 1)
    return Engine(backbone, None, params.evidence, *tables, batch_size), read_examples(
        prepared / "examples.parquet", "test"
    )


def test_scores_do_not_depend_on_batch_size_or_order(params: Params, prepared: Path, cached: Path) -> None:
    rows = requests(make(params, prepared, cached, 1)[1], params.noise, params.seed, normalised=True)[:12]
    alone = make(params, prepared, cached, 1)[0].compute(rows)
    together = make(params, prepared, cached, 12)[0].compute(rows[::-1])
    for name, array in alone.items():
        np.testing.assert_allclose(array, together[name][::-1], atol=1e-5)


def test_batches_are_halved_until_memory_suffices(
    params: Params, prepared: Path, cached: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, examples = make(params, prepared, cached, 12)
    rows = requests(examples, params.noise, params.seed, normalised=True)[:12]
    expected, observed = engine.compute(rows), dsd.engine.engine.observe

    def limited(most: int) -> None:
        def attempt(*arguments: Tensor) -> object:
            if len(arguments[-1]) > most:
                raise torch.OutOfMemoryError("no room")
            return observed(*arguments)

        monkeypatch.setattr(dsd.engine.engine, "observe", attempt)

    limited(3)
    for name, array in engine.compute(rows).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5)
    assert engine.batch_size == 3
    assert "batches of 3 from now on" in caplog.messages[-1]
    limited(0)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        engine.compute(rows)


def test_evidence_equals_the_plain_loop(params: Params, prepared: Path, cached: Path) -> None:
    """The public implementations' way: each pair alone, image and text encoded again for it."""
    found, examples = make(params, prepared, cached, 8)
    pair, draw = requests(examples, params.noise, params.seed, normalised=True)[3]
    backbone, pictures = found.backbone, ImageTable(prepared / "images.parquet")
    picture = np.asarray(pictures[pair.image].resize((32, 32), 3))
    latents, text = backbone.encode_images(picture[None]), backbone.encode_texts([pair.text])
    timestep, noise = torch.tensor([draw.timestep(1000)]), draw.noise(tuple(latents.shape[1:]))[None]
    with torch.inference_mode():
        noised = backbone.schedule.add_noise(latents, noise, timestep)
        predicted = backbone.unet(noised, timestep, text.hidden).sample
        target = backbone.schedule.get_velocity(latents, noise, timestep)
        # With z_t given, ε − ε_θ = √ᾱ (v − v_θ).
        expected = backbone.schedule.alphas_cumprod[timestep] * (target - predicted).square().mean()
    arrays = found.compute([(pair, draw)])
    assert arrays["error"][0] == pytest.approx(expected.item(), abs=1e-5)


def test_each_pair_once_and_an_unconditional_pass_where_images_are_compared(prepared: Path) -> None:
    examples = read_examples(prepared / "examples.parquet", "test")
    asked = wanted(examples, normalised=True)
    assert len(asked) == len(set(asked))
    assert {pair for pair in asked if pair.text != UNCONDITIONAL} == set(pairs(examples))
    assert {pair.image for pair in asked if pair.text == UNCONDITIONAL} == {
        image for e in examples for image in e.images
    }
    assert wanted(examples, normalised=False) == pairs(examples)
    one_image = [MatchingExample("x", ("i",), ("a", "b"), ((0, 0),), "all")]
    assert wanted(one_image, normalised=True) == [Pair("i", "a"), Pair("i", "b")]


@given(st.integers(1, 6), st.integers(1, 4))
def test_exhaustive_asks_for_everything_once(count: int, width: int) -> None:
    rows = all_rows(count, width)
    assert sorted(map(tuple, rows.tolist())) == [(p, d) for p in range(count) for d in range(width)]


def test_a_key_names_its_content() -> None:
    rows = [(Pair("i", "t"), Draw(0.2, 1)), (Pair("i", "u"), Draw(0.2, 1))]
    keys = {
        plan(rows, "source", 1)[0].key,
        plan(rows, "other", 1)[0].key,
        plan(rows, "source", 1)[1].key,
        plan(rows, "source", 2)[0].key,
    }
    assert len(keys) == 4
    assert plan(rows, "source", 1)[0].key == plan(rows[:1], "source", 8)[0].key


def test_draws_are_paired_and_their_seeds_independent_of_position() -> None:
    both = draws(NoiseParams(levels=(0.2, 0.6), draws_per_level=2), seed=0)
    later = draws(NoiseParams(levels=(0.6,), draws_per_level=2), seed=0)
    assert both[2:] == later
    assert len({draw.seed for draw in both}) == 4
    assert torch.equal(both[0].noise((4, 8, 8)), both[0].noise((4, 8, 8)))
    assert draws(NoiseParams(levels=(0.6,), draws_per_level=2), seed=1) != later


def evidence(params: Params, prepared: Path, target: Path) -> dict[str, np.ndarray]:
    examples = read_examples(prepared / "examples.parquet", "test")
    found = read_evidence(target, "none", examples, noise_of(params, "scenes-com"), params.seed, normalised=True)
    return {"attention": found.attention, "attribution": found.attribution, "error": found.error}


def test_an_interrupted_run_ends_with_the_same_bits(
    zero_shot: Params, prepared: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score("scenes-com", zero_shot, prepared, cached, tmp_path, tmp_path / "whole", split="test")
    compute, left = Engine.compute, [2]

    def stops(self: Engine, rows: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return compute(self, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "compute", stops)
    with pytest.raises(KeyboardInterrupt):
        score("scenes-com", zero_shot, prepared, cached, tmp_path, tmp_path / "cut", split="test")
    monkeypatch.setattr(Engine, "compute", compute)
    counts = score("scenes-com", zero_shot, prepared, cached, tmp_path, tmp_path / "cut", split="test")
    assert 0 < counts["computed"] < counts["rows"]
    whole, cut = (evidence(zero_shot, prepared, tmp_path / name) for name in ("whole", "cut"))
    for name, array in whole.items():
        np.testing.assert_array_equal(array, cut[name])


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-4] + b"\x00\x01\x02\x03"])
def test_a_corrupt_shard_is_computed_again(
    damage: Callable[[bytes], bytes], zero_shot: Params, prepared: Path, cached: Path, tmp_path: Path
) -> None:
    score("scenes-com", zero_shot, prepared, cached, tmp_path, tmp_path / "s", split="test")
    before = evidence(zero_shot, prepared, tmp_path / "s")
    shard = sorted((tmp_path / "s").glob("evidence-*.safetensors"))[0]
    shard.write_bytes(damage(shard.read_bytes()))
    counts = score("scenes-com", zero_shot, prepared, cached, tmp_path, tmp_path / "s", split="test")
    assert counts["computed"] > 0
    after = evidence(zero_shot, prepared, tmp_path / "s")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_shards_of_other_params_are_removed(zero_shot: Params, prepared: Path, cached: Path, tmp_path: Path) -> None:
    score("scenes-com", zero_shot, prepared, cached, tmp_path, tmp_path / "s", split="test")
    other = zero_shot.model_copy(update={"evidence": zero_shot.evidence.model_copy(update={"scale": 5.0})})
    score("scenes-com", other, prepared, cached, tmp_path, tmp_path / "s", split="test")
    named = json.loads((tmp_path / "s" / INDEX).read_text())
    assert set(Store(tmp_path / "s").keys()) == {key for keys in named["shards"].values() for key in keys}


def test_missing_evidence_says_what_to_run(zero_shot: Params, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run the stage `score`"):
        evidence(zero_shot, prepared, tmp_path)


def test_what_the_cache_lacks_is_computed_in_one_thread(
    params: Params, prepared: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches run side by side in threads, which could not share a reader of pictures."""
    full, examples = make(params, prepared, cached, 4)
    rows = requests(examples, params.noise, params.seed, normalised=True)
    threads = set()
    inner = ImageTable.__getitem__
    monkeypatch.setattr(ImageTable, "__getitem__", lambda self, key: (threads.add(get_ident()), inner(self, key))[1])
    bare = make(params, prepared, tmp_path, 4)[0].compute(rows)
    for name, array in full.compute(rows).items():
        np.testing.assert_allclose(array, bare[name], atol=1e-5)
    assert threads == {get_ident()}
