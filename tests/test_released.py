"""The published implementation's rule, against a direct transcription of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsd.config import Params, ReleasedMethod, load
from dsd.data.draws import Draw, draws
from dsd.data.examples import Pair, pairs, read_examples
from dsd.data.image_table import ImageTable
from dsd.engine.encodings import all_texts, diffusion_encodings, read_all
from dsd.engine.score import score
from dsd.engine.session import Folders, Session
from dsd.errors import ParamsError
from dsd.evaluation.evaluate import ScoredSplit
from dsd.models import load_diffusion
from dsd.models.attention import Capture, cross_attention_layers, logits_pooling
from dsd.models.stable_diffusion import StableDiffusion
from dsd.scorers import released
from dsd.scorers.base import Scores, StoredEvidence
from dsd.scorers.evidence import UNCONDITIONAL, Evidence, read_evidence, reads_unconditional
from dsd.store import Store
from tests.conftest import ROOT, read_settings, write_settings

SD21 = dict(  # the U-Net of Stable Diffusion 2.1-base
    sample_size=64, attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
)  # fmt: skip


@pytest.fixture(scope="module")
def alone(params: Params) -> Params:
    """The method with and without the denoising term, and no other that would read the unconditional pass."""
    method = params.methods["dsd-released"]
    without = method.model_copy(update={"denoising": False})
    return params.model_copy(update={"methods": {"with": method, "without": without}})


@pytest.fixture(scope="module")
def backbone(params: Params) -> StableDiffusion:
    return load_diffusion(params.backbones["embedded"], torch.device("cpu"))


@torch.inference_mode()
def transcription(backbone: StableDiffusion, latents: Tensor, text: str, draw: Draw, denoising: bool) -> float:
    """One image, text and draw: both halves of classifier-free guidance, logits from the layers' own projections."""
    outputs: dict[str, Tensor] = {}
    hooks, layers = [], dict(cross_attention_layers(backbone.unet))
    counted = [name for name in layers if name.startswith(("down_blocks.1.", "mid_block.", "up_blocks.1."))]
    for name in counted:
        for part in ("to_q", "to_k"):
            keep = lambda _, __, out, key=name + part: outputs.__setitem__(key, out)  # noqa: E731
            hooks.append(getattr(layers[name], part).register_forward_hook(keep))
    hidden = backbone.encode_texts([UNCONDITIONAL, text]).hidden
    timestep, noise = torch.tensor([draw.timestep(1000)]), draw.noise(tuple(latents.shape[1:]))[None]
    noised = backbone.schedule.add_noise(latents, noise, timestep)
    predicted = backbone.predict_noise(noised.repeat(2, 1, 1, 1), timestep.repeat(2), hidden)
    for hook in hooks:
        hook.remove()
    values = []
    for name in counted:
        query, key = (layers[name].head_to_batch_dim(outputs[name + part]) for part in ("to_q", "to_k"))
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5  # [2 · heads, image tokens, text tokens]
        assert logits.shape[-1] == backbone.max_tokens
        values.append(logits.exp().sum(-1).log().mean())
    difference = torch.linalg.vector_norm(noise - predicted[:1]) - torch.linalg.vector_norm(noise - predicted[1:])
    return float(torch.stack(values).mean() + (difference if denoising else 0))


def test_scores_are_those_of_a_direct_transcription(
    alone: Params, backbone: StableDiffusion, prepared: Path, cached: Path, tmp_path: Path
) -> None:
    score(Session("scenes-com", alone, Folders(prepared, cached, tmp_path)), tmp_path, split="test")
    split, noise = ScoredSplit.of("scenes-com", alone, prepared, tmp_path), alone.noise_of("scenes-com")
    scores = {name: split.scores(method, name) for name, method in alone.methods.items()}
    texts, images = all_texts(read_all(prepared)), ImageTable(prepared / "images.parquet")
    latents, _ = diffusion_encodings(backbone, images, texts, 32, Store(cached), 1)
    for pair in pairs(split.examples)[:3]:
        image = torch.from_numpy(latents([pair.image])["latents"])
        for name, denoising in (("with", True), ("without", False)):
            expected = [transcription(backbone, image, pair.text, draw, denoising) for draw in draws(noise, alone.seed)]
            assert scores[name][pair] == pytest.approx(np.mean(expected), abs=1e-5)


