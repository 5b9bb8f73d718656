"""The processor against slow oracles: SDPA, loops, and autograd."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import ModuleType
from typing import Literal

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dsd.config import Params
from dsd.config.base import Pooling
from dsd.errors import CheckpointError
from dsd.models import attention, load_diffusion
from dsd.models.attention import AttentionState, Capture, during, logsumexp_pooling, over_tokens, token_weights
from dsd.models.prompts import AttentionPrompt, pooled_latent
from dsd.models.stable_diffusion import StableDiffusion
from dsd.scorers import cross_attention


@pytest.fixture(scope="module")
def backbone(params: Params) -> StableDiffusion:
    return load_diffusion(params.backbones["embedded"], torch.device("cpu"))


def inputs(backbone: StableDiffusion, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, 4, 4, generator=generator)
    text = backbone.encode_texts([f"a red circle left of a {c} star" for c in ("blue", "green", "pink")[:batch]])
    return latents, torch.full((batch,), 300), text.hidden.clone(), text.content


def attention_map(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_pooling_is_equation_3_by_loops() -> None:
    attn, scale = attention_map((2, 3, 5, 4)), 20.0
    pooled, _ = logsumexp_pooling(attn, scale, normalise=False)
    for b in range(2):
        for h in range(3):
            for j in range(4):
                expected = math.log(sum(math.exp(scale * attn[b, h, i, j].item()) for i in range(5))) / scale
                assert pooled[b, h, j].item() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.5, 60), st.integers(1, 40), st.integers(0, 100))
def test_pooling_lies_between_mean_and_maximum_and_tends_to_it(scale: float, tokens: int, seed: int) -> None:
    attn = attention_map((1, 2, tokens, 6), seed)
    pooled, _ = logsumexp_pooling(attn, scale, normalise=True)
    assert (pooled <= attn.amax(-2) + 1e-5).all()
    assert (pooled >= attn.mean(-2) - 1e-5).all()
    literal, _ = logsumexp_pooling(attn, scale, normalise=False)
    assert torch.allclose(literal - pooled, torch.tensor(math.log(tokens) / scale), atol=1e-5)


def test_attribution_is_equation_7_by_autograd() -> None:
    attn = attention_map((2, 3, 5, 4)).requires_grad_()
    mask = torch.tensor([[True, True, False, True], [True, False, False, True]])
    pooled, closed = logsumexp_pooling(attn, 20.0, normalise=False)
    score = over_tokens(pooled, token_weights(mask))  # f of every head, [B, H]
    (gradient,) = torch.autograd.grad(score.sum(), attn)
    by_autograd = (attn * gradient).sum((-2, -1))
    assert torch.allclose(over_tokens(closed, token_weights(mask)), by_autograd, atol=1e-6)


def test_capture_changes_no_prediction(backbone: StableDiffusion, params: Params) -> None:
    latents, timesteps, hidden, content = inputs(backbone, 3)
    with torch.inference_mode():
        bare = backbone.predict_noise(latents, timesteps, hidden)
        capture = Capture.of(params.evidence, content)
        captured = backbone.predict_noise(latents, timesteps, hidden, capture=capture)
    assert torch.allclose(bare, captured, atol=1e-5)


def state(backbone: StableDiffusion) -> tuple[object, ...]:
    return backbone.attention.capture, backbone.attention.prompt, backbone.attention.text_index_B


def random_prompt(backbone: StableDiffusion, seed: int) -> AttentionPrompt:
    prompt = AttentionPrompt(32, backbone.layer_widths, 4, rank=2, conditional=True, seed=seed)
    for up in prompt.up:
        torch.nn.init.normal_(up, generator=torch.Generator().manual_seed(seed))
    return prompt.requires_grad_(False)


@torch.inference_mode()
def test_a_pass_leaves_no_state_behind(backbone: StableDiffusion, params: Params) -> None:
    latents, timesteps, hidden, content = inputs(backbone, 3)
    bare, index = backbone.predict_noise(latents, timesteps, hidden), torch.tensor([2, 0, 1])
    capture, prompt = Capture.of(params.evidence, content[index]), random_prompt(backbone, 0).bind(latents)
    prompted = backbone.predict_noise(latents, timesteps, hidden, index, capture=capture, prompt=prompt)
    assert state(backbone) == (None, None, None) and len(capture.pooled) == len(backbone.layers)
    assert torch.equal(backbone.predict_noise(latents, timesteps, hidden), bare)
    assert not torch.allclose(prompted, bare, atol=1e-3) and len(capture.pooled) == len(backbone.layers)

    def fails(layer: int, text_BMD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert state(backbone) == (capture, fails, index)
        if layer == 2:
            raise RuntimeError("in the middle of a pass")
        return prompt(layer, text_BMD)

    fails.layers = prompt.layers  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="in the middle"):
        backbone.predict_noise(latents, timesteps, hidden, index, capture=capture, prompt=fails)
    assert state(backbone) == (None, None, None)
    assert torch.equal(backbone.predict_noise(latents, timesteps, hidden), bare)


def test_threads_with_other_captures_and_prompts_do_not_mix(backbone: StableDiffusion, params: Params) -> None:
    """Two passes enter every layer together, since their prompts wait there; between two layers, a third pass without
    capture and prompt runs in this thread."""
    latents, timesteps, hidden, content = inputs(backbone, 3)
    jobs: list[tuple[tuple[Pooling, ...], AttentionPrompt, torch.Tensor]] = [
        (("logsumexp",), random_prompt(backbone, 0), torch.tensor([0, 1, 2])),
        (("maximum", "cosine"), random_prompt(backbone, 1), torch.tensor([2, 2])),
    ]

    @torch.inference_mode()
    def evidence(number: int, wait: Callable[[], object]) -> tuple[torch.Tensor, ...]:
        poolings, prompt, index = jobs[number]
        capture = Capture.of(params.evidence.model_copy(update={"poolings": poolings}), content[index])
        bound, rows = prompt.bind(latents[: len(index)]), slice(len(index))

        def waiting(layer: int, text_BMD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            wait()
            return bound(layer, text_BMD)

        waiting.layers = bound.layers  # type: ignore[attr-defined]
        predicted = backbone.predict_noise(
            latents[rows], timesteps[rows], hidden, index, capture=capture, prompt=waiting
        )
        return predicted, *capture.stacked()

    with torch.inference_mode():
        bare = backbone.predict_noise(latents, timesteps, hidden)
    alone = [evidence(number, lambda: None) for number in range(2)]
    barrier = Barrier(3, timeout=60)
    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(evidence, number, barrier.wait) for number in range(2)]
        barrier.wait()
        for _ in backbone.layers[1:]:
            with torch.inference_mode():
                assert torch.allclose(backbone.predict_noise(latents, timesteps, hidden), bare, atol=1e-6)
            barrier.wait()
        together = [future.result() for future in futures]
    for expected, found in zip(alone, together, strict=True):
        for one, other in zip(expected, found, strict=True):
            assert one.shape == other.shape and torch.allclose(one, other, atol=1e-6)


def test_captured_maps_are_softmax_of_query_and_key(backbone: StableDiffusion, params: Params) -> None:
    """One layer's map, from its own inputs, by diffusers' own attention scores."""
    latents, timesteps, hidden, content = inputs(backbone, 2)
    _, layer = attention.cross_attention_layers(backbone.unet)[0]
    queries: list[torch.Tensor] = []
    hook = layer.to_q.register_forward_pre_hook(lambda _, args: queries.append(args[0]))
    capture = Capture.of(params.evidence, content, keep_maps=True)
    with torch.inference_mode():
        backbone.predict_noise(latents, timesteps, hidden, capture=capture)
    hook.remove()
    query, key = (layer.head_to_batch_dim(x) for x in (layer.to_q(queries[0]), layer.to_k(hidden)))
    expected = layer.get_attention_scores(query, key).unflatten(0, (2, -1))
    assert capture.maps is not None
    assert torch.allclose(capture.maps[0], expected, atol=1e-6)


def test_evidence_covers_every_layer_and_head(backbone: StableDiffusion, params: Params) -> None:
    latents, timesteps, hidden, content = inputs(backbone, 2)
    capture = Capture.of(params.evidence, content)
    with torch.inference_mode():
        backbone.predict_noise(latents, timesteps, hidden, capture=capture)
    pooled, attribution = capture.stacked()
    assert pooled.shape == (2, len(params.evidence.poolings), len(backbone.layers), 2)
    assert attribution.shape == (2, len(backbone.layers), 2)
    assert backbone.layers[0].startswith("down_blocks.0") and backbone.layers[-1].startswith("up_blocks.1")
    assert torch.isfinite(pooled).all()
    cosine = pooled[:, params.evidence.poolings.index("cosine")]
    assert (cosine.abs() <= 1).all()


def test_padding_tokens_do_not_count(backbone: StableDiffusion, params: Params) -> None:
    text = backbone.encode_texts(["a red circle"])
    assert text.content[0].tolist() == [False, True, True, True] + [False] * 20


def test_zero_prompt_is_the_zero_shot_score(backbone: StableDiffusion, params: Params) -> None:
    latents, timesteps, hidden, content = inputs(backbone, 2)
    prompt = AttentionPrompt(32, backbone.layer_widths, 4, rank=2, conditional=True, seed=0)
    results = []
    for bound in (None, prompt.bind(latents)):
        capture = Capture.of(params.evidence, content)
        with torch.no_grad():
            backbone.predict_noise(latents, timesteps, hidden, capture=capture, prompt=bound)
        results.append(capture.stacked()[0])
    assert torch.equal(*results)


def test_prompt_adds_to_the_matrices(backbone: StableDiffusion) -> None:
    """Eq. 5 literally: (W + p(x)) r_y equals W r_y + what the prompt adds."""
    prompt = AttentionPrompt(32, backbone.layer_widths, 4, rank=2, conditional=True, seed=0)
    for up in prompt.up:
        torch.nn.init.normal_(up)
    latents, _, hidden, _ = inputs(backbone, 1)
    condition = pooled_latent(latents)
    _, layer = attention.cross_attention_layers(backbone.unet)[1]
    added_key, added_value = prompt.bind(latents)(1, hidden)
    for side, (matrix, added) in enumerate([(layer.to_k.weight, added_key), (layer.to_v.weight, added_value)]):
        core = torch.diag(1 + prompt.map[1, side] @ condition[0])
        learned = prompt.up[1][side] @ core @ prompt.down[1, side]
        assert torch.allclose(hidden @ (matrix + learned).T, hidden @ matrix.T + added, atol=1e-5)


@pytest.mark.parametrize("heads", ["weighted", "mean"])
def test_layers_may_differ_in_number_of_heads(params: Params, heads: Literal["weighted", "mean"]) -> None:
    """As in Stable Diffusion 2: the score of a layer is that of its own heads."""
    blocks = dict(down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2)
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=(2, 4),
        cross_attention_dim=8, layers_per_block=1, **blocks,
    )  # fmt: skip
    capture, state = Capture.of(params.evidence, torch.ones(2, 5, dtype=torch.bool)), AttentionState()
    attention.install(unet, state)
    with torch.inference_mode(), during(state, capture, None, None):
        unet(torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), torch.randn(2, 5, 8))
    assert {layer.shape[-1] for layer in capture.attribution} == {2, 4}
    pooled, attribution = capture.stacked()
    for number in range(len(params.evidence.poolings)):
        alone = [
            cross_attention.reduce(p[number, :, None], a[:, None], layers="all", heads=heads)
            for p, a in zip(capture.pooled, capture.attribution, strict=True)
        ]
        together = cross_attention.reduce(pooled[:, number], attribution, layers="all", heads=heads)
        assert torch.allclose(together, torch.stack(alone).mean(0), atol=1e-6)


def test_weighted_heads_by_hand() -> None:
    pooled = torch.tensor([[[1.0, 3.0], [2.0, 2.0]]])
    attribution = torch.tensor([[[1.0, 3.0], [1.0, 1.0]]])
    assert cross_attention.reduce(pooled, attribution, layers="all", heads="weighted").item() == pytest.approx(
        (2.5 + 2) / 2
    )
    assert cross_attention.reduce(pooled, attribution, layers="all", heads="mean").item() == pytest.approx(2)
    assert cross_attention.reduce(pooled, attribution, layers=1, heads="weighted").item() == pytest.approx(2)


def test_prompt_of_another_backbone_is_refused(tmp_path: Path) -> None:
    prompt = AttentionPrompt(32, [16, 32], 4, rank=2, conditional=False, seed=0)
    prompt.save(tmp_path / "p.safetensors", "one")
    loaded = AttentionPrompt.load(tmp_path / "p.safetensors", "one")
    assert torch.equal(loaded.down, prompt.down)
    with pytest.raises(CheckpointError, match="belongs to backbone one, not to two"):
        AttentionPrompt.load(tmp_path / "p.safetensors", "two")
    (tmp_path / "q.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="not an attention prompt"):
        AttentionPrompt.load(tmp_path / "q.safetensors", "one")


@pytest.mark.parametrize("metadata", ["[]", '"abc"', "3", "null", "[" * 100_000, "{}", '{"a": 1, "a": 1}', "NaN"])
def test_metadata_of_no_prompt_are_one_line(metadata: str, tmp_path: Path) -> None:
    save_file({"down": torch.zeros(1)}, tmp_path / "p.safetensors", {"dsd": metadata})
    for path in (tmp_path / "p.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=r"^\S+: not an attention prompt in safetensors$"):
            AttentionPrompt.load(path, "one")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_a_prompt_is_stored_in_floating_point(dtype: torch.dtype, tmp_path: Path) -> None:
    AttentionPrompt(32, [16], 4, rank=2, conditional=False, seed=0).save(tmp_path / "p.safetensors", "one")
    shape = {"backbone": "one", "text_width": 32, "inner": [16], "latent_channels": 0, "rank": 2, "conditional": False}
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "p.safetensors").items()}
    save_file(tensors, tmp_path / "p.safetensors", {"dsd": json.dumps(shape)})
    with pytest.raises(CheckpointError, match=r"is stored as .*: must be dense, of float16"):
        AttentionPrompt.load(tmp_path / "p.safetensors", "one")


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_prompt_has_as_many_layers_as_the_unet(extra: int, backbone: StableDiffusion) -> None:
    latents, timesteps, hidden, _ = inputs(backbone, 2)
    count = len(backbone.layers)
    prompt = AttentionPrompt(32, [32] * (count + extra), 4, rank=2, conditional=False, seed=0).bind(latents)
    with pytest.raises(
        CheckpointError, match=f"the attention prompt is of {count + extra} layers, the U-Net of {count}"
    ):
        backbone.predict_noise(latents, timesteps, hidden, prompt=prompt)


# Backends of self-attention.


def by_loops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Attention in the layout of xformers: [B, N, H, D] each."""
    logits = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), value)


