"""The engine that the benchmarks share, over the prepared scenes-com of this workspace."""

from __future__ import annotations

from pathlib import Path

from dsd.config import Params
from dsd.data.image_table import ImageTable
from dsd.engine.encodings import all_texts, diffusion_encodings, read_all
from dsd.engine.engine import Engine
from dsd.models import device_of, load_diffusion
from dsd.store import Store

PREPARED = Path("data/prepare/scenes-com")


def engine_over(params: Params, cache: Path) -> Engine:
    row, runtime = params.backbones[params.backbone], params.runtime
    backbone = load_diffusion(row, device_of(runtime.device), runtime.attention)
    texts = all_texts(read_all(PREPARED))  # as in the stage `cache`, so that its folder is read and never changed
    images, most = ImageTable(PREPARED / "images.parquet"), runtime.kept_texts
    tables = diffusion_encodings(backbone, images, texts, params.images.resolution, Store(cache), most)
    return Engine(backbone, None, params.evidence, *tables, params.runtime.batch_size)
