"""Render scenes with Pillow: gradient background, shadows, shaded shapes; the image depends only on the scene."""

from __future__ import annotations

import math
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from dsd.scenes.world import Scene, Thing

SUPERSAMPLING = 2  # shapes are rendered at this multiple and averaged down, for smooth edges

_PALETTE = {
    "red": (214, 40, 46), "orange": (243, 136, 28), "yellow": (247, 211, 54), "green": (46, 150, 70),
    "blue": (38, 92, 208), "purple": (128, 54, 170), "pink": (246, 130, 182), "brown": (118, 72, 42),
}  # fmt: skip
_BACKGROUND = {
    "sand": (236, 226, 206), "sky": (208, 224, 238), "mint": (210, 234, 220),
    "lilac": (226, 216, 236), "stone": (214, 214, 212), "paper": (246, 244, 240),
}  # fmt: skip

Point = tuple[float, float]


def _arc(radius: float, start: float, end: float, centre: Point = (0.0, 0.0), steps: int = 40) -> list[Point]:
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _regular(points: int, inner: float | None = None) -> list[Point]:
    count = points if inner is None else 2 * points
    radii = [1.0 if inner is None or i % 2 == 0 else inner for i in range(count)]
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[Point]:
    angles = [2 * math.pi * i / 60 for i in range(60)]
    curve = [
        (
            16 * math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)),
        )
        for a in angles
    ]
    return [(x / 17.5, (y + 2) / 17.5) for x, y in curve]


def _flower() -> list[Point]:
    angles = [2 * math.pi * i / 120 for i in range(120)]
    return [
        ((0.72 + 0.28 * math.cos(5 * a)) * math.cos(a), (0.72 + 0.28 * math.cos(5 * a)) * math.sin(a)) for a in angles
    ]


@lru_cache(maxsize=1)
def outlines() -> dict[str, list[Point]]:
    """Return each shape as one closed polygon in the unit circle (the two circles of a ring are joined by a seam)."""
    w = 0.34
    return {
        "circle": _arc(0.92, 0, 360),
        "square": [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)],
        "triangle": _regular(3),
        "star": _regular(5, inner=0.42),
        "heart": _heart(),
        "cross": [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w),
                  (-w, -w)],
        "ring": _arc(0.96, 0, 360) + _arc(0.52, 360, 0),
        "crescent": _arc(0.96, 50, 310) + _arc(0.77, 287, 73, centre=(0.38, 0.0)),
        "diamond": [(0, -1), (0.58, 0), (0, 1), (-0.58, 0)],
        "arrow": [(-0.95, -0.28), (0.05, -0.28), (0.05, -0.75), (0.98, 0), (0.05, 0.75), (0.05, 0.28), (-0.95, 0.28)],
        "flower": _flower(),
        "bolt": [(0.2, -1), (-0.62, 0.15), (-0.08, 0.15), (-0.25, 1), (0.62, -0.25), (0.08, -0.25), (0.5, -1)],
    }  # fmt: skip


def _polygon(thing: Thing, scale: float, shift: float = 0.0) -> list[Point]:
    cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    return [
        (
            scale * (thing.x + shift + thing.size * (x * cos - y * sin)),
            scale * (thing.y + shift + thing.size * (x * sin + y * cos)),
        )
        for x, y in outlines()[thing.noun.shape]
    ]


def _background(scene: Scene, side: int) -> Image.Image:
    """Render a gradient with a little noise."""
    rng = Random(f"background/{scene.seed}")
    base = np.array(_BACKGROUND[scene.background], np.float32) + rng.uniform(-8, 8)
    slope_x, slope_y = rng.uniform(-14, 14), rng.uniform(-14, 14)
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0, 2.0, (side, side, 1)).astype(np.float32)
    ramp = (slope_x * axis[None, :] + slope_y * axis[:, None])[..., None]
    return Image.fromarray(np.clip(base + ramp + grain, 0, 255).astype(np.uint8))


def _tint(colour: tuple[int, int, int], amount: float) -> tuple[int, ...]:
    return tuple(int(max(0, min(255, channel + amount))) for channel in colour)


def render(scene: Scene, side: int) -> Image.Image:
    """Render a scene as an RGB image of side × side pixels."""
    scale = side * SUPERSAMPLING
    image = _background(scene, side).resize((scale, scale), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image, "RGBA")
    rng = Random(f"shading/{scene.seed}")
    for thing in scene.things:
        colour = _tint(_PALETTE[thing.noun.colour], rng.uniform(-14, 14))
        draw.polygon(_polygon(thing, scale, shift=0.012), fill=(30, 30, 40, 70))
        # The outline of a ring would show its seam.
        edge = colour if thing.noun.shape == "ring" else _tint(_PALETTE[thing.noun.colour], -55)
        draw.polygon(_polygon(thing, scale), fill=(*colour, 255), outline=(*edge, 255))
    return image.resize((side, side), Image.Resampling.BOX)
