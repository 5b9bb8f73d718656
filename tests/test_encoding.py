"""Encodings: the same numbers whether they are stored or computed on request, and each is computed once."""

from __future__ import annotations

import json
import pickle
import shutil
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from dsd.config import Params
from dsd.data.draws import Draw
from dsd.data.examples import AT_ONCE, MatchingExample, Pair, read_examples, write_examples
from dsd.engine import encodings
from dsd.engine.cache import Worker, encode, missing
from dsd.engine.encodings import Arrays, Encodings, all_texts, read_all
from dsd.engine.score import score
from dsd.engine.session import Folders, Session
from dsd.models import device_of, load_diffusion
from dsd.models.checkpoint import over_limit
from dsd.models.stable_diffusion import StableDiffusion
from dsd.scorers.evidence import INDEX, Requests, plan
from dsd.store import Store
from dsd.training.loop import Training, train
from tests.tiny import row, save_tokenizer

NAME, ITEMS = "scenes-com", [f"text {n}" for n in range(40)]


def session_of(params: Params, prepared: Path, cached: Path, trained: Path | None = None) -> Session:
    """A session, of methods that need nothing trained unless `trained` is given."""
    return Session(NAME, params, Folders(prepared, cached, trained or cached))


def without_texts(params: Params) -> Params:
    """The params under which no text is stored."""
    return params.model_copy(update={"runtime": params.runtime.model_copy(update={"kept_texts": 0})})


def kinds(folder: Path) -> set[str]:
    return {path.name.rpartition("-")[0] for path in folder.glob("*.safetensors")}


