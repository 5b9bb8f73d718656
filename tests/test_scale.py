"""The figures of docs/scale.md equal those of the code and the benchmarks."""

from __future__ import annotations

import json
import math
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

import dsd.estimate
from dsd.config import Params
from dsd.data.draws import draws
from dsd.data.examples import MatchingExample
from dsd.estimate import RATE, TOKENS, PassCost
from dsd.scorers.evidence import plan, requests
from dsd.store import Store
from flows import presets
from tests.conftest import ROOT
from tests.real import TEXT_ENCODER, UNET, VAE

TEXTS = 10  # of an image
PLANNED = 19  # bytes of memory per planned pass: a pair is stored once, its draws are counted
REQUESTS = 19  # to the file system for a shard, from looking for it to reading it


def operations(run: Callable[[], object]) -> float:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def size(count: float) -> str:
    """Bytes, to two digits after the point at most."""
    unit = next(unit for unit in ("TB", "GB", "MB") if count >= {"TB": 1e12, "GB": 1e9, "MB": 1e6}[unit])
    return f"{count / {'TB': 1e12, 'GB': 1e9, 'MB': 1e6}[unit]:.1f} {unit}"


def test_the_table_is_what_the_code_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(dsd.estimate, "component_config", lambda row, component: UNET)
    _, params = presets.applied(Path("presets/paper-refcocog-sd2.yaml"))
    unet, count = PassCost.of(params.backbones[params.backbone]), len(draws(params.noise, params.seed))
    with torch.device("meta"):
        vae, encoder = AutoencoderKL(**VAE), CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
    image = operations(lambda: vae.encode(torch.empty(1, 3, 512, 512)))
    text = operations(lambda: encoder(torch.zeros(1, TOKENS, dtype=torch.long)))

    def column(pairs: int) -> list[str]:
        passes, images = pairs * count, pairs // TEXTS
        shards = math.ceil(passes / params.evidence.shard)
        encoding = images * image + pairs * text
        return [
            f"{passes:,}",
            f"{passes * unet.operations / RATE / 3600:,.1f} h",
            f"{encoding / RATE / 3600:,.1f} h",
            size(images * unet.latents),
            size(pairs * unet.text),
            size(passes * unet.evidence(len(params.evidence.poolings))),
            f"{shards:,}",
            f"{REQUESTS * shards:,}",
            size(PLANNED * passes),
        ]

    names = ["passes of the U-Net", "their time on one GPU", "time to encode", "latents", "text embeddings", "evidence"]
    names += ["shards of evidence", "requests to their store", "memory of the plan"]
    rows = zip(names, column(10**6), column(10**9), strict=True)
    listed = re.findall(r"^\| [a-z].*$", Path("docs/scale.md").read_text(), re.MULTILINE)
    assert listed == [f"| {' | '.join(row)} |" for row in rows]


def test_memory_of_a_planned_pass(params: Params) -> None:
    examples = [
        MatchingExample(
            str(n), (f"{n:016x}",), tuple(f"the thing {n} and another {t}" for t in range(TEXTS)), (), "all"
        )
        for n in range(500)
    ]
    noise = params.noise.model_copy(update={"levels": (0.2, 0.4, 0.6, 0.8)})
    tracemalloc.start()
    shards = plan(requests(examples, noise, 0, compares=False), "source", 1536)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken / sum(len(shard.rows) for shard in shards) == pytest.approx(PLANNED, rel=0.1)


def test_requests_of_a_shard_to_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(owner: Any, name: str) -> None:
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **more: (calls.append(name), inner(*given, **more))[1])

    for owner, name in [(Path, "read_bytes"), (Path, "stat"), (Path, "unlink"), (os, "replace"), (os, "fsync")]:
        counted(owner, name)
    store, arrays = Store(tmp_path), {"error": np.zeros(3, np.float32)}
    assert "key" not in store  # what is missing?
    assert "key" not in store  # the actor has it to do
    store.write("key", arrays)
    assert "key" in store and store.read("key") is not None  # the stage finds it
    assert store.read("key") is not None  # evaluate
    assert len(calls) == REQUESTS


def test_the_measured_rate_is_that_of_the_docs() -> None:
    """Within a factor of 1.5: measurements vary from day to day."""
    measured = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    (listed,) = re.findall(r"takes ([\d,]+) passes a second", (ROOT / "docs" / "scale.md").read_text())
    passes, rate = 4 * 10**6, float(listed.replace(",", ""))
    assert 2 / 3 < measured["passes_per_second"]["value"] / rate < 3 / 2
    assert f"in {passes / rate / 3600:.1f} h" in (ROOT / "docs" / "scale.md").read_text()
