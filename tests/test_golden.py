"""Nothing is silently stale: results that move without a new version of their kind fail here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dsd.config import Params
from dsd.models.stable_diffusion import StableDiffusion
from dsd.versions import INPUTS, VERSIONS, versioned
from tests.golden import FILE, moved, results

RECORDED = json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def computed(params: Params, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return results(params, tmp_path_factory.mktemp("golden"))


def test_every_kind_has_golden_numbers() -> None:
    assert set(RECORDED) == set(VERSIONS)


def test_results_are_those_of_their_version(computed: dict[str, list[float]]) -> None:
    assert set(computed) == set(VERSIONS)
    assert not moved(RECORDED, computed)


def test_a_new_version_asks_for_new_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERSIONS, "evidence", 2)
    numbers = {kind: row["numbers"] for kind, row in RECORDED.items()}
    [line] = moved(RECORDED, numbers)
    assert line.startswith("evidence: recorded for version 1, the code is 2")


def pooling(patch: pytest.MonkeyPatch) -> None:
    from dsd.models import attention

    whole = attention.logsumexp_pooling

    def other(*arguments: Any) -> Any:
        pooled, attribution = whole(*arguments)
        return pooled * 1.01, attribution

    patch.setattr(attention, "logsumexp_pooling", other)


def latents(patch: pytest.MonkeyPatch) -> None:
    whole = StableDiffusion.encode_images
    patch.setattr(StableDiffusion, "encode_images", lambda self, images: whole(self, images) * 1.5)


def training(patch: pytest.MonkeyPatch) -> None:
    from dsd.training import loop

    whole = loop.matching_loss
    patch.setattr(loop, "matching_loss", lambda *arguments: -whole(*arguments))


def noise(patch: pytest.MonkeyPatch) -> None:
    from dsd.data.draws import Draw

    whole = Draw.noise
    patch.setattr(Draw, "noise", lambda self, shape: whole(self, shape).flip(0))


def resizing(patch: pytest.MonkeyPatch) -> None:
    whole = Image.Image.resize
    patch.setattr(Image.Image, "resize", lambda self, size, *_: whole(self, size, Image.Resampling.BILINEAR))


@pytest.mark.parametrize(
    ("edit", "kind"),
    [(pooling, "evidence"), (latents, "latents"), (training, "prompts"), (noise, "evidence"), (resizing, "latents")],
)
def test_an_edit_of_arithmetic_is_noticed(
    edit: Callable[[pytest.MonkeyPatch], None],
    kind: str,
    params: Params,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edit(monkeypatch)
    torch.manual_seed(0)
    [line] = moved(RECORDED, results(params, tmp_path, (kind,)))
    assert line.startswith(f"{kind}: results moved. If that is meant, raise {kind!r} in dsd/versions.py")


def test_a_version_is_part_of_the_keys_of_all_that_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {kind: versioned(kind, "content") for kind in VERSIONS}
    assert set(before.values()) == {"content"}  # version 1 adds nothing: what is stored stays valid
    monkeypatch.setitem(VERSIONS, "evidence", 2)
    changed = {kind for kind in VERSIONS if versioned(kind, "content") != before[kind]}
    assert changed == {"evidence", "prompts", "races", "scores", "studies"}
    second = versioned("evidence", "content")
    monkeypatch.setitem(VERSIONS, "evidence", 3)
    assert versioned("evidence", "content") != second
    monkeypatch.setitem(VERSIONS, "evidence", 1)
    assert {kind: versioned(kind, "content") for kind in VERSIONS} == before  # going back finds what was there
    assert {name for names in INPUTS.values() for name in names} <= set(VERSIONS)
