"""The engine: each pair once, the same results in any batch and after any interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dsd.engine.engine
from dsd.config import EvidenceParams, NoiseParams, Params
from dsd.config.base import PROMPTS
from dsd.data.draws import Draw, draws
from dsd.data.examples import MatchingExample, Pair, pairs, read_examples
from dsd.data.image_table import ImageTable
from dsd.engine.encodings import all_texts, diffusion_encodings, read_all
from dsd.engine.engine import Engine
from dsd.engine.forward import Batch, row_values
from dsd.engine.score import Worker, missing, score
from dsd.engine.session import Folders, Session
from dsd.errors import DataError
from dsd.models import load_diffusion
from dsd.models.prompts import PROMPT, AttentionPrompt
from dsd.models.stable_diffusion import StableDiffusion
from dsd.schedules.race import all_rows
from dsd.scorers.evidence import INDEX, UNCONDITIONAL, plan, read_evidence, requests, with_unconditional
from dsd.store import Store
from dsd.training import LEARNERS, attention_prompt
from tests.conftest import shard_keys


@pytest.fixture
def zero_shot(params: Params) -> Params:
    untrained = params.methods.keys() - {*params.trained, "dsd-plus"}
    methods = {name: method for name, method in params.methods.items() if name in untrained}
    return params.model_copy(update={"methods": methods})


def session_of(params: Params, prepared: Path, cached: Path, trained: Path) -> Session:
    return Session("scenes-com", params, Folders(prepared, cached, trained))


def make(
    params: Params, prepared: Path, cached: Path, batch_size: int, cores: int | None = None
) -> tuple[Engine, list[MatchingExample]]:
    backbone = load_diffusion(params.backbones["embedded"], torch.device("cpu"))
    texts = all_texts(read_all(prepared))
    tables = diffusion_encodings(backbone, ImageTable(prepared / "images.parquet"), texts, 32, Store(cached), 1)
    examples = read_examples(prepared / "examples.parquet", "test")
    return Engine(backbone, None, params.evidence, *tables, batch_size, cores), examples


def test_scores_do_not_depend_on_batch_size_or_order(params: Params, prepared: Path, cached: Path) -> None:
    rows = requests(make(params, prepared, cached, 1)[1], params.noise, params.seed, compares=True)[:12]
    alone = make(params, prepared, cached, 1)[0].compute(rows)
    together = make(params, prepared, cached, 12)[0].compute(rows[::-1])
    for name, array in alone.items():
        np.testing.assert_allclose(array, together[name][::-1], atol=1e-5)


def test_batches_are_halved_until_memory_suffices(
    params: Params, prepared: Path, cached: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, examples = make(params, prepared, cached, 12)
    rows = requests(examples, params.noise, params.seed, compares=True)[:12]
    expected, observed = engine.compute(rows), dsd.engine.engine.observe

    def limited(most: int) -> None:
        def attempt(backbone: StableDiffusion, prompt: None, evidence: EvidenceParams, batch: Batch) -> object:
            if len(batch.latents) > most:
                raise torch.OutOfMemoryError("no room")
            return observed(backbone, prompt, evidence, batch)

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
    engine, examples = make(params, prepared, cached, 8)
    pair, draw = requests(examples, params.noise, params.seed, compares=True)[3]
    backbone, images = engine.backbone, ImageTable(prepared / "images.parquet")
    image = np.asarray(images[pair.image].resize((32, 32), 3))
    latents, text = backbone.encode_images(image[None]), backbone.encode_texts([pair.text])
    timestep, noise = torch.tensor([draw.timestep(1000)]), draw.noise(tuple(latents.shape[1:]))[None]
    with torch.inference_mode():
        noised = backbone.schedule.add_noise(latents, noise, timestep)
        predicted = backbone.unet(noised, timestep, text.hidden).sample
        target = backbone.schedule.get_velocity(latents, noise, timestep)
        # With z_t given, ε − ε_θ = √ᾱ (v − v_θ).
        expected = backbone.schedule.alphas_cumprod[timestep] * (target - predicted).square().mean()
    arrays = engine.compute([(pair, draw)])
    assert arrays["error"][0] == pytest.approx(expected.item(), abs=1e-5)


def test_each_pair_once_and_an_unconditional_pass_where_images_are_compared(prepared: Path) -> None:
    examples = read_examples(prepared / "examples.parquet", "test")
    every = with_unconditional(examples, compares=True)
    assert len(every) == len(set(every))
    assert {pair for pair in every if pair.text != UNCONDITIONAL} == set(pairs(examples))
    assert {pair.image for pair in every if pair.text == UNCONDITIONAL} == {
        image for e in examples for image in e.images
    }
    assert with_unconditional(examples, compares=False) == pairs(examples)
    one_image = [MatchingExample("x", ("i",), ("a", "b"), ((0, 0),), "all")]
    assert with_unconditional(one_image, compares=True) == [Pair("i", "a"), Pair("i", "b")]


@given(st.integers(1, 6), st.integers(1, 4))
def test_exhaustive_requests_every_row_once(count: int, width: int) -> None:
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
    both = draws(NoiseParams(levels=(0.2, 0.6), draws_per_level=2, sample=0), seed=0)
    later = draws(NoiseParams(levels=(0.6,), draws_per_level=2, sample=0), seed=0)
    assert both[2:] == later
    assert len({draw.seed for draw in both}) == 4
    assert torch.equal(both[0].noise((4, 8, 8)), both[0].noise((4, 8, 8)))
    assert draws(NoiseParams(levels=(0.6,), draws_per_level=2, sample=0), seed=1) != later


@pytest.mark.parametrize("draws_per_level", [1, 4])
def test_noise_samples_have_no_draw_in_common_and_sample_0_the_seeds_of_before(draws_per_level: int) -> None:
    def sample(number: int) -> list[Draw]:
        noise = NoiseParams(levels=(0.2, 0.6), draws_per_level=draws_per_level, sample=number)
        return draws(noise, seed=3)

    sets = [sample(number) for number in range(5)]
    assert len({draw.seed for drawn in sets for draw in drawn}) == 5 * 2 * draws_per_level
    levels = [(3 * 1_000_003 + level) * 1_009 for level in (200_000, 600_000)]
    assert [draw.seed for draw in sets[0]] == [first + number for first in levels for number in range(draws_per_level)]


def test_a_dataset_with_its_own_draws_has_the_noise_sample_too(params: Params) -> None:
    of = params.model_copy(update={"noise": params.noise.model_copy(update={"sample": 1})}).noise_of("scenes-com")
    own = params.datasets["scenes-com"].draws_per_level
    assert own is not None and own != params.noise.draws_per_level
    assert (of.draws_per_level, of.sample) == (own, 1)
    assert not {draw.seed for draw in draws(of, 0)} & {draw.seed for draw in draws(params.noise_of("scenes-com"), 0)}


def evidence(params: Params, prepared: Path, target: Path) -> dict[str, np.ndarray]:
    examples = read_examples(prepared / "examples.parquet", "test")
    stored = read_evidence(target, "none", examples, params.noise_of("scenes-com"), params.seed, compares=True)
    return {"attention": stored.attention, "attribution": stored.attribution, "error": stored.error}


def test_a_resumed_run_ends_with_the_same_bits(
    zero_shot: Params, prepared: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(session_of(zero_shot, prepared, cached, tmp_path), tmp_path / "whole", split="test")
    compute, left = Engine.compute, [2]

    def stops(self: Engine, rows: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return compute(self, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "compute", stops)
    with pytest.raises(KeyboardInterrupt):
        score(session_of(zero_shot, prepared, cached, tmp_path), tmp_path / "cut", split="test")
    monkeypatch.setattr(Engine, "compute", compute)
    counts = score(session_of(zero_shot, prepared, cached, tmp_path), tmp_path / "cut", split="test")
    assert 0 < counts["computed"] < counts["rows"]
    whole, cut = (evidence(zero_shot, prepared, tmp_path / name) for name in ("whole", "cut"))
    for name, array in whole.items():
        np.testing.assert_array_equal(array, cut[name])


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-4] + b"\x00\x01\x02\x03"])
def test_a_corrupt_shard_is_recomputed(
    damage: Callable[[bytes], bytes], zero_shot: Params, prepared: Path, cached: Path, tmp_path: Path
) -> None:
    score(session_of(zero_shot, prepared, cached, tmp_path), tmp_path / "s", split="test")
    before = evidence(zero_shot, prepared, tmp_path / "s")
    shard = sorted((tmp_path / "s").glob("evidence-*.safetensors"))[0]
    shard.write_bytes(damage(shard.read_bytes()))
    counts = score(session_of(zero_shot, prepared, cached, tmp_path), tmp_path / "s", split="test")
    assert counts["computed"] > 0
    after = evidence(zero_shot, prepared, tmp_path / "s")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_shards_of_other_params_are_removed(zero_shot: Params, prepared: Path, cached: Path, tmp_path: Path) -> None:
    score(session_of(zero_shot, prepared, cached, tmp_path), tmp_path / "s", split="test")
    other = zero_shot.model_copy(update={"evidence": zero_shot.evidence.model_copy(update={"scale": 5.0})})
    score(session_of(other, prepared, cached, tmp_path), tmp_path / "s", split="test")
    index = json.loads((tmp_path / "s" / INDEX).read_text())
    assert set(shard_keys(Store(tmp_path / "s"))) == {key for keys in index["shards"].values() for key in keys}


def test_missing_evidence_names_the_stage_to_run(zero_shot: Params, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run the stage `score`"):
        evidence(zero_shot, prepared, tmp_path)


def test_missing_encodings_are_computed_in_one_thread(
    params: Params, prepared: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are computed side by side in threads, which cannot share a reader of images."""
    full, examples = make(params, prepared, cached, 4, cores=2)
    rows = requests(examples, params.noise, params.seed, compares=True)
    reading, computing = set(), set()
    read, observed = ImageTable.__getitem__, dsd.engine.engine.observe
    monkeypatch.setattr(ImageTable, "__getitem__", lambda self, key: (reading.add(get_ident()), read(self, key))[1])
    monkeypatch.setattr(
        dsd.engine.engine, "observe", lambda *inputs: (computing.add(get_ident()), observed(*inputs))[1]
    )
    bare = make(params, prepared, tmp_path, 4, cores=2)[0].compute(rows)
    for name, array in full.compute(rows).items():
        np.testing.assert_allclose(array, bare[name], atol=1e-5)
    assert reading == {get_ident()} and computing and get_ident() not in computing


