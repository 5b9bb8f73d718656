"""Draws: the (noise level, noise seed) pairs at which all candidates are evaluated.

The noise depends on the draw alone. Candidates that are compared get the same noise, so their scores differ only by
the pair, and no score depends on batch size or order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dsd.config import NoiseParams
from dsd.config.base import level_number

if TYPE_CHECKING:
    from torch import Tensor


class Draw(NamedTuple):
    level: float  # position in the noise schedule, in (0, 1): 0 is clean, 1 is pure noise
    seed: int

    def timestep(self, schedule_length: int) -> int:
        return round(self.level * (schedule_length - 1))

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise of one latent, generated on the CPU so that it is equal on every device."""
        import torch  # imported here: counting draws does not need torch

        return torch.randn(
            shape, generator=torch.Generator("cpu").manual_seed(self.seed), dtype=torch.float32, device="cpu"
        )


def draws(noise: NoiseParams, seed: int) -> list[Draw]:
    """Return `draws_per_level` draws for each level, each seeded by its level and number, not by its position.

    The numbers of a sample follow those of the sample before it.
    """
    first = noise.sample * noise.draws_per_level
    return [
        Draw(level, (seed * 1_000_003 + level_number(level)) * 1_009 + number)
        for level in noise.levels
        for number in range(first, first + noise.draws_per_level)
    ]
