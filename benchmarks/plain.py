"""The loop of public implementations: one pair at a time, image and text encoded again for each.

The reference for the speed and the scores of the engine, at the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dsd.config import EvidenceParams
from dsd.data.draws import Draw
from dsd.data.examples import MatchingExample, Pair
from dsd.data.image_table import ImageTable
from dsd.data.images import resize, to_array
from dsd.models.attention import Capture
from dsd.models.stable_diffusion import StableDiffusion


@torch.inference_mode()
def score(
    backbone: StableDiffusion, evidence: EvidenceParams, images: ImageTable, resolution: int,
    examples: Sequence[MatchingExample], draws: Sequence[Draw],
) -> dict[tuple[Pair, Draw], float]:  # fmt: skip
    """The pooled attention, averaged over layers and heads, of every (pair, draw) of the examples."""
    scores = {}
    for example in examples:
        for image in example.images:
            for text in example.texts:
                for draw in draws:
                    resized = to_array(resize(images[image], parity=None, resolution=resolution))
                    latents = backbone.encode_images(np.asarray(resized)[None])
                    words = backbone.encode_texts(["", text])
                    timestep = torch.tensor([draw.timestep(backbone.schedule_length)])
                    noised = backbone.add_noise(latents, draw.noise(tuple(latents.shape[1:]))[None], timestep)
                    # Both halves of classifier-free guidance run, as in a generation pipeline.
                    content = words.content.clone()
                    content[0, 0] = True
                    capture, twice = Capture.of(evidence, content), noised.repeat(2, 1, 1, 1)
                    backbone.predict_noise(twice, timestep.repeat(2), words.hidden, capture=capture)
                    scores[Pair(image, text), draw] = float(capture.stacked()[0][1, 0].mean())
    return scores