# Models are opened when they are needed, and not before.


@pytest.fixture
def prompted(params: Params, tmp_path: Path) -> Params:
    """Methods without and with the attention prompt, which is saved as the stage `train` would save it."""
    backbone = load_diffusion(params.backbones["embedded"], torch.device("cpu"), lazy=True)
    prompt = AttentionPrompt(
        backbone.text_width, backbone.layer_widths, backbone.latent_channels, rank=2, conditional=True, seed=0
    )
    prompt.save(tmp_path / "trained" / "dsd" / PROMPT, backbone.digest)
    methods = {name: params.methods[name] for name in ("dsd-zero-shot", "dsd", "denoising", "clip-zero-shot")}
    return params.model_copy(update={"methods": methods})


DIFFUSION = {"unet", "vae", "text_encoders"}  # the components of a backbone that have weights


def test_score_opens_only_what_is_missing(
    prompted: Params, prepared: Path, cached: Path, tmp_path: Path, opened: list[str]
) -> None:
    """The U-Net for evidence, a CLIP for cosines, and no encoder: latents, texts and features are cached."""
    first = session_of(prompted, prepared, cached, tmp_path / "trained")
    counts = score(first, tmp_path / "s", split="test")
    assert counts["computed"] == counts["rows"] > 0
    assert sorted(opened) == ["", "unet"] and vars(first.backbone).keys() & DIFFUSION == {"unet"}
    opened.clear()
    again = session_of(prompted, prepared, cached, tmp_path / "trained")
    assert score(again, tmp_path / "s", split="test") == {**counts, "computed": 0}
    assert missing(again, tmp_path / "s", split="test") == {} and Worker(again, tmp_path / "s", split="test").shards
    assert opened == [] and not vars(again.backbone).keys() & DIFFUSION
    for file in sorted((tmp_path / "s").glob("evidence-*"))[:2]:
        file.unlink()
    part = score(session_of(prompted, prepared, cached, tmp_path / "trained"), tmp_path / "s", split="test")
    assert 0 < part["computed"] < part["rows"] and opened == ["unet"]


