"""Examples two of whose texts are one to a model: counted, listed, and left out for every method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsd.config import Params
from dsd.data.examples import MatchingExample, write_examples
from dsd.engine.cache import encode
from dsd.engine.score import score
from dsd.engine.session import Folders, Session, similar_starts
from dsd.errors import DataError, TextError
from dsd.evaluation.evaluate import ScoredSplit, evaluate
from dsd.scorers.evidence import INDEX, scored_examples
from dsd.store import write_json

NAME = "scenes-com"
TIE = "two texts are one to embedded"
LONG = "a red circle left of a blue square " * 4


@pytest.fixture
def own(params: Params, prepared: Path, tmp_path: Path) -> tuple[Session, Path]:
    """A prepared dataset of four examples; of two of them, two texts differ after the limit or in case alone."""
    shutil.copytree(prepared, tmp_path / "prepared")
    changed = {
        "datasets": {NAME: params.datasets[NAME].model_copy(update={"kind": "scenes-ref"})},
        "methods": {name: params.methods[name] for name in ("denoising", "clip-zero-shot")},
        "training": {},
    }
    session = Session(NAME, params.model_copy(update=changed), Folders(tmp_path / "prepared", tmp_path, tmp_path))
    [image, *_] = session.images.ids
    texts = {
        "long": (f"{LONG}below", f"{LONG}above"),
        "case": ("A red circle", "a blue square", "a red circle"),
        "close": ("a red circle above a blue square", "a red circle above a blue star"),
        "plain": ("a red circle", "a blue square"),
    }
    rows = [("test", MatchingExample(id, (image,), four, ((0, 0),), "all")) for id, four in texts.items()]
    write_examples(tmp_path / "prepared" / "examples.parquet", rows)
    return session, tmp_path / "score"


def test_they_are_left_out_for_every_method(own: tuple[Session, Path], tmp_path: Path, opened: list[str]) -> None:
    session, scored = own
    assert session.indistinct("test") == {"long": TIE, "case": TIE}
    assert not opened, "tokenizers and configurations are enough"
    encode(session)
    score(session, scored, split="test")
    assert json.loads((scored / INDEX).read_text())["indistinct"] == {"long": TIE, "case": TIE}
    assert [e.id for e in scored_examples(session.folders.prepared, scored, "test")] == ["close", "plain"]
    split = ScoredSplit.of(NAME, session.params, session.folders.prepared, scored)
    results, _ = evaluate(NAME, split, session.params.evaluate, 0, tmp_path / "evaluate")
    assert {method: row["top1"].n for method, row in results.items()} == {"denoising": 2, "clip-zero-shot": 2}


def test_an_index_without_them_is_of_another_version(own: tuple[Session, Path]) -> None:
    session, scored = own
    write_json(scored / INDEX, {"layers": [], "latent": 1, "shards": {}})
    with pytest.raises(DataError, match="not the index of this version; run the stage `score` again"):
        scored_examples(session.folders.prepared, scored, "test")


def test_the_same_image_twice_is_a_tie_too(own: tuple[Session, Path]) -> None:
    session, _ = own
    one, two, *_ = session.images.ids
    rows = [
        ("test", MatchingExample("twice", (one, one), ("a red circle",), ((0, 0),), "all")),
        ("test", MatchingExample("once", (one, two), ("a red circle",), ((0, 0),), "all")),
    ]
    write_examples(session.folders.prepared / "examples.parquet", rows)
    assert session.indistinct("test") == {"twice": "two images have the same pixels"}
    write_examples(session.folders.prepared / "examples.parquet", rows[:1])
    again = Session(NAME, session.params, session.folders)
    with pytest.raises(DataError, match="no example of the split test is left, 1 left out as ties"):
        again.examples("test")


def test_a_text_without_a_token_of_its_own_is_refused(own: tuple[Session, Path]) -> None:
    session, _ = own
    texts = ("<|endoftext|>", "a red circle")
    row = MatchingExample("special", (session.images.ids[0],), texts, ((0, 0),), "all")
    write_examples(session.folders.prepared / "examples.parquet", [("test", row)])
    with pytest.raises(TextError, match="has no token but special ones"):
        encode(session)


@given(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12), st.integers(2, 8))
def test_similar_starts_miss_no_texts_with_the_same_tokens(a: str, b: str, limit: int) -> None:
    """With the tokens of at least one byte that any tokenizer can have: single bytes without spaces and case."""
    first, second = ("".join(text.lower().split()).encode()[:limit] for text in (a, b))
    assert (set(similar_starts([a, b], limit)) == {a, b}) >= (first == second and a != b)
