"""What a reproduction will need: never less than it takes, and what stands against it in a line each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import dsd.estimate
from dsd.config import (
    BackboneParams,
    HierarchicalSchedule,
    Params,
    ScheduleParams,
    ShortlistParams,
    StagedSchedule,
    load,
    noise_of,
)
from dsd.data.examples import read_examples
from dsd.engine.score import prompts
from dsd.estimate import RATE, UNet, disk, needs, passes
from dsd.schedules import SCHEDULES
from dsd.schedules.race import Race
from dsd.scorers.evidence import normalises, requests
from dsd.scorers.fusion import fitting_examples
from flows import cli, presets, terminal
from tests.conftest import ROOT
from tests.raced import few
from tests.real import UNET
from tests.tiny import row


def with_backbone(params: Params, backbone: BackboneParams) -> Params:
    return params.model_copy(update={"backbones": {**params.backbones, "embedded": backbone}})


def configured(folder: Path, **unet: Any) -> BackboneParams:
    """A checkpoint that has its U-Net's configuration and nothing else."""
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(unet))
    return row(folder)


def test_scoring_takes_no_more_passes_than_are_told(params: Params, prepared: Path) -> None:
    examples, noise = read_examples(prepared / "examples.parquet", "test"), noise_of(params, "scenes-com")
    fitting = fitting_examples(params, prepared)
    taken = sum(
        len(requests(some, noise, params.seed, normalises(params.methods, prompt)))
        for prompt in prompts(params)
        for some in (examples, fitting)
    )
    scored, trained = passes("scenes-com", params)
    assert taken <= scored < 3 * taken
    assert trained == 3 * 4 * 3 * 4  # with its gradient, each of four steps of three examples with four pairs


def test_a_configuration_tells_the_cost_of_a_pass(params: Params, tmp_path: Path) -> None:
    real = with_backbone(params, configured(tmp_path / "sd2", **UNET))
    unet = UNet.of(real)
    assert (unet.layers, unet.heads, unet.weights) == (16, 20, 4 * 865_910_724)
    assert unet.operations == pytest.approx(0.804e12, rel=0.001)
    told = {(need.what, need.where): need for need in needs(real, free=10**9)}
    scored, trained = passes("scenes-com", real)
    (time,) = (need.amount for need in told.values() if need.what == "time")
    assert time == pytest.approx((scored + trained) * unet.operations / RATE / 3600)
    evidence = 4 * scored * ((len(real.evidence.poolings) + 1) * 16 * 20 + 1)
    (kept,) = (need.amount for (what, _), need in told.items() if what == "disk")
    examples = 9 + round(0.15 * 60)  # few-shot and validation
    assert kept == evidence + examples * 4 * 77 * 1024 + 2 * examples * 4 * 4 * 64**2
    short = {need.what: need.problem for need in needs(real, free=10**6)}["disk"]
    assert short is not None and short.endswith("GB more than is free")


def test_what_cannot_be_had_is_told_and_the_rest_too(params: Params, tmp_path: Path) -> None:
    found = list(needs(with_backbone(params, row(tmp_path / "absent")), free=10**12))
    assert [need.what for need in found if need.problem] == ["checkpoint embedded", "U-Net"]
    assert {need.problem for need in found} == {None, f"{tmp_path / 'absent'}: no such checkpoint folder"}
    broken = with_backbone(params, configured(tmp_path / "broken", block_out_channels=3))
    (problem,) = (need.problem for need in needs(broken, free=10**12) if need.what == "U-Net")
    assert problem is not None and "unet/config.json makes no U-Net" in problem and "\n" not in problem


def test_texts_that_are_too_many_take_no_disk_and_are_told(params: Params, tmp_path: Path) -> None:
    real = with_backbone(params, configured(tmp_path / "sd2", **UNET))
    unet, count = UNet.of(real), 9 + round(0.15 * 60)  # a text an example
    for kept, there in ((count, True), (count - 1, False)):
        of = real.model_copy(update={"runtime": real.runtime.model_copy(update={"kept_texts": kept})})
        told = [(need.where, need.amount) for need in needs(of, free=10**12) if need.unit == "texts"]
        why = "scenes-com, 0 GB, and more than runtime.kept_texts"
        assert told == ([] if there else [(why, count)])
        without = disk("scenes-com", real, replace(unet, text=0))
        assert disk("scenes-com", of, unet) == without + (count * unet.text if there else 0)


