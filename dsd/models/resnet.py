"""The image tower of the smaller CLIPs: a ResNet as OpenAI built it.

Shapes: B batch, P image side in pixels, C channels, S side of a feature map, F width of the tower, H heads,
L positions of a feature map and their mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


class Bottleneck(nn.Module):
    """A residual block with average pooling instead of a stride, in the branch and in the shortcut."""

    def __init__(self, wide: int, narrow: int, stride: int) -> None:
        super().__init__()
        out = 4 * narrow
        self.conv1, self.bn1 = nn.Conv2d(wide, narrow, 1, bias=False), nn.BatchNorm2d(narrow)
        self.conv2, self.bn2 = nn.Conv2d(narrow, narrow, 3, padding=1, bias=False), nn.BatchNorm2d(narrow)
        self.conv3, self.bn3 = nn.Conv2d(narrow, out, 1, bias=False), nn.BatchNorm2d(out)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        changes = stride > 1 or wide != out
        self.downsample = nn.Sequential(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)) if changes else None

    def forward(self, maps_BCSS: Tensor) -> Tensor:
        shortcut = maps_BCSS if self.downsample is None else self.downsample(self.pool(maps_BCSS))
        inner = F.relu(self.bn1(self.conv1(maps_BCSS)))
        inner = F.relu(self.bn2(self.conv2(inner)))
        return F.relu(self.bn3(self.conv3(self.pool(inner))) + shortcut)


def _stage(wide: int, narrow: int, depth: int, *, stride: int) -> nn.Sequential:
    rest = (Bottleneck(4 * narrow, narrow, 1) for _ in range(depth - 1))
    return nn.Sequential(Bottleneck(wide, narrow, stride), *rest)


class AttentionPool(nn.Module):
    """Attention pooling: the mean over all positions is the query; keys and values are the positions and the mean."""

    def __init__(self, side: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.zeros(side**2 + 1, width, dtype=torch.float32))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, maps_BFSS: Tensor) -> Tensor:
        maps_BLF = maps_BFSS.flatten(2).mT
        maps_BLF = torch.cat([maps_BLF.mean(1, keepdim=True), maps_BLF], 1) + self.positional_embedding
        projected = (self.q_proj(maps_BLF[:, :1]), self.k_proj(maps_BLF), self.v_proj(maps_BLF))
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)  # [B, H, L, F / H]
        return F.scaled_dot_product_attention(query, key, value).flatten(1)


class ResNet(nn.Module):
    """CLIP's ResNet (Radford et al. 2021, 2.4) up to its last linear map, which is its projection into the joint space.

    A stem of three convolutions and average pooling, four stages of bottlenecks, and attention pooling.
    """

    def __init__(self, layers: tuple[int, int, int, int], width: int, image_size: int, head_width: int) -> None:
        """`layers` are the bottlenecks of each stage, `width` the channels of the first; F = 32 × width."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(out) for out in (width // 2, width // 2, width))
        self.layer1 = _stage(width, width, layers[0], stride=1)
        self.layer2 = _stage(4 * width, 2 * width, layers[1], stride=2)
        self.layer3 = _stage(8 * width, 4 * width, layers[2], stride=2)
        self.layer4 = _stage(16 * width, 8 * width, layers[3], stride=2)
        self.attnpool = AttentionPool(image_size // 32, 32 * width, 32 * width // head_width)

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Return the features [B, F] of normalised pixels [B, 3, P, P], in the form of transformers' vision models."""
        maps = pixel_values
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            maps = F.relu(norm(conv(maps)))
        maps = F.avg_pool2d(maps, 2)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps = stage(maps)
        return BaseModelOutputWithPooling(pooler_output=self.attnpool(maps))