def with_xformers(monkeypatch: pytest.MonkeyPatch, kernel: object) -> None:
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["xformers.ops"].memory_efficient_attention = kernel  # type: ignore[attr-defined]


def test_a_backend_changes_no_result(
    backbone: StableDiffusion, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    with_xformers(monkeypatch, lambda *a, **k: (calls.append(a[0].shape), by_loops(*a, **k))[1])
    other = load_diffusion(params.backbones["embedded"], torch.device("cpu"), "xformers")
    assert other.digest == backbone.digest
    calls.clear()
    latents, timesteps, hidden, content = inputs(backbone, 2)
    results = []
    for opened in (backbone, other):
        capture = Capture.of(params.evidence, content)
        with torch.inference_mode():
            predicted = opened.predict_noise(latents, timesteps, hidden, capture=capture)
        results.append((predicted, *capture.stacked()))
    assert len(calls) == len(attention.attention_layers(other.unet, "attn1")) == len(backbone.layers)
    for expected, other_result in zip(*results, strict=True):
        assert torch.allclose(expected, other_result, atol=1e-5)


def refuses(*_: object, **__: object) -> None:
    raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nwith inputs: cpu")


@pytest.mark.parametrize(
    ("backend", "kernel", "message"),
    [
        ("xformer", None, "unknown attention backend 'xformer': did you mean 'xformers'?"),
        ("xformers", None, "xformers is not installed; install the extra `gpu`, or use sdpa"),
        ("xformers", refuses, "xformers cannot run on cpu in float32; use sdpa (No operator found for"),
    ],
)
def test_a_backend_that_cannot_run_is_reported_when_the_checkpoint_is_opened(
    backend: str, kernel: object, message: str, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel is not None:
        with_xformers(monkeypatch, kernel)
    else:
        monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(CheckpointError) as error:
        load_diffusion(params.backbones["embedded"], torch.device("cpu"), backend)
    assert str(error.value).startswith(f"runtime.attention: {message}") and "\n" not in str(error.value)