RACES = few(load(ROOT / "params.yaml").races)
SHORTLISTS = st.none() | st.builds(dict, proposer=st.just("clip-zero-shot"), keep=st.integers(1, 20))
BUDGETS = st.none() | st.floats(1, 9)
STAGES = st.integers(1, 3).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 15), min_size=n, max_size=n).map(lambda kept: sorted(kept, reverse=True)),
        st.lists(st.integers(1, 8), min_size=n, max_size=n, unique=True).map(sorted),
    )
)
ROWS = st.one_of(
    st.builds(
        lambda stages, **row: StagedSchedule(kind="staged", to_keep=stages[0], n_samples=stages[1], **row),
        STAGES,
        shortlist=SHORTLISTS,
        budget=BUDGETS,
    ),
    st.builds(
        HierarchicalSchedule,
        kind=st.just("hierarchical"),
        shortlist=SHORTLISTS,
        budget=BUDGETS,
        direction=st.sampled_from(["clean", "noisy", "middle"]),
        samples=st.integers(1, 2),
        beam_factor=st.floats(1, 4),
        patience=st.integers(1, 9),
        shrinking=st.booleans(),
    ),
)


@settings(deadline=None)
@given(ROWS, st.integers(1, 16), st.integers(0, 99))
def test_a_race_takes_no_more_evaluations_than_are_told(row: ScheduleParams, candidates: int, seed: int) -> None:
    rng, course, budget = (
        np.random.default_rng(seed),
        SCHEDULES[row.kind].course_of(row, RACES, {}),
        row.budget and int(row.budget * candidates),
    )
    proposal = rng.normal(size=candidates) if course.proposer else None
    race = Race(candidates, course.schedule, proposal, budget)
    while len(asked := race.next_rows()):
        race.record(rng.normal(size=len(asked)))
    assert race.evaluations <= SCHEDULES[row.kind].evaluations_of(row, candidates, RACES)


@pytest.mark.parametrize(
    ("keep", "budget", "expected"), [(4, None, 4 * 2 + 2 * 6), (None, None, 10 * 2 + 2 * 6), (4, 1.5, 15), (1, None, 8)]
)
def test_stages_cost_what_they_keep(keep: int | None, budget: float | None, expected: int) -> None:
    listed = keep and ShortlistParams(proposer="clip-zero-shot", keep=keep)
    row = StagedSchedule(kind="staged", to_keep=(2, 1), n_samples=(2, 8), shortlist=listed, budget=budget)
    assert SCHEDULES[row.kind].evaluations_of(row, 10, RACES) == expected


def test_a_dry_run_prints_a_table_and_changes_nothing(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = with_backbone(params, row(tmp_path / "absent"))
    monkeypatch.setattr(presets, "applied", lambda preset, commits: (b"", short if "bad" in preset.name else params))
    monkeypatch.setattr(presets, "put", None)
    fine = CliRunner().invoke(cli.app, ["reproduce", "--preset", "good.yaml", "--dry-run"])
    assert fine.exit_code == 0, fine.output
    assert f"{passes('scenes-com', params)[0]:,}" in fine.output and "missing" not in fine.output
    bad = CliRunner().invoke(cli.app, ["reproduce", "--preset", "bad.yaml", "--dry-run"])
    assert bad.exit_code == 1
    assert f"dsd: checkpoint embedded: {tmp_path / 'absent'}: no such checkpoint folder" in bad.output


@pytest.mark.parametrize(("value", "unit", "told"), [(0, "bytes", "0.0 B"), (2.5e9, "bytes", "2.5 GB")])
def test_amounts(value: float, unit: str, told: str) -> None:
    assert terminal.amount(value, unit) == told


def test_the_table_of_presets_is_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(dsd.estimate, "component_config", lambda row, component: UNET)
    told = [line for line in Path("docs/benchmarks.md").read_text().splitlines() if line.startswith("| [")]
    expected = []
    for path in sorted(Path("presets").glob("*.yaml")):
        _, params = presets.applied(path)
        unet, (name,) = UNet.of(params), params.datasets
        scored, trained = passes(name, params)
        hours, kept = (scored + trained) * unet.operations / RATE / 3600, disk(name, params, unet)
        cells = (f"{scored:,}", f"{trained:,}", f"{hours:.1f}", f"{kept / 1e9:.1f}")
        expected.append(f"| [{path.stem}](../presets/{path.name}) | {' | '.join(cells)} |")
    assert told == expected
