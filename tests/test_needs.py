"""Estimates of what a reproduction needs: never less than it takes, and one line for each obstacle."""

from __future__ import annotations

import json
import re
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
    FolderDataset,
    HierarchicalSchedule,
    Params,
    ScheduleParams,
    ShortlistParams,
    StagedSchedule,
    assign,
    load,
)
from dsd.data.examples import read_examples
from dsd.errors import DataError, ParamsError
from dsd.estimate import RATE, PassCost, Workload, check, needs
from dsd.schedules import SCHEDULES
from dsd.schedules.race import Race
from dsd.scorers.evidence import evidence_prompts, reads_unconditional, requests
from dsd.scorers.fusion import fitting_examples
from flows import cli, presets, terminal
from tests.conftest import ROOT, read_settings
from tests.raced import few
from tests.real import UNET
from tests.tiny import row


def with_backbone(params: Params, backbone: BackboneParams) -> Params:
    return params.model_copy(update={"backbones": {**params.backbones, "embedded": backbone}})


def configured(folder: Path, **unet: Any) -> BackboneParams:
    """A checkpoint with nothing but the configuration of its U-Net."""
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(unet))
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8, 8, 8, 8]}))
    return row(folder)


def test_scoring_takes_no_more_passes_than_estimated(params: Params, prepared: Path) -> None:
    few_shot, examples = (read_examples(prepared / "examples.parquet", split) for split in ("train", "test"))
    noise = params.noise_of("scenes-com")
    fitting = fitting_examples(few_shot, params.methods, params.fusion, params.seed)
    taken = sum(
        len(requests(some, noise, params.seed, reads_unconditional(params.methods, prompt)))
        for prompt in evidence_prompts(params.methods)
        for some in (examples, *fitting)
    )
    work = Workload("scenes-com", params)
    assert taken <= work.scoring < 3 * taken
    # Four steps of three examples with four pairs: forward, backward as two, and forward again: no batch has 12 rows.
    # As much again for the prompts of the two folds.
    assert params.runtime.batch_size < 12 and work.training == 2 * 4 * 4 * 3 * 4


def test_the_cost_of_a_pass_follows_from_the_configuration(params: Params, tmp_path: Path) -> None:
    real = with_backbone(params, configured(tmp_path / "sd2", **UNET))
    unet = PassCost.of(real.backbones["embedded"])
    assert (unet.layers, unet.heads, unet.weights) == (16, 20, 4 * 865_910_724)
    assert unet.operations == pytest.approx(0.804e12, rel=0.001)
    listed = {(need.what, need.where): need for need in needs(real, free=10**9)}
    work = Workload("scenes-com", real)
    (time,) = (need.amount for need in listed.values() if need.what == "time")
    assert time == pytest.approx((work.scoring + work.training) * unet.operations / RATE / 3600)
    evidence = 4 * work.scoring * ((len(real.evidence.poolings) + 1) * 16 * 20 + 1)
    (kept,) = (need.amount for (what, _), need in listed.items() if what == "disk")
    examples = 9 + round(0.15 * 60)  # few-shot and validation
    assert kept == evidence + examples * 4 * 77 * 1024 + 2 * examples * 4 * 4 * 64**2
    short = {need.what: need.problem for need in needs(real, free=10**6)}["disk"]
    assert short is not None and short.endswith("GB more than is free")


def test_an_unavailable_checkpoint_is_reported_with_all_other_needs(params: Params, tmp_path: Path) -> None:
    found = list(needs(with_backbone(params, row(tmp_path / "absent")), free=10**12))
    assert [need.what for need in found if need.problem] == ["checkpoint embedded", "settings"]
    assert {need.problem for need in found} == {None, f"{tmp_path / 'absent'}: no such checkpoint folder"}
    broken = with_backbone(params, configured(tmp_path / "broken", block_out_channels=3))
    (problem,) = (need.problem for need in needs(broken, free=10**12) if need.what == "settings")
    assert problem is not None and "unet/config.json is no valid U-Net" in problem and "\n" not in problem


def test_texts_beyond_the_limit_take_no_disk_and_are_reported(params: Params, tmp_path: Path) -> None:
    real = with_backbone(params, configured(tmp_path / "sd2", **UNET))
    unet, count = PassCost.of(real.backbones["embedded"]), 9 + round(0.15 * 60)  # a text an example
    for kept, there in ((count, True), (count - 1, False)):
        of = real.model_copy(update={"runtime": real.runtime.model_copy(update={"kept_texts": kept})})
        reported = [(need.where, need.amount) for need in needs(of, free=10**12) if need.unit == "texts"]
        why = "scenes-com, 0 GB, and more than runtime.kept_texts"
        assert reported == ([] if there else [(why, count)])
        without = Workload("scenes-com", real).disk(replace(unet, text=0))
        assert Workload("scenes-com", of).disk(unet) == without + (count * unet.text if there else 0)


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
        reading=st.sampled_from(["text", "listing"]),
        shrinking=st.booleans(),
    ),
)