def test_the_score_of_a_pair_does_not_depend_on_its_neighbours(backbone: StableDiffusion, params: Params) -> None:
    """The published implementation averages over the batch."""
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    text, timesteps = backbone.encode_texts(["a red circle", "a blue star left of a green ring"]), torch.full((2,), 300)

    def pooled(rows: slice) -> Tensor:
        capture = Capture.of(params.evidence, text.content[rows])
        with torch.inference_mode():
            backbone.predict_noise(latents[rows], timesteps[rows], text.hidden[rows], capture=capture)
        return capture.stacked()[0][:, params.evidence.poolings.index("logits")]

    assert torch.allclose(pooled(slice(0, 2))[1:], pooled(slice(1, 2)), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 8), st.integers(1, 40), st.integers(1, 24), st.integers(0, 100))
def test_pooling_is_the_logsumexp_over_the_text(scale: float, image: int, text: int, seed: int) -> None:
    logits = scale * torch.randn(2, 3, image, text, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(logits_pooling(logits, logits.softmax(-1)), logits.logsumexp(-1).mean(-1), atol=1e-4)


def test_of_stable_diffusion_six_layers_count() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD21)
    names = [name for name, _ in cross_attention_layers(unet)]
    assert len(names) == 16
    assert [names[n].partition(".transformer_blocks.")[0] for n in released.last_blocks(names)] == [
        "down_blocks.2.attentions.0",
        "down_blocks.2.attentions.1",
        "mid_block.attentions.0",
        "up_blocks.3.attentions.0",
        "up_blocks.3.attentions.1",
        "up_blocks.3.attentions.2",
    ]


def by_hand(unconditional: bool) -> Evidence:
    """One draw, one layer of one head that counts and one of two that does not; a latent of four values."""
    every = [Pair("i", "t"), Pair("j", "t"), *([Pair("i", ""), Pair("j", "")] if unconditional else [])]
    attention = np.zeros((4, 1, 1, 2, 2), np.float32)
    attention[:, 0, 0, 0, :] = 100
    attention[:, 0, 0, 1, 0] = [3, 4, 5, 7]
    error = np.array([[0.25], [1.0], [2.25], [4.0]], np.float32)
    names = ["down_blocks.0.attentions.0.x", "down_blocks.1.attentions.0.x"]
    some = slice(0, len(every))
    return Evidence(every, [Draw(0.2, 0)], attention[some], attention[some, :, 0], error[some], names, 4)


def scores_of(evidence: Evidence, method: ReleasedMethod) -> Scores:
    stored = SimpleNamespace(evidence=lambda _: evidence, poolings=["logits"])
    return released.SCORER.scores("dsd-released", method, cast(StoredEvidence, stored))


def test_the_rule_by_hand() -> None:
    method = ReleasedMethod(scorer="released", prompt="none", schedule="exhaustive", levels=(0.2,), denoising=True)
    both = scores_of(by_hand(True), method)
    assert both[Pair("i", "t")] == pytest.approx((3 + 5) / 2 + 3 - 1)
    assert both[Pair("j", "t")] == pytest.approx((4 + 7) / 2 + 4 - 2)
    # One image: its unconditional half is the same for every text, and is not computed.
    half = scores_of(by_hand(False), method)
    assert half[Pair("i", "t")] == pytest.approx(3 / 2 - 1)
    off = scores_of(by_hand(True), method.model_copy(update={"denoising": False}))
    assert off[Pair("i", "t")] == pytest.approx((3 + 5) / 2)


def test_the_published_timesteps_are_levels() -> None:
    levels = (0.01, 0.26, 0.511, 0.761)  # as params.yaml says
    assert [Draw(level, 0).timestep(1000) for level in levels] == list(range(10, 990, 1000 // 4))


def test_the_method_requests_what_it_needs(alone: Params, tmp_path: Path) -> None:
    assert reads_unconditional(alone.methods, "none") and not reads_unconditional(alone.methods, "few-shot")
    content = read_settings(ROOT)
    content["evidence"]["poolings"].remove("logits")
    write_settings(content, tmp_path)
    with pytest.raises(ParamsError, match=r"methods\.dsd-released\.scorer: released needs 'logits'"):
        load(tmp_path / "params.yaml")


def test_evidence_names_the_layers_of_the_backbone(
    alone: Params, backbone: StableDiffusion, prepared: Path, cached: Path, tmp_path: Path
) -> None:
    score(Session("scenes-com", alone, Folders(prepared, cached, tmp_path)), tmp_path, split="test")
    examples = read_examples(prepared / "examples.parquet", "test")
    evidence = read_evidence(tmp_path, "none", examples, alone.noise_of("scenes-com"), alone.seed, compares=True)
    assert evidence.layers == backbone.layers and evidence.latent == 4 * 4 * 4
    assert evidence.attention.shape[-2] == len(evidence.layers)