class Stub:
    """An encoder that counts how often it encodes each item."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, items: list[str]) -> Arrays:
        self.counts.update(items)
        return {"hidden": np.array([[len(item), hash(item) % 97] for item in items], dtype=np.float32)}


def table(stub: Stub, folder: Path, kept: bool) -> Encodings:
    return Encodings(Store(folder), "texts", "source", ITEMS, stub, kept=kept)


@settings(max_examples=20, deadline=None)
@given(batches=st.lists(st.lists(st.sampled_from(ITEMS), min_size=1, max_size=9), max_size=12))
def test_items_that_are_not_stored_are_the_same_and_held_within_bounds(
    batches: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "SHARD", 3)
        patch.setattr(encodings, "HELD", 2)
        folder = tmp_path_factory.mktemp("store")
        stored, fresh = table(Stub(), folder / "kept", True), table(Stub(), folder / "not", False)
        for items in batches:
            np.testing.assert_array_equal(fresh(items)["hidden"], stored(items)["hidden"])
            assert len(fresh._last) <= 6
        fresh.fill()
        assert not fresh.keys and not (folder / "not").exists()


def test_neighbours_and_draws_of_a_pair_compute_a_text_once(tmp_path: Path) -> None:
    """In the engine's order: a pair's draws together, over the ends of batches."""
    stub = Stub()
    fresh = table(stub, tmp_path, kept=False)
    rows = Requests([Pair("i", item) for item in ITEMS], [Draw(0.2, 1), Draw(0.4, 2), Draw(0.6, 3)], range(120))
    for first in range(0, len(rows), 8):
        fresh(sorted({pair.text for pair, _ in rows[first : first + 8]}))
    assert stub.counts == dict.fromkeys(ITEMS, 1)
    fresh(["", *ITEMS])
    assert stub.counts == dict.fromkeys(["", *ITEMS], 1)


def test_the_limit_changes_no_result_and_no_key(
    params: Params, prepared: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained = params.methods.keys() - {*params.trained, "dsd-plus"}
    plain = params.model_copy(update={"methods": {name: params.methods[name] for name in untrained}})
    encode(session_of(without_texts(plain), prepared, tmp_path / "cache"))
    assert kinds(tmp_path / "cache") == {"latents", "clip-image-features"} < kinds(cached)
    score(session_of(plain, prepared, cached), tmp_path / "kept", split="test")
    score(session_of(without_texts(plain), prepared, tmp_path / "cache"), tmp_path / "not", split="test")
    assert kinds(tmp_path / "cache") == {"latents", "clip-image-features"}
    index = json.loads((tmp_path / "kept" / INDEX).read_text())
    assert json.loads((tmp_path / "not" / INDEX).read_text()) == index
    for key in (key for keys in index["shards"].values() for key in keys):
        arrays, others = Store(tmp_path / "kept").read(key), Store(tmp_path / "not").read(key)
        assert arrays is not None and others is not None
        for name, array in arrays.items():
            np.testing.assert_allclose(others[name], array, atol=1e-5)


@pytest.mark.parametrize("method", ["dsd", "clip-finetune", "clip-prompt"])
def test_the_limit_changes_no_training(
    method: str, params: Params, prepared: Path, cached: Path, tmp_path: Path
) -> None:
    curves = [
        list(train(session_of(of, prepared, cache, tmp_path / f"of {cache.name}"), Training(method)))
        for of, cache in ((params, cached), (without_texts(params), tmp_path / "not"))
    ]
    losses = [[step["loss"] for step in curve] for curve in curves]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert kinds(tmp_path / "not") <= {"latents", "clip-image-features"}


def test_stored_texts_are_removed_above_the_limit(params: Params, prepared: Path, tmp_path: Path) -> None:
    kept = encode(session_of(params, prepared, tmp_path))
    texts = all_texts(read_all(prepared))
    backbone = load_diffusion(params.backbones["embedded"], device_of("cpu"))
    assert kept["texts"] == len(texts) and kept["truncated"] == int(backbone.encode_texts(texts).truncated.sum())
    assert "texts" in kinds(tmp_path)
    assert encode(session_of(without_texts(params), prepared, tmp_path)) == kept
    assert kinds(tmp_path) == {"latents", "clip-image-features"}
    exact = params.model_copy(update={"runtime": params.runtime.model_copy(update={"kept_texts": len(texts)})})
    encode(session_of(exact, prepared, tmp_path))
    assert "texts" in kinds(tmp_path)


def test_the_cache_opens_no_denoiser_and_only_what_is_missing(
    params: Params, prepared: Path, cached: Path, tmp_path: Path, opened: list[str]
) -> None:
    first = session_of(params, prepared, tmp_path / "first")
    counts = encode(first)
    assert sorted(opened) == ["", "text_encoder", "vae"] and "unet" not in vars(first.backbone)
    opened.clear()
    again = session_of(params, prepared, tmp_path / "first")
    assert encode(again) == counts and missing(again) == {} and Worker(again).shards
    assert opened == [] and not {"vae", "text_encoders", "unet"} & vars(again.backbone).keys()
    folder = Path(shutil.copytree(cached, tmp_path / "copy"))
    for kind, component in (("latents", "vae"), ("texts", "text_encoder"), ("clip-image-features", "")):
        for file in folder.glob(f"{kind}-*"):
            file.unlink()
        assert {key.rpartition("-")[0] for key in missing(session_of(params, prepared, folder))} == {kind}
        assert opened == []
        encode(session_of(params, prepared, folder))
        assert opened == [component]
        opened.clear()


def test_a_worker_of_the_cache_opens_no_denoiser(
    params: Params, prepared: Path, tmp_path: Path, opened: list[str]
) -> None:
    session = session_of(params, prepared, tmp_path)
    worker = Worker(session)
    assert opened == [] and set(missing(session)) == set(worker.shards)
    for key in worker.shards:
        worker(key)
    assert missing(session) == {} and sorted(opened) == ["", "text_encoder", "vae"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer", "!", 24)


LETTERS = string.printable + "éİ☃ﬁ\u0958"


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(LETTERS, max_size=30), st.text(max_size=12)), unique=True), st.integers(3, 26))
def test_long_texts_are_found_without_tokenizing_the_short(tokens: CLIPTokenizer, texts: list[str], limit: int) -> None:
    counts = {text: len(tokens(text).input_ids) for text in texts}
    assert dict(over_limit(tokens, texts, limit)) == {text: n for text, n in counts.items() if n > limit}


@pytest.mark.parametrize("which", ["models", "xl"])
def test_truncated_texts_are_counted_without_being_encoded(which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    checkpoint = row(folder / "embedded") if which == "models" else row(folder, "stable-diffusion-xl")
    backbone: StableDiffusion = load_diffusion(checkpoint, device_of("cpu"))
    texts = ["", "a red circle", "x" * 40, "a ring " * 40, "é" * 11, "!! " * 9]
    assert backbone.truncated(texts) == int(backbone.encode_texts(texts).truncated.sum()) > 0


PAIRS, DRAWS = [Pair("i", str(n)) for n in range(7)], [Draw(0.2, 1), Draw(0.4, 2)]


@given(st.slices(14))
def test_requests_are_a_lazy_list(part: slice) -> None:
    rows, plain = Requests(PAIRS, DRAWS, range(14)), [(pair, draw) for pair in PAIRS for draw in DRAWS]
    assert list(rows) == plain and list(rows[part]) == plain[part] and len(rows[part]) == len(plain[part])
    assert [rows[n] for n in range(-14, 14)] == plain + plain
    with pytest.raises(IndexError):
        rows[14]


def test_a_pickled_shard_holds_no_other_rows() -> None:
    pairs = [Pair("i", f"a text of some length, the {n}th") for n in range(5000)]
    shard = plan(Requests(pairs, DRAWS, range(10_000)), "source", 10)[3]
    sent = pickle.dumps(shard)
    assert len(sent) < 2000 and list(pickle.loads(sent).rows) == list(shard.rows)


def test_the_keys_of_stored_evidence_do_not_change() -> None:
    rows = Requests(PAIRS, DRAWS, range(14))
    keys = [shard.key for shard in plan(rows, "source", 8)]
    assert keys == [shard.key for shard in plan(list(rows), "source", 8)]
    assert keys[0] == "evidence-7b021e93ab254a0c3a1749cbe0486556"


def test_examples_are_read_by_split_in_file_order(tmp_path: Path) -> None:
    examples = [MatchingExample(str(n), ("i",), ("a", str(n)), ((0, n % 2),), "all") for n in range(3 * AT_ONCE + 5)]
    splits = [("train", "test", "validation")[n * n % 7 % 3] for n in range(len(examples))]
    write_examples(tmp_path / "examples.parquet", zip(splits, examples, strict=True))
    for split in set(splits):
        expected = [example for of, example in zip(splits, examples, strict=True) if of == split]
        assert read_examples(tmp_path / "examples.parquet", split) == expected
    assert read_examples(tmp_path / "examples.parquet", "another") == []
