# ruff: noqa: E501 (line breaks of the template are those of the card)
"""Model cards of the embedded checkpoints, with numbers from their training curves and an evaluation.

The text of the cards is part of the frozen outputs in models/.
"""

from __future__ import annotations

import csv
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from jinja2 import Template
from PIL import Image
from safetensors import safe_open

from dsd.config import Params, PretrainParams
from dsd.datasets import benchmark
from dsd.datasets.preparation import prepare
from dsd.engine.cache import encode
from dsd.engine.score import score
from dsd.engine.session import Folders, Session
from dsd.evaluation.evaluate import Results, ScoredSplit, evaluate
from dsd.scenes.captions import caption, pretraining_scene

CARD = Template(
    """---
license: mit
library_name: {{ library }}
---
# {{ title }}

{{ about }}

**Data.** {{ "{:,}".format(pretrain.size) }} scenes drawn by `dsd.scenes` (seed {{ pretrain.seed }}), {{ pretrain.captions }} true
texts each: relations, lists, referring expressions, and questions with their answers. Half of the pictures pass through
the parity resizing ({{ pretrain.parity }} pixels). The pictures of the benchmarks have other seeds.

**Recipe.** `python -m flows.stages.pretrain` with the section `pretrain` of params.yaml; curves in `curve-*.csv`; stored as float16.

| training | steps | batch | loss at the end |
|---|---|---|---|
{% for name, fit, loss in curves -%}
| {{ name }} | {{ fit.steps }} | {{ fit.batch }} | {{ "%.4f" | format(loss) }} |
{% endfor %}
| component | parameters |
|---|---|
{% for name, count in components -%}
| {{ name }} | {{ "{:,}".format(count) }} |
{% endfor %}
**Measured**, zero-shot, on scenes-com of another seed than the test set's (chance is 50 %; 95 % clustered bootstrap):

| method | slot | accuracy | interval | n |
|---|---|---|---|---|
{% for method, metrics in quality.items() %}{% for slot, v in metrics.items() -%}
| {{ method }} | {{ slot }} | {{ "%.1f" | format(100 * v.value) }} % | {{ "%.1f" | format(100 * v.low) }} to {{ "%.1f" | format(100 * v.high) }} % | {{ v.n }} |
{% endfor %}{% endfor %}
**Limits.** It knows this world and no other: 12 shapes, 8 colours, 7 relations, a few sentence forms.
{% if samples %}
![pictures generated for unseen captions](samples.png)

{% for text in samples %}{{ loop.index }}. {{ text }}
{% endfor %}{% endif %}""",
    trim_blocks=False,
    keep_trailing_newline=True,
)

DIFFUSION = (
    "embedded", "Embedded latent diffusion model", "diffusers", ("autoencoder", "diffusion"), ("dsd-zero-shot", "denoising"),
    "A small text-to-image latent diffusion model with the component classes of Stable Diffusion.",
)  # fmt: skip
CONTRASTIVE = (
    "embedded-clip", "Embedded CLIP", "transformers", ("clip",), ("clip-zero-shot",),
    "A small CLIP, trained on the very pictures and texts of the embedded diffusion model.",
)  # fmt: skip


def quality(params: Params, target: Path) -> Results:
    """Zero-shot accuracy of the checkpoints under target, on scenes-com with another seed than that of the test set."""
    backbones = {
        name: row.model_copy(update={"source": str(target / name)}) if (target / name).is_dir() else row
        for name, row in params.backbones.items()
    }
    methods = {name: method for name, method in params.methods.items() if method.zero_shot}
    name = "scenes-com"
    row = params.datasets[name].model_copy(update={"test": 300})
    changes = {"backbones": backbones, "methods": methods, "datasets": {name: row}, "seed": params.seed + 1}
    params = params.model_copy(update=changes)
    with TemporaryDirectory() as folder:
        raw, prepared, cached, scored = (Path(folder) / part for part in ("raw", "prepared", "cached", "scored"))
        benchmark(row.kind).download(row, seed=params.seed, folder=raw, workers=params.runtime.workers)
        prepare(name, row, raw, prepared, images=params.images, seed=params.seed, workers=params.runtime.workers)
        session = Session(name, params, Folders(prepared, cached, cached))
        encode(session)
        score(session, scored, split="test")
        split = ScoredSplit.of(name, params, prepared, scored)
        return evaluate(name, split, params.evaluate, params.seed, Path(folder)).results


def samples(folder: Path, seed: int) -> tuple[Image.Image, list[str]]:
    """A grid of images generated for captions of held-out scenes, six per row, and the captions."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    captions = [caption(*pretraining_scene(seed + 1, index)) for index in range(12)]
    side = int(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(
        captions, height=side, width=side, num_inference_steps=30, guidance_scale=4.0, generator=generator
    ).images
    grid = Image.new("RGB", (6 * 2 * side, 2 * 2 * side), "white")
    for n, image in enumerate(images):
        grid.paste(image.resize((2 * side, 2 * side)), ((n % 6) * 2 * side, (n // 6) * 2 * side))
    return grid, captions


def components(folder: Path) -> list[tuple[str, int]]:
    """Number of parameters by component, from the weight files."""
    counts = []
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "np") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
        counts.append((path.parent.name, sum(int(torch.Size(shape).numel()) for shape in shapes)))
    return counts


def write_cards(settings: PretrainParams, measured: Results, work: Path, target: Path) -> None:
    """Write README.md, the curves and the generated images into each model's folder; `measured` is from `quality`."""
    grid, captions = samples(target / "embedded", settings.seed)
    grid.save(target / "embedded" / "samples.png")
    for folder, title, library, trainings, methods, about in (DIFFUSION, CONTRASTIVE):
        curves = []
        for name in trainings:
            text = (work / f"{name}.csv").read_text()
            (target / folder / f"curve-{name}.csv").write_text(text)
            curves.append((name, getattr(settings, name), float(list(csv.DictReader(text.splitlines()))[-1]["loss"])))
        card = CARD.render(
            title=title, library=library, about=about, pretrain=settings, curves=curves,
            components=components(target / folder), samples=captions if folder == "embedded" else [],
            quality={method: measured[method] for method in methods if method in measured},
        )  # fmt: skip
        (target / folder / "README.md").write_text(card)
