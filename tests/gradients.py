"""A gradient against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


def check_gradient(value: Callable[[], Tensor], weights: Sequence[Tensor], step: float, rel: float) -> None:
    """The length of the gradient equals the central difference along it; the weights are moved."""
    slopes = torch.autograd.grad(value(), weights)
    length = torch.cat([slope.flatten() for slope in slopes]).norm()
    assert length > 0
    values = []
    with torch.no_grad():
        for move in (step, -2 * step):
            for weight, slope in zip(weights, slopes, strict=True):
                weight += move * slope / length
            values.append(value())
    assert ((values[0] - values[1]) / (2 * step)).item() == pytest.approx(length.item(), rel=rel)
