"""The contrastive scorer: zero-shot CLIP, tuned projections, and a context that depends on the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from dsd.config import Params
from dsd.data.examples import Pair, pairs
from dsd.engine.score import score_contrastive
from dsd.engine.session import Folders, Session
from dsd.errors import CheckpointError, TextError
from dsd.models import load_clip
from dsd.models.clip import Clip
from dsd.models.clip_heads import ContextPrompt, Features, Head, Projections, load_head, new_head
from dsd.store import Store
from tests.gradients import check_gradient

IMAGES = ["i", "j", "k"]
TEXTS = ["", "a red circle", "a blue star left of a green ring"]
PAIRS = [Pair(image, text) for image in IMAGES for text in TEXTS]
TUNED = ["clip-finetune", "clip-prompt"]


class Given:
    """Features that are given rather than stored."""

    def __init__(self, items: Sequence[str], features: np.ndarray) -> None:
        self.items, self._rows = items, dict(zip(items, features, strict=True))

    def __call__(self, items: Sequence[str]) -> dict[str, np.ndarray]:
        return {"features": np.stack([self._rows[item] for item in items])}


@pytest.fixture(scope="module")
def clip(params: Params) -> Clip:
    return load_clip(params.backbones["embedded-clip"], torch.device("cpu"))


@pytest.fixture(scope="module")
def features(clip: Clip) -> tuple[Features, Features]:
    images = np.random.default_rng(0).integers(0, 255, (3, 24, 24, 3), dtype=np.uint8)
    return Given(IMAGES, clip.image_features(images).numpy()), Given(TEXTS, clip.text_features(TEXTS).numpy())


def start(name: str, params: Params, clip: Clip, features: tuple[Features, Features]) -> Head:
    method = params.methods[name]
    assert method.scorer == "contrastive"
    return new_head(method, clip, *features, params.context, seed=0)


def moved(head: Head) -> Head:
    """The head with its weights changed, as by a training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in head.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return head


def test_fine_tuning_starts_at_the_zero_shot_score(
    params: Params, clip: Clip, features: tuple[Features, Features]
) -> None:
    method = params.methods["clip-zero-shot"]
    assert method.scorer == "contrastive"
    zero_shot = load_head(method, clip, *features, Path("nowhere"))
    assert torch.equal(start("clip-finetune", params, clip, features)(PAIRS), zero_shot(PAIRS))


@pytest.mark.parametrize("name", TUNED)
def test_only_what_is_tuned_learns(name: str, params: Params, clip: Clip, features: tuple[Features, Features]) -> None:
    """The length of the gradient against the finite difference along it."""
    head = moved(start(name, params, clip, features))
    check_gradient(lambda: head(PAIRS).sum(), list(head.parameters()), step=5e-3, rel=0.02)
    assert not any(weight.requires_grad for weight in clip.model.parameters())


def test_no_context_is_the_text_encoder(clip: Clip) -> None:
    ids = [torch.tensor(row) for row in clip.tokenizer(TEXTS).input_ids]
    padded = pad_sequence(ids, batch_first=True, padding_value=clip.tokenizer.pad_token_id)
    none = torch.zeros(3, 0, clip.model.config.text_config.hidden_size)
    assert torch.allclose(clip.prompted_features(padded, none), clip.text_features(TEXTS), atol=1e-5)


def test_a_context_of_words_is_those_words(clip: Clip) -> None:
    """The embeddings of "a red circle" as context, before "left of a ring": the text of both."""
    tokens = clip.tokenizer(["a red circle", "left of a ring"]).input_ids
    words = clip.model.text_model.embeddings.token_embedding(torch.tensor(tokens[0][1:-1]))
    found = clip.prompted_features(torch.tensor([tokens[1]]), words[None])
    assert torch.allclose(found, clip.text_features(["a red circle left of a ring"]), atol=1e-5)
    assert not torch.allclose(found, clip.text_features(["left of a ring"]), atol=1e-2)