def test_score_encodes_what_the_cache_lacks(
    prompted: Params, prepared: Path, cached: Path, tmp_path: Path, opened: list[str]
) -> None:
    session = session_of(prompted, prepared, tmp_path / "empty", tmp_path / "trained")
    score(session, tmp_path / "s", split="test")
    assert sorted(opened) == ["", "text_encoder", "unet", "vae"]
    cold, warm = (
        score(session_of(prompted, prepared, folder, tmp_path / "trained"), tmp_path / "s", split="test")
        for folder in (tmp_path / "empty", cached)
    )
    assert cold == warm and cold["computed"] == 0


def test_a_worker_of_score_opens_the_denoiser_at_its_first_shard(
    prompted: Params, prepared: Path, cached: Path, tmp_path: Path, opened: list[str]
) -> None:
    session = session_of(prompted, prepared, cached, tmp_path / "trained")
    worker = Worker(session, tmp_path / "s", split="test")
    assert opened == [] and set(missing(session, tmp_path / "s", split="test")) == set(worker.shards)
    keys = list(worker.shards)
    for key in (keys[0], keys[-1]):  # under both prompts
        worker(key)
        assert opened == ["unet"]
    assert set(missing(session, tmp_path / "s", split="test")) == set(worker.shards) - {keys[0], keys[-1]}


