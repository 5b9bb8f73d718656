"""A dataset, a scorer, a schedule, a backbone family and a learner from outside, each one definition and one entry of
params, run from the download to the report without a change of another file (docs/extending.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dsd.config import (
    DatasetParams,
    MethodParams,
    Params,
    RacesParams,
    ScheduledMethod,
    ScheduleParams,
)
from dsd.config.base import Positive
from dsd.data.draws import Draw
from dsd.datasets import DATASETS, Benchmark
from dsd.datasets.annotations import RawExample, write_annotations
from dsd.datasets.preparation import prepare
from dsd.datasets.protocol import Expected
from dsd.engine.cache import encode
from dsd.engine.score import score, score_raced
from dsd.engine.session import Folders, Session
from dsd.evaluation import ablations, blind, claims
from dsd.evaluation.evaluate import ScoredSplit, evaluate, write_metrics
from dsd.experiments.study_results import write_studies
from dsd.models import families
from dsd.models.prompts import save_learned
from dsd.models.stable_diffusion import StableDiffusion
from dsd.report import build
from dsd.schedules import SCHEDULES
from dsd.schedules.base import Comparison, Course, ScheduleKind, Setting, spread_order
from dsd.schedules.race import RoundState, Schedule, best, mean
from dsd.scorers import SCORERS
from dsd.scorers.base import Scorer, Scores, StoredEvidence
from dsd.training import LEARNERS
from dsd.training.base import Table
from dsd.training.loop import train, trainings

NAME = "stripes"


class StripesDataset(DatasetParams):
    kind: Literal["stripes"]
    size: Positive
    test: Positive


def download(row: StripesDataset, *, seed: int, folder: Path, workers: int) -> None:
    """Images of horizontal or vertical stripes, and which of two texts is right."""
    (folder / "images").mkdir(parents=True)
    examples, texts = [], ("horizontal stripes", "vertical stripes")
    for index in range(row.size):
        pixels = np.zeros((32, 32, 3), np.uint8)
        stripes = pixels if index % 2 == 0 else pixels.transpose(1, 0, 2)
        stripes[:: 2 + index] = 40 + index
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        split: Any = "test" if index < row.test else "validation" if index == row.test else "train"
        id = f"stripes/{seed}/{index}"
        examples.append(RawExample(id, split, (f"{index}.png",), texts, ((0, index % 2),), "all"))
    write_annotations(folder, examples)


STRIPES: Benchmark[StripesDataset] = Benchmark(
    kind="stripes",
    download=download,
    metrics="recall",
    citation="none",
    licence="none needed",
    expected=lambda row: Expected(row.size, row.test, 1, 2),
    remote=lambda name, row: 0,
)


class ContrastMethod(ScheduledMethod):
    """The share of the denoising error that a text removes; trained on nothing, or by the learner below."""

    scorer: Literal["contrast"]
    schedule: str

    compares_unconditional: ClassVar[bool] = True

    @property
    def learns(self) -> str | None:
        return "temperature" if self.prompt == "none" and not self.has_schedule else None


class Contrast(Scorer):
    name = "contrast"

    def scores(self, name: str, method: ContrastMethod, stored: StoredEvidence) -> Scores:
        evidence = stored.evidence(method.prompt)
        return dict(zip(evidence.pairs, (-evidence.error.mean(-1)).tolist(), strict=True))

    def row_values(self, arrays: Any, method: ContrastMethod, poolings: Any) -> np.ndarray:
        return -arrays["error"]


class HalvingSchedule(ScheduleParams):
    kind: Literal["halving"]


class Halving(ScheduleKind):
    """After every draw the better half of the candidates is kept."""

    kind = "halving"

    def course(self, setting: Setting, races: RacesParams, comparison: Comparison) -> Course:
        def keep(state: RoundState) -> Any:
            return best(mean(state), state.kept_C, int(state.kept_C.sum()) // 2)

        return Course(spread_order(races), Schedule(tuple(range(1, races.draws + 1)), keep), None)

    def evaluations(self, setting: Setting, candidates: int, races: RacesParams) -> int:
        return candidates * races.draws


class NegatedFamily(StableDiffusion):
    """Stable Diffusion whose denoiser predicts −ε."""

    family: ClassVar[str] = "negated"

    def predict_noise(self, *arguments: Any, **options: Any) -> Tensor:
        return -super().predict_noise(*arguments, **options)


class TemperatureLearner:
    """One number, by which all scores are multiplied."""

    file = "temperature.safetensors"

    def __init__(self, session: Session, method: str) -> None:
        self.module = nn.Linear(1, 1)
        self._digest = session.backbone.digest

    def scores(self, tables: list[Table], draws: list[Draw]) -> Tensor:
        lengths = [[[float(len(pair.text))] for pair in line] for table in tables for line in table]
        scores: Tensor = self.module(torch.tensor(lengths))
        return scores.view(len(tables), len(tables[0]), -1)

    def save(self, path: Path) -> None:
        save_learned(self.module, path, self._digest)


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(DATASETS, "stripes", STRIPES)
    monkeypatch.setitem(SCORERS, "contrast", Contrast())
    monkeypatch.setitem(SCHEDULES, "halving", Halving())
    monkeypatch.setitem(families(), "negated", NegatedFamily)
    monkeypatch.setitem(LEARNERS, "temperature", TemperatureLearner)
    return


@pytest.fixture(scope="module", autouse=True)
def _forget_the_kinds() -> Iterator[None]:
    """Rows register themselves when their classes are made; other tests must not meet them."""
    yield
    for base, kind in ((DatasetParams, "stripes"), (MethodParams, "contrast"), (ScheduleParams, "halving")):
        del base.kinds[kind]


def test_additions_run_to_the_report(extended: None, params: Params, tmp_path: Path) -> None:
    content = params.model_dump(mode="json")
    content["backbones"]["embedded"]["family"] = "negated"
    content["datasets"] = {
        NAME: {"kind": "stripes", "size": 20, "test": 9, "few_shot": 0.5, "sample": 0, "validation": 0.05}
    }
    content["schedules"]["half"] = {"kind": "halving", "budget": None}
    common = {"scorer": "contrast", "prompt": "none"}
    content["methods"] |= {
        "contrast": {**common, "schedule": "exhaustive", "levels": params.noise.levels},
        "contrast-fast": {**common, "schedule": "half", "levels": params.races.levels},
    }
    content["training"]["contrast"] = content["training"]["clip-finetune"]
    content["races"]["datasets"], content["gate"]["datasets"] = {}, {}
    mine = Params.model_validate(content)

    data = tmp_path / "data"
    folders = Folders.of(data, NAME)
    DATASETS["stripes"].download(mine.datasets[NAME], seed=mine.seed, folder=data / "download" / NAME, workers=1)
    row, images = mine.datasets[NAME], mine.images
    prepare(NAME, row, data / "download" / NAME, folders.prepared, images=images, seed=mine.seed, workers=1)
    session = Session(NAME, mine, folders)
    assert isinstance(session.backbone, NegatedFamily)
    encode(session)
    for training in trainings(mine):
        curve = list(train(session, training))
        assert curve
    assert (folders.trained / "contrast" / "temperature.safetensors").exists()
    score(session, data / "score" / NAME, split="test")
    costs = score_raced(session, data / "races", data / "score" / NAME, split="test")
    assert costs["contrast-fast"] == 2.0  # one draw of two candidates, then one is left

    scored = ScoredSplit.of(NAME, mine, folders.prepared, data / "score" / NAME)
    target = data / "evaluate"
    results, hits = evaluate(NAME, scored, mine.evaluate, mine.seed, target)
    assert {"contrast", "contrast-fast"} <= set(results)
    variants = ablations.ablate(scored, mine.ablations, mine.seed)
    write_metrics({NAME: results}, target)
    baseline = blind.measure(scored.kind, scored.few_shot, scored.examples, hits, {}, mine.evaluate, mine.seed)
    blind.write({NAME: baseline}, target)
    taken = ablations.with_intervals(scored.examples, variants, mine.evaluate, mine.seed)
    ablations.write({NAME: taken}, target)
    answers = {NAME: claims.DatasetHits(scored.kind, scored.examples, hits, variants)}
    claims.write(*claims.judge(mine, answers), {}, target)
    write_studies({}, target)
    text = build(mine, data, data / "report").read_text()
    for word in (NAME, "contrast", "contrast-fast"):
        assert word in text
