"""Cross-attention of a U-Net: add the prompt, pool the maps and weight the heads in one processor.

Shapes: B batch, H heads, N image tokens, M text tokens, D width of a head, L cross-attention layers, P poolings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsd.config import EvidenceParams
from dsd.errors import CheckpointError, brief, unknown

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

    from dsd.models.prompts import BoundPrompt


def logsumexp_pooling(attn_BHNM: Tensor, scale: float, normalise: bool) -> tuple[Tensor, Tensor]:
    """Return eq. 3 over the image tokens, S [B, H, M], and eq. 7 in closed form, Σ_i A ∂S/∂A [B, H, M].

    ∂S_j/∂A_ij = softmax_i(λ A_ij), so the attribution of a token is the softmax-weighted mean of its own column. A is
    in [0, 1] and λ ≤ 60 (params), so exp(λA) cannot overflow float32 and needs no shift by the maximum.
    """
    exp_BHNM = (attn_BHNM * scale).exp_()
    sum_BHM = exp_BHNM.sum(-2)
    attribution_BHM = (attn_BHNM * exp_BHNM).sum(-2) / sum_BHM
    if normalise:  # the mean instead of the sum: layers of different N become comparable
        sum_BHM = sum_BHM / attn_BHNM.shape[-2]
    return sum_BHM.log() / scale, attribution_BHM


def maximum_pooling(attn_BHNM: Tensor) -> Tensor:
    """Return the limit λ → ∞ of eq. 3, [B, H, M]; by halves, ten times as fast on CPUs as one strided amax."""
    while (half := attn_BHNM.shape[-2] // 2) * 2 == attn_BHNM.shape[-2]:
        attn_BHNM = torch.maximum(attn_BHNM[..., :half, :], attn_BHNM[..., half:, :])
    return attn_BHNM.amax(-2)


def cosine_pooling(query_BHND: Tensor, key_BHMD: Tensor) -> Tensor:
    """Cosine between each text token's key and the image tokens' queries, averaged over the image: [B, H, M].

    The paper compares "the shared dimensions" of the image and text features; W^q and W^k map both to the same
    dimensions, so none is cut off.
    """
    # Norms and means are matrix products, the fastest operation, and no unit vectors are stored.
    ones_D1 = query_BHND.new_ones(query_BHND.shape[-1], 1)
    queries_BH1N = (query_BHND.square() @ ones_D1).clamp_min(1e-24).rsqrt().transpose(-1, -2)
    keys_BHM1 = (key_BHMD.square() @ ones_D1).clamp_min(1e-24).rsqrt()
    query_BH1D = queries_BH1N @ query_BHND / query_BHND.shape[-2]
    return ((query_BH1D @ key_BHMD.transpose(-1, -2)).squeeze(-2)) * keys_BHM1.squeeze(-1)


def logits_pooling(logits_BHNM: Tensor, attn_BHNM: Tensor) -> Tensor:
    """Return log Σ_j exp(logits_ij) over all text tokens j, averaged over the image tokens: [B, H].

    This is the rule of the published implementation; padding and special tokens count. It is computed without another
    exponential from log A_ij = logits_ij − logsumexp_i, which holds for every j. We take the begin token, which gets
    the most attention: the identity needs A_i0 > 0 in float32, so a logit at most 87 below the largest of its row.
    """
    return (logits_BHNM[..., 0] - attn_BHNM[..., 0].log()).mean(-1)


def token_weights(tokens_BM: Tensor) -> Tensor:
    """Return the weights [B, 1, M] of a mean over the text tokens that count."""
    return (tokens_BM.float() / tokens_BM.sum(-1, keepdim=True))[:, None, :]


def over_tokens(values_BHM: Tensor, weights_B1M: Tensor) -> Tensor:
    """Eq. 4: the mean over the text tokens that count: [B, H]."""
    return (values_BHM * weights_B1M).sum(-1)


@dataclass
class Capture:
    """The recorded attention of one pass, with a list entry per layer in the order of the forward pass."""

    poolings: tuple[str, ...]
    scale: float
    normalise: bool
    weights_B1M: Tensor
    pooled: list[Tensor] = field(default_factory=list)  # [P, B, H] each
    attribution: list[Tensor] = field(default_factory=list)  # [B, H] each
    maps: list[Tensor] | None = None  # [B, H, N, M] each, kept only for heat maps

    @classmethod
    def of(cls, params: EvidenceParams, tokens_BM: Tensor, keep_maps: bool = False) -> Capture:
        weights_B1M = token_weights(tokens_BM)
        return cls(params.poolings, params.scale, params.normalise, weights_B1M, maps=[] if keep_maps else None)

    def add(self, logits_BHNM: Tensor, attn_BHNM: Tensor, query_BHND: Tensor, key_BHMD: Tensor) -> None:
        """Pool one layer, given its scaled logits QKᵀ/√d, their softmax in float32, its queries and its keys."""
        weights_B1M = self.weights_B1M
        soft, attribution = logsumexp_pooling(attn_BHNM, self.scale, self.normalise)
        pooled: dict[str, Callable[[], Tensor]] = {
            "logsumexp": lambda: over_tokens(soft, weights_B1M),
            "maximum": lambda: over_tokens(maximum_pooling(attn_BHNM), weights_B1M),
            "cosine": lambda: over_tokens(cosine_pooling(query_BHND.float(), key_BHMD.float()), weights_B1M),
            "logits": lambda: logits_pooling(logits_BHNM.float(), attn_BHNM),
        }
        self.pooled.append(torch.stack([pooled[name]() for name in self.poolings]))
        self.attribution.append(over_tokens(attribution, weights_B1M))
        if self.maps is not None:
            self.maps.append(attn_BHNM)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Return pooled attention [B, P, L, H] and attribution [B, L, H].

        Layers with fewer heads than others, as in Stable Diffusion 2, are padded with zeros; the attribution of an
        actual head is never zero.
        """
        heads = max(layer.shape[-1] for layer in self.attribution)

        def pad(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, heads - x.shape[-1]))

        pooled = torch.stack([pad(layer) for layer in self.pooled])  # [L, P, B, H]
        return pooled.permute(2, 1, 0, 3), torch.stack([pad(layer) for layer in self.attribution], 1)


