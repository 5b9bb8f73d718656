"""Draws: the (noise level, noise seed) at which every compared pair is seen.

A draw's noise depends on the draw alone, so two candidates of one example, and one pair in two batches, see the very
same noise: differences between candidates are paired, and no score depends on batch size or order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dsd.config import NoiseParams

if TYPE_CHECKING:
    from torch import Tensor


class Draw(NamedTuple):
    level: float  # of the noise schedule, in (0, 1): 0 is clean, 1 is pure noise
    seed: int

    def timestep(self, schedule_length: int) -> int:
        return round(self.level * (schedule_length - 1))

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise of one latent, on the CPU so that every device sees the same."""
        import torch  # here, so that whoever only counts draws need not load it

        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))


def draws(noise: NoiseParams, seed: int) -> list[Draw]:
    """`draws_per_level` draws for each level; a draw's seed is made of its level and number, not of its position."""
    return [
        Draw(level, (seed * 1_000_003 + round(level * 1e6)) * 1_009 + number)
        for level in noise.levels
        for number in range(noise.draws_per_level)
    ]