# Training and scoring have one forward pass.


def test_training_and_scoring_assemble_the_same_batch(
    params: Params, prepared: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, batches = session_of(params, prepared, cached, tmp_path), dict[str, list[Batch]]()
    for module in (dsd.engine.engine, attention_prompt):

        def spied(*inputs: Any, observed: Any = module.observe, name: str = module.__name__) -> Any:
            batches.setdefault(name, []).append(inputs[-1])
            return observed(*inputs)

        monkeypatch.setattr(module, "observe", spied)
    examples = [example for example in session.examples("train") if len(example.images) > 1][:2]
    tables = [
        [[Pair(image, text) for text in (*example.texts, UNCONDITIONAL)] for image in example.images]
        for example in examples
    ]
    own_draws = [Draw(level, seed) for seed, level in enumerate((0.2, 0.6))]
    rows = [(pair, draw) for table, draw in zip(tables, own_draws, strict=True) for line in table for pair in line]
    runtime = params.runtime.model_copy(update={"batch_size": len(rows)})
    content = params.evidence.model_copy(update={"tokens": dict.fromkeys(PROMPTS, "content")})
    session.params = params.model_copy(update={"runtime": runtime, "evidence": content})
    learner = LEARNERS["attention prompt"](session, "dsd")
    scores = learner.scores(tables, own_draws)
    arrays = session.engine("none").compute(rows)
    (trained_on,), (scored,) = batches.values()
    assert len(trained_on.latents) == len(rows) > len(trained_on.hidden)  # each text once
    for name, tensor in trained_on._asdict().items():
        assert torch.equal(tensor, getattr(scored, name)), name
    # The prompt starts at zero, so the scores are those of the stored evidence, too.
    values = row_values(arrays, session.params.methods["dsd-zero-shot"], params.evidence.poolings)
    np.testing.assert_allclose(scores.detach().ravel(), values, atol=1e-6)
