"""`dsd demo`: a page to try the matcher, built with Gradio. The numbers are those of `Matcher`.

Shapes: I images, T texts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from html import escape
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import numpy as np
import torch
from PIL import Image

from dsd import EMBEDDED
from dsd.arguments import text_list
from dsd.data.images import overlay
from dsd.errors import DsdError, ParamsError
from dsd.live import Standing, standings
from dsd.matcher import METHODS, Matcher
from dsd.scenes.captions import TEMPLATES, sentence
from dsd.scenes.mutation import SLOTS, hard_noun, mutate
from dsd.scenes.render import render
from dsd.scenes.world import PREDICATES, Triplet, random_triplet, sample_scene
from dsd.schedules.hierarchical import hierarchical
from dsd.schedules.race import Schedule

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

LEVELS = (0.2, 0.4, 0.6, 0.8)
# Bounds on what a visitor can ask for, as those of the server in params.yaml.
MAX_IMAGES, MAX_TEXTS, MAX_PIXELS, MAX_BYTES, MAX_WAITING = 8, 64, 16_000_000, "16mb", 16
MAX_PER_LEVEL = 8  # draws
EXAMPLE_SIDE = 256  # of a drawn example
NO_PROMPT, METHOD = "none", "denoising"  # what is chosen at first
STEPS, GUIDANCE, MAX_SEED = 30, 4.0, 2**31 - 1  # of "draw it"
CSS = """
.dsd table {width: 100%; border-collapse: collapse; table-layout: fixed}
.dsd td, .dsd th {padding: 4px 8px !important; border: none !important; overflow-wrap: anywhere; text-align: left}
.dsd .number {text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; width: 6em}
.dsd .bar {background: var(--color-accent); height: 14px; border-radius: 3px; min-width: 1px}
.dsd .dropped {opacity: 0.55}
.dsd .best td:first-child {font-weight: 700}
"""


def exhaustive(levels: int, per_level: int) -> Schedule:
    """Every candidate at every draw, a draw a round, so that the scores are seen as they grow."""
    return Schedule(tuple(range(1, levels * per_level + 1)), lambda state: state.kept_C)


def halving(levels: int, per_level: int) -> Schedule:
    """The hierarchical schedule: half of the candidates are kept at each noise level, from clean to noisy."""
    return hierarchical(levels, per_level, 2, levels * per_level, reading="text", shrinking=True)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"exhaustive": exhaustive, "hierarchical": halving}


class Models(NamedTuple):
    """What a visitor can choose from: checkpoints and prompts by the name that is shown."""

    checkpoints: dict[str, str]
    prompts: dict[str, str]

    @classmethod
    def of(cls, checkpoints: Sequence[str], prompts: Sequence[str]) -> Models:
        return cls(
            {"embedded" if c == str(EMBEDDED) else c: c for c in checkpoints or (str(EMBEDDED),)},
            {p: p for p in prompts},
        )

    def matcher(self, checkpoint: str, method: str, prompt: str, per_level: int) -> Matcher:
        """Open what a visitor chose, unless it is open.

        Raises:
            ParamsError: it is not among the choices.
        """
        if checkpoint not in self.checkpoints or prompt not in (NO_PROMPT, *self.prompts) or method not in METHODS:
            raise ParamsError("the checkpoint, method or prompt is not among the choices")
        return _open(self.checkpoints[checkpoint], method, self.prompts.get(prompt), int(per_level))


@lru_cache(maxsize=1)  # a checkpoint can take gigabytes: the last choice stays in memory
def _open(checkpoint: str, method: str, prompt: str | None, per_level: int) -> Matcher:
    return Matcher.from_pretrained(checkpoint, prompt=prompt, method=method, levels=LEVELS, draws_per_level=per_level)


def example(seed: int) -> tuple[Image.Image, list[str]]:
    """A drawn scene, and a true and three false texts about it."""
    rng = Random(f"demo/{seed}")
    triplet = random_triplet(rng)
    scene = sample_scene(rng, f"demo/{seed}", triplet, distractors=rng.randrange(2))
    false = [mutate(triplet, slot, nouns=hard_noun, predicates=list(PREDICATES), rng=rng) for slot in SLOTS]
    return render(scene, EXAMPLE_SIDE), [sentence(Triplet(*values), TEMPLATES[0]) for values in (triplet, *false)]


def table(texts: Sequence[str], names: Sequence[str], standing: Standing, shares_IT: np.ndarray) -> str:
    """The scores as bars of their softmax shares, in HTML: texts of an image or, with a single text, images."""
    by_image = len(texts) > 1
    blocks = []
    lines = range(len(names)) if by_image else range(1)
    for n in lines:
        cells = [(n, t) for t in range(len(texts))] if by_image else [(i, 0) for i in range(len(names))]
        kept_scores = [standing.scores_IT[cell] for cell in cells if standing.kept_IT[cell]]
        top = max(kept_scores)
        alone = kept_scores.count(top) == 1
        rows = []
        for cell in cells:
            kept = bool(standing.kept_IT[cell])
            best = alone and kept and standing.scores_IT[cell] == top
            share = 100 * shares_IT[cell]
            label = escape(texts[cell[1]] if by_image else names[cell[0]])
            rows.append(
                f'<tr class="{"best" if best else "" if kept else "dropped"}"><td>{label}{" ✓" if best else ""}</td>'
                f'<td><div class="bar" style="width:{share:.1f}%"></div></td>'
                f'<td class="number">{share:.1f} %</td><td class="number">{standing.scores_IT[cell]:.5f}</td></tr>'
            )
        title = escape(names[n] if by_image else texts[0])
        numbers = '<th class="number">share</th><th class="number">score</th>'
        blocks.append(f"<h4>{title}</h4><table><tr><th></th><th></th>{numbers}</tr>{''.join(rows)}</table>")
    spent = f"{standing.evaluations} of {standing.most} passes of the denoiser"
    return f'<div class="dsd"><p>{spent}</p>{"".join(blocks)}</div>'


def match(
    models: Models, files: list[Any] | None, texts: str | None, checkpoint: str, method: str, prompt: str,
    schedule: str, per_level: int | None,
) -> Iterator[tuple[str, list[tuple[Image.Image, str]], str]]:  # fmt: skip
    """Yield (table, heat maps with their words, remarks) as the scores grow; the heat maps come last."""
    paths = [file if isinstance(file, str) else file[0] for file in files or []]
    wanted = [line.strip() for line in (texts or "").splitlines() if line.strip()]
    try:
        if not paths or not wanted:
            raise ParamsError(f"{'an image' if not paths else 'a text'} is missing")
        if len(paths) > MAX_IMAGES or len(wanted) > MAX_TEXTS:
            raise ParamsError(
                f"at most {MAX_IMAGES} images and {MAX_TEXTS} texts, found {len(paths)} and {len(wanted)}"
            )
        if schedule not in SCHEDULES or not (per_level and 1 <= per_level <= MAX_PER_LEVEL):
            raise ParamsError("the schedule or the number of draws is not among the choices")
        wanted = text_list(wanted)
        matcher = models.matcher(checkpoint, method, prompt, per_level)
        pictures = [matcher.picture(path, MAX_PIXELS) for path in paths]
        names, remarks = [f"image {n + 1}" for n in range(len(paths))], "\n\n".join(matcher.remarks(wanted))
        standing = None
        for standing in standings(matcher, pictures, wanted, SCHEDULES[schedule](len(LEVELS), int(per_level))):
            yield table(wanted, names, standing, shares(matcher, standing)), [], remarks
        assert standing is not None
        i, t = np.unravel_index(
            np.where(standing.kept_IT, standing.scores_IT, -np.inf).argmax(), standing.kept_IT.shape
        )
        heatmap = matcher.heatmap_of(pictures[i], wanted[t])
        maps = [
            (overlay(heatmap.picture, map_RR).resize((EXAMPLE_SIDE, EXAMPLE_SIDE), Image.Resampling.BICUBIC), word)
            for word, map_RR in zip(heatmap.words, heatmap.maps, strict=True)
        ]
        yield table(wanted, names, standing, shares(matcher, standing)), maps, remarks
    except DsdError as error:
        raise gr.Error(str(error), title="dsd", print_exception=False) from None


def shares(matcher: Matcher, standing: Standing) -> np.ndarray:
    """The softmax shares [I, T] of the candidates that are left; 0 of the others."""
    scores = torch.from_numpy(standing.scores_IT).float()
    lines, kept = (scores, standing.kept_IT) if scores.shape[1] > 1 else (scores.T, standing.kept_IT.T)
    shares = matcher.shares(lines).numpy() * kept
    shares = shares / shares.sum(1, keepdims=True)
    return shares if scores.shape[1] > 1 else shares.T


@lru_cache(maxsize=1)
def _pipeline(checkpoint: str) -> StableDiffusionPipeline:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, use_safetensors=True, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(models: Models, checkpoint: str, texts: str | None, seed: int | None) -> Image.Image:
    """An image of the first text, sampled from the checkpoint."""
    first = next((line.strip() for line in (texts or "").splitlines() if line.strip()), None)
    try:
        if first is None or seed is None:
            raise ParamsError(f"a {'text' if first is None else 'seed'} is missing")
        [first] = text_list([first])
        if checkpoint not in models.checkpoints:
            raise ParamsError("the checkpoint is not among the choices")
        try:
            pipeline = _pipeline(models.checkpoints[checkpoint])
        except (OSError, ValueError):
            raise ParamsError(
                f"{checkpoint}: images can be drawn with a Stable Diffusion 1 or 2 in the diffusers layout"
            ) from None
    except DsdError as error:
        raise gr.Error(str(error), title="dsd", print_exception=False) from None
    side = int(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
    generator = torch.Generator("cpu").manual_seed(int(seed) % MAX_SEED)
    drawn = pipeline(
        first, height=side, width=side, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator
    )
    return drawn.images[0].resize((EXAMPLE_SIDE, EXAMPLE_SIDE))


def build(checkpoints: Sequence[str] = (), prompts: Sequence[str] = ()) -> gr.Blocks:
    """Return the page; visitors choose from these checkpoints and prompts."""
    models = Models.of(checkpoints, prompts)
    image, texts = example(0)
    with gr.Blocks(title="dsd: image-text matching", analytics_enabled=False) as page:
        gr.Markdown(
            "# Does this image match this text?\n"
            "A text-to-image diffusion model answers: a text scores high if it helps the model to explain the image."
        )
        with gr.Row():
            with gr.Column():
                images = gr.Gallery(
                    [image], label="Images: drop one or several", interactive=True, columns=3, height=260, format="png",
                    type="filepath", file_types=["image"], object_fit="contain",
                )  # fmt: skip
                text = gr.Textbox("\n".join(texts), label="Texts, one in each line", lines=5, max_lines=12)
                with gr.Row():
                    button = gr.Button("Match", variant="primary")
                    another = gr.Button("Another drawn example")
                with gr.Accordion("Settings", open=False):
                    checkpoint = gr.Dropdown(
                        list(models.checkpoints), value=next(iter(models.checkpoints)), label="Checkpoint"
                    )
                    method = gr.Radio(list(METHODS), value=METHOD, label="Method")
                    prompt = gr.Dropdown(
                        [NO_PROMPT, *models.prompts], value=NO_PROMPT, label="Trained prompt, for cross-attention",
                    )  # fmt: skip
                    schedule = gr.Radio(list(SCHEDULES), value="exhaustive", label="Schedule")
                    per_level = gr.Slider(1, MAX_PER_LEVEL, 1, step=1, label="Draws at each of the 4 noise levels")
            with gr.Column():
                result = gr.HTML(label="Scores", min_height=120)
                remarks = gr.Markdown()
                maps = gr.Gallery(label="Where each word of the best match looks", columns=4, height=300, format="png")
                with gr.Accordion("Draw it", open=False):
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                    drawing = gr.Button("Draw the first text")
                    drawn = gr.Image(
                        label="Drawn by the checkpoint", height=EXAMPLE_SIDE, format="png", interactive=False
                    )
        number = gr.State(0)

        def next_example(n: int) -> tuple[int, list[Image.Image], str]:
            image, texts = example(n + 1)
            return n + 1, [image], "\n".join(texts)

        settings = [checkpoint, method, prompt, schedule, per_level]
        button.click(partial(match, models), [images, text, *settings], [result, maps, remarks], api_name="match")
        another.click(next_example, [number], [number, images, text], api_name=False)
        drawing.click(partial(draw, models), [checkpoint, text, seed], [drawn], api_name="draw")
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def launch(checkpoints: Sequence[str] = (), prompts: Sequence[str] = (), **address: Any) -> None:
    """Serve the page until it is stopped; address: Gradio's `server_name` and `server_port`, by default its own.

    The first checkpoint is opened and used before, so that the first visitor does not wait for it.
    """
    image, texts = example(0)
    models = Models.of(checkpoints, prompts)
    models.matcher(next(iter(models.checkpoints)), METHOD, NO_PROMPT, 1).score(image, texts)
    build(checkpoints, prompts).launch(
        share=False, quiet=True, max_file_size=MAX_BYTES, css=CSS, theme=THEME, show_error=True, footer_links=[],
        pwa=False, **address,
    )  # fmt: skip


# Fonts of the visitor's system: nothing is fetched.
THEME = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
