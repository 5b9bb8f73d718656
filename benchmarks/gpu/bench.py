"""What the measurements share: sizes, params, checkpoints that are opened once, and drawn datasets.

Shapes: B rows of a batch, C latent channels, r latent side.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.gpu import published
from benchmarks.gpu.device import Machine
from benchmarks.gpu.records import ROOT
from dsd.config import BackboneParams, ImageParams, Params, load
from dsd.data.draws import Draw
from dsd.data.examples import Pair
from dsd.engine.encodings import Arrays
from dsd.engine.forward import Batch
from dsd.engine.session import Folders, Session
from dsd.estimate import PassCost
from dsd.models import load_diffusion
from dsd.models.stable_diffusion import StableDiffusion
from dsd.scenes.captions import caption, pretraining_scene

if TYPE_CHECKING:
    from dsd.training.loop import Trainer

DATASET = "scenes-com"  # two images, one sentence: the drawn counterpart of ComVG
PARITY = 224  # of ComVG with published checkpoints
EMBEDDED = "embedded"


@dataclass(frozen=True)
class Sizes:
    """How much is measured. Time-boxed loops take `seconds` each; other numbers are counts."""

    tiny: bool
    seconds: float
    matrix: int  # side of the matrices of the measured peak
    examples: int  # whose scores are compared
    examples_per_step: int  # of the training that is compared
    heatmaps: int
    pairs: int  # (image, text) of the synthetic ComVG
    shard: int  # batches
    profiled: int  # batches
    images: int  # encoded at once
    texts: int  # encoded at once
    batches: Mapping[str, tuple[int, ...]]  # by checkpoint; the first is the engine's


REAL = Sizes(
    tiny=False, seconds=2.5, matrix=8192, examples=300, examples_per_step=8, heatmaps=20, pairs=500, shard=6,
    profiled=4, images=16, texts=64, batches={"sd2-base": (96, 32, 8), "sd2.1-v": (32, 8), "sdxl": (16, 4)},
)  # fmt: skip
TINY = Sizes(
    tiny=True, seconds=0.02, matrix=64, examples=3, examples_per_step=1, heatmaps=1, pairs=6, shard=2,
    profiled=2, images=2, texts=2, batches={"sd2-base": (4,), "sdxl": (2,)},
)  # fmt: skip


class Checkpoint(NamedTuple):
    """A published checkpoint with random weights; its VAE and text encoders are opened at their first use."""

    row: BackboneParams
    backbone: StableDiffusion
    seconds: float  # to write it and open its U-Net
    operations: float  # floating-point, of a pass for one image and text


class Bench:
    """The state of a run; everything is opened at its first use."""

    def __init__(self, sizes: Sizes, machine: Machine, folder: Path) -> None:
        """folder: for checkpoints and data, which the caller removes."""
        self.sizes, self.machine, self.folder = sizes, machine, folder
        self.checkpoints: dict[str, Checkpoint] = {}  # that are open
        self.scores: dict[Any, dict[str, list[np.ndarray]]] = {}  # by arithmetic and method: several cases compare them

    @cached_property
    def params(self) -> Params:
        """The project's params, on the machine's device, with its embedded checkpoint wherever the process runs."""
        params = load(ROOT / "params.yaml")
        row = params.backbones[EMBEDDED]
        runtime = params.runtime.model_copy(update={"device": self.machine.device.type, "workers": 1})
        embedded = row.model_copy(update={"source": str(ROOT / row.source)})
        return params.model_copy(
            update={"backbones": {EMBEDDED: embedded}, "backbone": EMBEDDED, "runtime": runtime, "studies": {}}
        )

    def model(self, name: str) -> published.Published:
        model = published.PUBLISHED[name]
        return published.tiny(model) if self.sizes.tiny else model

    def checkpoint(self, name: str) -> Checkpoint:
        """Write a published checkpoint with random weights and open its U-Net, at the first call."""
        if name not in self.checkpoints:
            start, model, folder = time.perf_counter(), self.model(name), self.folder / name
            published.write(model, folder, self.machine.device)
            row = published.row(model, folder)
            backbone = load_diffusion(row, self.machine.device, lazy=True)
            _ = backbone.unet
            seconds = time.perf_counter() - start
            self.checkpoints[name] = Checkpoint(row, backbone, seconds, PassCost.of(row).operations)
        return self.checkpoints[name]

    def backbone(self, name: str) -> StableDiffusion:
        return self.checkpoint(name).backbone

    def batch(self, name: str, size: int) -> Batch:
        """Return a batch on the device, of random latents and as many different texts."""
        backbone = self.backbone(name)
        side = backbone.resolution // backbone.scale
        values = np.random.default_rng(0).standard_normal((size, backbone.latent_channels, side, side), np.float32)

        def latents(ids: Sequence[str]) -> Arrays:
            return {"latents": values[: len(ids)]}

        def texts(distinct: Sequence[str]) -> Arrays:
            encoded = backbone.encode_texts(list(distinct))._asdict()
            return {key: tensor.cpu().numpy() for key, tensor in encoded.items()}

        rows = [(Pair(str(n), text), Draw(0.4, 0)) for n, text in enumerate(captions(size))]
        return Batch.of(rows, backbone.schedule_length, latents, texts).to(self.machine.device)

    def embedded(self, device: str, dtype: str, attention: str) -> Session:
        """Return a session of the embedded checkpoint; all share data and, computed by the first, encodings."""
        row = self.params.backbones[EMBEDDED].model_copy(update={"dtype": dtype})
        runtime = self.params.runtime.model_copy(update={"device": device, "attention": attention})
        methods = {name: method for name, method in self.params.methods.items() if not method.contrastive}
        changed = {"backbones": {EMBEDDED: row}, "runtime": runtime, "methods": methods}
        return self._session(self.params.model_copy(update=changed), EMBEDDED, self.sizes.examples)

    def comvg(self, name: str, *methods: str) -> Session:
        """Return a session of a published checkpoint on the synthetic ComVG, with these rows of `methods`."""
        params, opened, batch = self.params, self.checkpoint(name), self.sizes.batches[name][0]
        params = params.model_copy(
            update={
                "backbones": {name: opened.row},
                "backbone": name,
                "images": ImageParams(
                    resolution=opened.backbone.resolution, parity=PARITY, max_pixels=params.images.max_pixels
                ),
                "methods": {method: params.methods[method] for method in methods},
                "evidence": params.evidence.model_copy(update={"shard": self.sizes.shard * batch}),
                "runtime": params.runtime.model_copy(update={"batch_size": batch}),
            }
        )
        session = self._session(params, f"comvg-{name}", self.sizes.pairs // 2)
        session.backbone = opened.backbone
        return session

    def _session(self, params: Params, name: str, test: int) -> Session:
        """Return a session on scenes-com with this number of test examples, drawn and prepared at the first call."""
        from dsd.datasets import benchmark
        from dsd.datasets.preparation import prepare

        train = 3 * self.sizes.examples_per_step
        size = test + train + 6  # both splits are filled by whole sentences, of three examples each
        row = params.datasets[DATASET].model_copy(
            update={"size": size, "few_shot": train / size, "validation": 0.0, "test": test, "draws_per_level": None}
        )
        params = params.model_copy(update={"datasets": {DATASET: row}})
        home = self.folder / f"data-{params.images.parity}-{test}"
        if not (home / "prepared" / "summary.json").exists():  # written last
            benchmark(row.kind).download(row, seed=params.seed, folder=home / "raw" / DATASET, workers=1)
            prepare(DATASET, row, home / "raw" / DATASET, home / "prepared", images=params.images, seed=params.seed,
                    workers=params.runtime.workers)  # fmt: skip
        return Session(DATASET, params, Folders(home / "prepared", home / f"cache-{name}", home / "train"))


def captions(count: int) -> list[str]:
    """Return different texts about drawn scenes."""
    texts: dict[str, None] = {}
    index = 0
    while len(texts) < count:
        scene, rng = pretraining_scene(0, index)
        texts[caption(scene, rng)] = None
        index += 1
    return list(texts)


def trainer(session: Session, **changes: Any) -> Trainer:
    """Return the training of the attention prompt on a session's few-shot split; changes: of its row of `training`."""
    from dsd.training import LEARNERS
    from dsd.training.loop import Trainer

    training = session.params.training["dsd"].model_copy(update=changes)
    learner = LEARNERS["attention prompt"](session, "dsd")
    return Trainer("dsd", training, session.params.seed, learner, session.examples("train"))