def test_the_context_shifts_with_the_image_once_it_is_trained(
    params: Params, clip: Clip, features: tuple[Features, Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = start("clip-prompt", params, clip, features)
    assert isinstance(head, ContextPrompt)
    contexts: list[torch.Tensor] = []
    inner = clip.prompted_features

    def recorded(ids: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        contexts.append(context)
        return inner(ids, context)

    monkeypatch.setattr(clip, "prompted_features", recorded)
    two = [Pair("i", TEXTS[1]), Pair("j", TEXTS[1])]
    head(two)
    assert torch.equal(contexts[0], head.context.expand(2, -1, -1))
    moved(head)(two)
    shift = contexts[1] - head.context
    assert torch.allclose(shift, shift[:, :1].expand_as(shift), atol=1e-6)  # one for all vectors of the context
    assert not torch.allclose(shift[0], shift[1])


@pytest.mark.parametrize("name", TUNED)
def test_cosines_do_not_depend_on_batch_size_or_order(
    name: str,
    params: Params,
    clip: Clip,
    features: tuple[Features, Features],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = moved(start(name, params, clip, features))
    monkeypatch.setattr(Session, "head", lambda session, method: head if method == name else None)

    def cosines(pairs: list[Pair], batch_size: int) -> np.ndarray:
        runtime = params.runtime.model_copy(update={"batch_size": batch_size})
        folders = Folders(tmp_path, tmp_path, tmp_path)
        return Session("scenes-com", params.model_copy(update={"runtime": runtime}), folders).cosines(name, pairs)

    together = cosines(PAIRS, 100)
    np.testing.assert_allclose(cosines(PAIRS, 1), together, atol=1e-6)
    np.testing.assert_allclose(cosines(PAIRS[::-1], 4)[::-1], together, atol=1e-6)


@pytest.mark.parametrize("name", TUNED)
def test_what_was_learned_is_read_back_by_its_own_backbone_alone(
    name: str,
    params: Params,
    clip: Clip,
    features: tuple[Features, Features],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = params.methods[name]
    assert method.scorer == "contrastive"
    head = moved(start(name, params, clip, features))
    head.save(tmp_path / head.file)
    again = load_head(method, clip, *features, tmp_path)
    assert torch.equal(again(PAIRS), head(PAIRS))
    assert not any(weight.requires_grad for weight in again.parameters())
    with pytest.raises(CheckpointError, match="no such file; train"):
        load_head(method, clip, *features, tmp_path / "elsewhere")
    other = Projections(clip, *features) if name == "clip-prompt" else start("clip-prompt", params, clip, features)
    other.save(tmp_path / head.file)
    with pytest.raises(CheckpointError, match=r"not .*; another kind of tensors"):
        load_head(method, clip, *features, tmp_path)
    monkeypatch.setattr(clip, "digest", "another")
    with pytest.raises(CheckpointError, match=r"belongs to backbone .*, not to another"):
        load_head(method, clip, *features, tmp_path)


def test_a_text_without_room_for_the_context_is_one_line(clip: Clip, features: tuple[Features, Features]) -> None:
    with pytest.raises(TextError, match=r"'a blue star left of a green ring': 10 tokens and 15 .* the 24") as error:
        ContextPrompt(clip, *features, tokens=15, hidden=2, seed=0)
    assert "\n" not in str(error.value)


def test_other_weights_are_other_scores_of_their_method_alone(
    params: Params, prepared: Path, cached: Path, tmp_path: Path
) -> None:
    two = params.model_copy(update={"methods": {m: params.methods[m] for m in ("clip-zero-shot", "clip-finetune")}})
    session, store = Session("scenes-com", two, Folders(prepared, cached, tmp_path)), Store(tmp_path / "score")
    head = Projections(session.clip("embedded-clip"), *session.features("embedded-clip"))
    test_pairs = pairs(session.examples("test"))
    (tmp_path / "clip-finetune").mkdir()
    found = []
    for change in (lambda head: head, moved):
        change(head).save(tmp_path / "clip-finetune" / head.file)
        keys = score_contrastive(session, test_pairs, store)
        found.append({method: (key, store.read(key)) for method, [key] in keys.items()})
    before, after = found
    assert before["clip-zero-shot"][0] == after["clip-zero-shot"][0]
    assert before["clip-finetune"][0] != after["clip-finetune"][0]
    zero_shot, untouched, tuned = (row[1] for row in (*before.values(), after["clip-finetune"]))
    assert zero_shot is not None and untouched is not None and tuned is not None
    assert np.array_equal(zero_shot["cosine"], untouched["cosine"])
    assert not np.allclose(zero_shot["cosine"], tuned["cosine"], atol=1e-2)
