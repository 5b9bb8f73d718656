"""Heat maps of the method under test.

Shapes: R image side, M words.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsd.config import Params

if TYPE_CHECKING:
    from dsd.matcher import Heatmap, Matcher


class HeatMaps:
    """Attention maps of the method under test: one backbone, and the attention prompt of each dataset if it has one.

    torch is imported here only, because the leaderboard imports the other modules of this package without it.
    """

    def __init__(self, params: Params, trained: Path) -> None:
        from dsd.models import device_of, load_diffusion

        row, runtime = params.backbones[params.backbone], params.runtime
        self._backbone = load_diffusion(row, device_of(runtime.device), runtime.attention)
        self._params, self._trained = params, trained
        self._matcher = cache(self._open)

    @property
    def digest(self) -> str:
        """The digest of the checkpoint."""
        return str(self._backbone.digest)

    def __call__(self, dataset: str, image: Image.Image, text: str) -> Heatmap:
        return self._matcher(dataset).heatmap(image, text)

    def by_level(self, dataset: str, image: Image.Image, text: str) -> dict[float, Heatmap]:
        """By noise level: the maps, over the decoded noisy latent."""
        return self._matcher(dataset).heatmaps(image, text)

    def _open(self, dataset: str) -> Matcher:
        from dsd.matcher import Matcher
        from dsd.models.prompts import PROMPT, AttentionPrompt

        name = self._params.under_test
        method, prompt = self._params.methods[name], None
        if method.prompt == "few-shot":
            prompt = AttentionPrompt.load(self._trained / dataset / name / PROMPT, self._backbone.digest)
        return Matcher(
            self._backbone,
            prompt,
            "cross-attention",
            self._params.noise.model_copy(update={"levels": method.levels}),
            self._params.evidence,
            parity=None,  # prepared images are resized already
            batch_size=self._params.runtime.batch_size,
            seed=self._params.seed,
        )


# Anchors of the colour map cividis, from low to high: the same lightness for every kind of colour vision.
CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838")
LEVELS = 32  # colours of a map: few make a small file


def coloured(map_RR: NDArray[np.float32]) -> Image.Image:
    """A heat map [R, R] in 0…1 as an image in the colours of `CIVIDIS`, at most 32 pixels a side."""
    anchors = np.array([[int(colour[n : n + 2], 16) for n in (1, 3, 5)] for colour in CIVIDIS])
    places = np.linspace(0, len(CIVIDIS) - 1, LEVELS)
    palette = np.stack([np.interp(places, np.arange(len(CIVIDIS)), anchors[:, n]) for n in range(3)], -1)
    side = min(32, len(map_RR))
    small = Image.fromarray(map_RR.astype(np.float32)).resize((side, side), Image.Resampling.BOX)
    image = Image.fromarray((np.array(small).clip(0, 1) * (LEVELS - 1)).round().astype(np.uint8), "L")
    image.putpalette(palette.round().astype(np.uint8).tobytes())
    return image