class AttentionState(threading.local):
    """What the processors of one U-Net need for this thread's current pass; `during` sets it."""

    capture: Capture | None = None
    prompt: BoundPrompt | None = None
    text_index_B: Tensor | None = None


class CrossAttentionProcessor:
    """The processor of one cross-attention layer; without capture or prompt it calls the same kernel as diffusers."""

    def __init__(self, layer: int, state: AttentionState) -> None:
        self.layer, self.state = layer, state

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        text, index_B = encoder_hidden_states, self.state.text_index_B
        key, value = attn.to_k(text), attn.to_v(text)
        if index_B is not None:
            key, value = key[index_B], value[index_B]
        if self.state.prompt is not None:
            text_BMD = text if index_B is None else text[index_B]
            # A prompt is float32, whatever the dtype of the U-Net.
            add_key, add_value = self.state.prompt(self.layer, text_BMD.float())
            key, value = key + add_key.to(key.dtype), value + add_value.to(value.dtype)
        projected = (attn.to_q(hidden_states), key, value)
        query_BHND, key_BHMD, value_BHMD = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        if self.state.capture is None:
            mixed = torch.nn.functional.scaled_dot_product_attention(query_BHND, key_BHMD, value_BHMD, scale=attn.scale)
        else:
            if attn.upcast_attention:  # in Stable Diffusion 2.1, whose logits overflow float16
                query_BHND, key_BHMD = query_BHND.float(), key_BHMD.float()
            # Scale the keys: there are fewer text tokens than image tokens.
            logits_BHNM = query_BHND @ (key_BHMD * attn.scale).transpose(-1, -2)
            attn_BHNM = logits_BHNM.softmax(-1, dtype=torch.float32)
            self.state.capture.add(logits_BHNM, attn_BHNM, query_BHND, key_BHMD)
            mixed = attn_BHNM.to(value_BHMD.dtype) @ value_BHMD
        out = attn.to_out[0](mixed.transpose(1, 2).flatten(-2))
        return attn.to_out[1](out)


