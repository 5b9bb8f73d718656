"""The public API on tiny models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsd import Matcher
from dsd.arguments import image_list
from dsd.config import DrawnDataset, load
from dsd.datasets.scenes_ref import compose
from dsd.datasets.synthetic import _items
from dsd.errors import CheckpointError, ImageError, ParamsError, TextError
from dsd.models.prompts import AttentionPrompt
from dsd.scenes.corpus import NATIVE
from dsd.scenes.render import render
from tests.conftest import ROOT

TEXTS = ["a red circle", "a blue star", "a green ring left of a pink bolt"]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)) for _ in range(2)]


@pytest.mark.parametrize("method", ["cross-attention", "denoising"])
def test_scores_are_images_by_texts_from_any_source(
    method: str, models: Path, images: list[Image.Image], tmp_path: Path
) -> None:
    matcher = Matcher.from_pretrained(models / "embedded", method=method, levels=(0.3,))
    scores = matcher.score(images, TEXTS)
    assert scores.shape == (2, 3) and torch.isfinite(scores).all()
    images[0].save(tmp_path / "one.png")
    for source in (tmp_path / "one.png", str(tmp_path / "one.png"), np.asarray(images[0]), images[0]):
        assert torch.allclose(matcher.score(source, TEXTS), scores[:1], atol=1e-5)
    assert torch.allclose(matcher.score(images[1], TEXTS[2]), scores[1:, 2:], atol=1e-5)


def test_scores_do_not_depend_on_batch_size(models: Path, images: list[Image.Image]) -> None:
    one, many = (
        Matcher.from_pretrained(models / "embedded", levels=(0.3,), batch_size=b).score(images, TEXTS) for b in (1, 64)
    )
    assert torch.allclose(one, many, atol=1e-5)


def test_a_heatmap_has_one_map_a_word(models: Path, images: list[Image.Image]) -> None:
    found = Matcher.from_pretrained(models / "embedded", levels=(0.3,)).heatmap(images[0], "a red circle")
    assert found.words == ["a", "red", "circle"]
    assert found.maps.shape == (3, 32, 32) and found.picture.shape == (32, 32, 3)
    assert found.maps.min() >= 0 and found.maps.max() <= 1


def test_mistakes_are_one_line(models: Path, images: list[Image.Image], tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="did you mean 'denoising'"):
        Matcher.from_pretrained(models / "embedded", method="denoisin")
    with pytest.raises(CheckpointError, match="family clip has no cross-attention"):
        Matcher.from_pretrained(models / "embedded-clip")
    with pytest.raises(CheckpointError, match="unknown family 'stable-difusion': did you mean 'stable-diffusion'"):
        Matcher.from_pretrained(models / "embedded", family="stable-difusion")
    with pytest.raises(CheckpointError, match="did you mean 'xformers'"):
        Matcher.from_pretrained(models / "embedded", attention="xformer")
    with pytest.raises(CheckpointError, match="no such file; train an attention prompt"):
        Matcher.from_pretrained(models / "embedded", prompt=tmp_path / "none.safetensors")
    matcher = Matcher.from_pretrained(models / "embedded", levels=(0.3,))
    with pytest.raises(TextError, match="text 2 of 2 is empty"):
        matcher.score(images[0], ["a red circle", "  "])
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"broken\.png"):
        matcher.score(tmp_path / "broken.png", "a red circle")
    with pytest.warns(UserWarning, match="24 tokens"):
        matcher.score(images[0], "a red circle " * 20)


def test_maps_of_a_level_are_those_of_that_level_alone(models: Path) -> None:
    matcher = Matcher.from_pretrained(models / "embedded", device="cpu", levels=(0.6, 0.2))
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    found = matcher.heatmaps(image, "a red circle")
    alone = Matcher.from_pretrained(models / "embedded", device="cpu", levels=(0.6,)).heatmap(image, "a red circle")
    assert list(found) == [0.2, 0.6] and found[0.6].words == alone.words
    np.testing.assert_allclose(found[0.6].maps, alone.maps, atol=1e-5)
    assert found[0.2].picture.shape == (32, 32, 3) and not np.array_equal(found[0.2].picture, found[0.6].picture)


@pytest.mark.parametrize("method", ["cross-attention", "denoising"])
def test_many_problems_at_once_are_scored_as_one_by_one(
    method: str, models: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = Matcher.from_pretrained(models / "embedded", method=method, levels=(0.3, 0.6), batch_size=4)
    one, other = map(matcher.picture, images)
    problems = [([one], TEXTS), ([other, one], TEXTS[:1]), ([other], TEXTS[1:])]
    expected = [
        Matcher.score(matcher, [images[0]], TEXTS),
        *(matcher.score_many([problem])[0] for problem in problems[1:]),
    ]
    encoded, passes = [], []
    backbone = matcher.backbone
    encode, predict = backbone.encode_images, backbone.predict_noise
    monkeypatch.setattr(backbone, "encode_images", lambda batch: encoded.append(len(batch)) or encode(batch))

    def counted(noised: torch.Tensor, *inputs: torch.Tensor, **options: object) -> torch.Tensor:
        passes.append(len(noised))
        return predict(noised, *inputs, **options)

    monkeypatch.setattr(backbone, "predict_noise", counted)
    monkeypatch.setattr(backbone, "encode_texts", lambda texts: pytest.fail("encoded before"))
    for scores, right in zip(matcher.score_many(problems), expected, strict=True):
        assert scores.shape == right.shape and torch.allclose(scores, right, atol=1e-5)
    pairs = 3 + 2 + (2 if method == "denoising" else 0)  # two problems share a pair
    assert sum(encoded) == 2 and sum(passes) == 2 * (pairs + 1)
    assert matcher.score_many([]) == []


def test_threads_share_a_matcher(models: Path, images: list[Image.Image]) -> None:
    matcher = Matcher.from_pretrained(models / "embedded", levels=(0.3,))
    texts = [[f"a red circle left of {'a ' * n}star"] for n in range(12)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda some: matcher.score(images[0], some), texts))
    fresh = Matcher.from_pretrained(models / "embedded", levels=(0.3,))
    for some, scores in zip(texts, together, strict=True):
        assert torch.allclose(scores, fresh.score(images[0], some), atol=1e-5)


def test_the_default_names_the_true_caption() -> None:
    """The first 100 test scenes of scenes-ref, the true caption against another one, with the embedded model."""
    real = load(ROOT / "params.yaml")
    drawn = real.datasets["scenes-ref"]
    assert isinstance(drawn, DrawnDataset)
    matcher, problems = Matcher.from_pretrained(ROOT / "models/embedded"), []
    for item in [item for item in _items(drawn, "scenes-ref", real.seed, 1) if item[2] == "test"][:100]:
        scenes, [example] = compose(*item, drawn)
        ((image, text),) = example.answer
        other = example.texts[(text + 1) % len(example.texts)]
        picture = matcher.picture(render(scenes[example.images[image]], NATIVE))
        problems.append(([picture], [example.texts[text], other]))
    scores = matcher.score_many(problems)
    assert len(scores) == 100 and sum(bool(s[0, 0] > s[0, 1]) for s in scores) >= 85


def test_shares_are_a_softmax_over_texts(models: Path, images: list[Image.Image]) -> None:
    for method, values in {"denoising": None, "cross-attention": 20.0}.items():
        matcher = Matcher.from_pretrained(models / "embedded", method=method, levels=(0.3,))
        scores = matcher.score(images, TEXTS)
        values = values or float(np.prod(matcher.backbone.encode_images(matcher.picture(images[0])[None]).shape))
        shares = matcher.shares(scores)
        assert torch.allclose(shares.sum(1), torch.ones(2)) and torch.equal(shares.argmax(1), scores.argmax(1))
        assert torch.allclose(shares, (scores * values).softmax(-1))
        assert matcher.shares(torch.tensor([[1, 1]])).tolist() == [[0.5, 0.5]]  # whole numbers are scores too


def test_an_open_file_or_its_mutable_bytes_are_no_images() -> None:
    with (ROOT / "docs/scene.png").open("rb") as file:
        for images in (file, bytearray(file.read())):
            with pytest.raises(ImageError, match=f"^images: must be .* found {type(images).__name__}$"):
                image_list(images)


def test_words_that_the_tokenizer_has_not_learned_are_named(
    images: list[Image.Image], capfd: pytest.CaptureFixture[str]
) -> None:
    matcher = Matcher.from_pretrained(ROOT / "models/embedded", levels=(0.3,))
    with pytest.warns(UserWarning, match="the text encoder has not learned: dog, zebra$"):
        matcher.score(images[0], ["a photo of a dog left of a zebra", "a red circle"])
    assert matcher.unknown_words([]) == []
    assert matcher.unknown_words(["z" * 500]) == ["z" * 500]
    assert "sequence length" not in capfd.readouterr().err


def test_with_a_prompt_the_default_is_what_it_was_trained_for(models: Path, tmp_path: Path) -> None:
    backbone = Matcher.from_pretrained(models / "embedded").backbone
    prompt = AttentionPrompt(backbone.text_width, backbone.layer_widths, 4, rank=2, conditional=False, seed=0)
    prompt.save(tmp_path / "prompt.safetensors", backbone.digest)
    prompted = Matcher.from_pretrained(models / "embedded", prompt=tmp_path / "prompt.safetensors")
    assert (prompted.method, Matcher.from_pretrained(models / "embedded").method) == ("cross-attention", "denoising")


def test_texts_that_are_one_to_the_model_are_said(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    matcher = Matcher.from_pretrained(models / "embedded", device="cpu")
    long = "a red circle " * 12
    texts = [f"{long}left", f"{long}right", "a blue square", "A BLUE square"]
    with pytest.warns(UserWarning, match="to the model these are one text, a tie") as warned:
        [scores_T] = matcher.score(np.zeros((32, 32, 3), np.uint8), texts)
    assert len([w for w in warned if "a tie" in str(w.message)]) == 2
    assert len([w for w in warned if "was cut" in str(w.message)]) == 2
    assert scores_T[0] == scores_T[1] and scores_T[2] == scores_T[3]
    assert "indexing errors" not in caplog.text