@settings(deadline=None)
@given(ROWS, st.integers(1, 16), st.integers(0, 99))
def test_a_race_takes_no_more_evaluations_than_estimated(row: ScheduleParams, candidates: int, seed: int) -> None:
    rng, course, budget = (
        np.random.default_rng(seed),
        SCHEDULES[row.kind].course_of(row, RACES, {}),
        row.budget and int(row.budget * candidates),
    )
    proposal = rng.normal(size=candidates) if course.proposer else None
    race = Race(candidates, course.schedule, proposal, budget)
    while len(rows := race.next_rows()):
        race.record(rng.normal(size=len(rows)))
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
    assert f"{Workload('scenes-com', params).scoring:,}" in fine.output and "missing" not in fine.output
    bad = CliRunner().invoke(cli.app, ["reproduce", "--preset", "bad.yaml", "--dry-run"])
    assert bad.exit_code == 1
    assert f"dsd: checkpoint embedded: {tmp_path / 'absent'}: no such checkpoint folder" in bad.output


@pytest.mark.parametrize(("value", "unit", "expected"), [(0, "bytes", "0.0 B"), (2.5e9, "bytes", "2.5 GB")])
def test_amounts(value: float, unit: str, expected: str) -> None:
    assert terminal.amount(value, unit) == expected


def test_the_table_of_presets_is_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(dsd.estimate, "component_config", lambda row, component: UNET)
    listed = [line for line in Path("docs/benchmarks.md").read_text().splitlines() if line.startswith("| [")]
    expected, unets = [], dict[str, PassCost]()
    for path in sorted({*Path("presets").glob("*.yaml")} - {Path("presets/own-folder.yaml")}):
        _, params = presets.applied(path)
        tested, (name,) = params.backbones[params.backbone], params.datasets
        if tested.dtype not in unets:  # all have the same configuration here
            unets[tested.dtype] = PassCost.of(tested)
        unet, work = unets[tested.dtype], Workload(name, params)
        hours = (work.scoring + work.training) * unet.operations / RATE / 3600
        cells = (f"{work.scoring:,}", f"{work.training:,}", f"{hours:.1f}", f"{work.disk(unet) / 1e9:.1f}")
        expected.append(f"| [{path.stem}](../presets/{path.name}) | {' | '.join(cells)} |")
    assert listed == expected


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"methods.dsd.layers": 99}, "methods.dsd.layers: 99, but backbone embedded has 11 layers of cross-attention"),
        ({"ablations.layers": [12]}, "ablations.layers: 12, but backbone embedded has 11 layers of cross-attention"),
        ({"images.resolution": 60}, "images.resolution: 60, must be a multiple of 8, the VAE's reduction"),
        ({"backbones.embedded.lora": "absent.bin"}, "backbones.embedded.lora: absent.bin: no such file"),
        (
            {"datasets.scenes-com": {"kind": "winoground", "source": "a/b", "revision": None, "few_shot": 0.5,
                                     "sample": 0, "validation": 0, "test": None, "missing": 0,
                                     "files": {"train": None, "test": "*.parquet"}}},
            "datasets.scenes-com.few_shot: 0.5 leaves no example, but dsd is trained on them",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_run_are_refused_before_anything_is_touched(
    changes: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sections = read_settings()
    for key, value in changes.items():
        assign(sections, key.split("."), value, key)
    params = Params.model_validate(sections)
    with pytest.raises(ParamsError) as error:
        check(params)
    assert str(error.value) == line
    assert [need.problem for need in needs(params, free=10**15) if need.what == "settings"] == [line]
    preset = tmp_path / "mine.yaml"
    preset.write_text(json.dumps(changes))
    before = (ROOT / "params.yaml").read_bytes()
    with pytest.raises(ParamsError, match=re.escape(line)):
        presets.put(preset, commits=lambda _: [])
    assert (ROOT / "params.yaml").read_bytes() == before


def test_a_folder_that_is_not_there_is_named_with_its_dataset(params: Params) -> None:
    row = FolderDataset(
        kind="folder", source="nowhere", table="t.csv", few_shot=0, sample=0, validation=0, test=None, missing=0
    )
    mine = params.model_copy(update={"datasets": {"own": row}})
    with pytest.raises(ParamsError, match=r"^datasets\.own: source: nowhere is not a folder$"):
        check(mine)
    with pytest.raises(DataError, match=r"^datasets\.own: source: nowhere is not a folder$"):
        list(needs(mine, free=10**12))