class SelfAttentionProcessor:
    """The processor of one self-attention layer with the kernel `fused`, of queries, keys and values [B, N, H, D]."""

    def __init__(self, fused: Callable[..., Tensor]) -> None:
        self.fused = fused

    def __call__(self, attn: Attention, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        projections = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in projections)
        out = attn.to_out[0](self.fused(query, key, value, scale=attn.scale).flatten(-2))
        return attn.to_out[1](out)


def _xformers(unet: UNet2DConditionModel) -> None:
    """Install the kernel of xformers after a trial call: it can be imported where it cannot run."""
    weight, layers = unet.conv_in.weight, [module for _, module in attention_layers(unet, "attn1")]
    try:
        from xformers.ops import memory_efficient_attention

        for heads, inner in sorted({(layer.heads, layer.to_q.out_features) for layer in layers}):
            tokens_BNHD = weight.new_zeros(1, 8, heads, inner // heads)
            memory_efficient_attention(tokens_BNHD, tokens_BNHD, tokens_BNHD)
    except ImportError:
        remedy = "install the extra `gpu`, or use sdpa"
        raise CheckpointError(f"runtime.attention: xformers is not installed; {remedy}") from None
    except (NotImplementedError, RuntimeError) as error:
        place = f"{weight.device.type} in {str(weight.dtype).removeprefix('torch.')}"
        reason = brief(error, 80)
        raise CheckpointError(f"runtime.attention: xformers cannot run on {place}; use sdpa ({reason})") from None
    for layer in layers:
        layer.set_processor(SelfAttentionProcessor(memory_efficient_attention))


def attention_layers(unet: UNet2DConditionModel, kind: str) -> list[tuple[str, Attention]]:
    """Return names and layers of self-attention ("attn1") or cross-attention ("attn2"), in forward-pass order."""
    from diffusers.models.attention_processor import Attention  # takes seconds

    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    attention = ((name, module) for name, module in unet.named_modules() if isinstance(module, Attention))
    layers = [(name, module) for name, module in attention if name.endswith(f".{kind}")]
    return sorted(layers, key=lambda item: order[item[0].split(".")[0]])  # stable: within a block, by index


def cross_attention_layers(unet: UNet2DConditionModel) -> list[tuple[str, Attention]]:
    """Return names and layers of cross-attention, in forward-pass order."""
    return attention_layers(unet, "attn2")


def install(unet: UNet2DConditionModel, state: AttentionState, backend: str = "sdpa") -> None:
    """Set the processor of every cross-attention layer, all with this state, and the backend of self-attention.

    Raises:
        CheckpointError: the backend is unknown or cannot run here.
    """
    if backend not in ("sdpa", "xformers"):
        raise CheckpointError(f"runtime.attention: {unknown('attention backend', backend, ('sdpa', 'xformers'))}")
    if backend == "xformers":  # sdpa, PyTorch's fused kernel, is the default of diffusers
        _xformers(unet)
    for number, (_, module) in enumerate(cross_attention_layers(unet)):
        module.set_processor(CrossAttentionProcessor(number, state))


@contextmanager
def during(
    state: AttentionState, capture: Capture | None, prompt: BoundPrompt | None, text_index_B: Tensor | None
) -> Iterator[None]:
    """Set capture and prompt for the forward passes of this thread within the block."""
    state.capture, state.prompt, state.text_index_B = capture, prompt, text_index_B
    try:
        yield
    finally:
        state.capture, state.prompt, state.text_index_B = None, None, None
