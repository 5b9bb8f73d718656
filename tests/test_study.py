"""Studies: params with keys changed; pieces run one by one, resumed, and compared with params.yaml."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsd.config import Params, StudyParams
from dsd.data.examples import read_examples
from dsd.errors import ParamsError
from dsd.evaluation.claims import DatasetHits
from dsd.evaluation.evaluate import hits_of
from dsd.experiments import studies
from dsd.experiments.studies import missing_pieces, piece_keys, run_piece
from dsd.experiments.study_results import compare_variants, read_study
from dsd.experiments.variants import Study

DATASET = "scenes-com"


def with_study(params: Params, split: str = "test", methods: tuple[str, ...] = ("dsd",), **variants: object) -> Study:
    row = StudyParams.model_validate(dict(split=split, datasets=(DATASET,), methods=methods, variants=variants))
    return Study("some", params.model_copy(update={"studies": {"some": row}}))


def with_params(study: Study, **sections: object) -> Study:
    return Study(study.name, study.params.model_copy(update=sections))


def test_a_variant_changes_its_keys_and_nothing_else(params: Params) -> None:
    of = with_study(params, small={"prompt.rank": 2, "dataset.sample": 3}).variant("small", DATASET)
    assert of.prompt.rank == 2 and of.datasets[DATASET].sample == 3
    assert list(of.methods) == list(of.training) == ["dsd"] and list(of.datasets) == [DATASET]
    assert of.evidence == params.evidence and of.training["dsd"] == params.training["dsd"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prompt.rnk", 2, r"studies\.some\.variants\.v\.prompt\.rnk: .*did you mean 'rank'"),
        ("dataset.sampel", 2, r"studies\.some\.variants\.v\.dataset\.sampel: .*did you mean 'sample'"),
        ("prompt.rank", 0, r"studies\.some\.variants\.v: prompt\.rank: "),
        ("prompt.rank.deep", 0, r"studies\.some\.variants\.v\.prompt\.rank\.deep: "),
    ],
)
def test_mistakes_are_one_line(params: Params, key: str, value: object, message: str) -> None:
    with pytest.raises(ParamsError, match=message) as error:
        with_study(params, v={key: value}).variant("v", DATASET)
    assert "\n" not in str(error.value)


def test_the_key_is_of_what_ranks_depend_on(params: Params) -> None:
    study = with_study(params, v={"prompt.rank": 2})
    key = study.key("v", DATASET)
    for section, changes in {
        "evaluate": {"resamples": 7},
        "report": {"gallery": 9},
        "runtime": {"batch_size": 3},
        "prompt": {"rank": 5},  # the variant's own
    }.items():
        row = getattr(params, section).model_copy(update=changes)
        assert with_params(study, **{section: row}).key("v", DATASET) == key
    prompt = params.prompt.model_copy(update={"conditional": False})
    assert with_params(study, prompt=prompt).key("v", DATASET) != key
    methods = {name: row for name, row in params.methods.items() if name != "clip-prompt"}
    assert with_params(study, methods=methods).key("v", DATASET) == key


def test_a_variant_with_the_values_of_params_is_in_force(params: Params) -> None:
    same = {"prompt.rank": params.prompt.rank, "training.dsd.epochs": int(params.training["dsd"].epochs)}
    study = with_study(params, same=same, other={"prompt.rank": 3})
    assert study.in_force("same") and not study.in_force("other")


def test_a_piece_is_run_once_and_compared_with_the_unchanged(params: Params, tmp_path: Path) -> None:
    study = with_study(params, plain={}, other={"dataset.sample": 1})
    assert missing_pieces(study, tmp_path) == [("plain", DATASET), ("other", DATASET)]
    run_piece(study, "plain", DATASET, tmp_path, tmp_path / "work")
    assert missing_pieces(study, tmp_path) == [("other", DATASET)]
    run_piece(study, "other", DATASET, tmp_path, tmp_path / "work")
    assert missing_pieces(study, tmp_path) == []
    assert missing_pieces(with_params(study, seed=5), tmp_path) == [("plain", DATASET), ("other", DATASET)]
    results = read_study(tmp_path / "some.json")
    assert list(results) == ["plain", "other"] and not list((tmp_path / "work").glob("*/train"))

    prepared = tmp_path / "work" / data_of(study, "plain") / "prepare"
    examples = read_examples(prepared / "examples.parquet", "test")
    kind, ranks = params.datasets[DATASET].kind, np.array(results["plain"][DATASET]["ranks"]["dsd"].split(), dtype=int)
    answers = {DATASET: DatasetHits(kind, examples, {"dsd": hits_of(kind, examples, ranks)}, {})}
    comparison = compared(study, tmp_path, answers)
    row = comparison["plain"][DATASET]["methods"]["dsd"]["micro"]
    assert row["difference"]["value"] == 0 and {"value", "low", "high", "n"} < set(row)
    # Another few-shot sample is measured on the same test examples.
    assert "difference" in comparison["other"][DATASET]["methods"]["dsd"]["micro"]
    assert comparison["other"][DATASET]["params"] == piece_keys(study, "other", DATASET)["params"]
    assert compared(with_study(params, methods=("denoising",), plain={}), tmp_path, answers) == {}
    fewer = {DATASET: answers[DATASET]._replace(examples=examples[1:])}
    assert "difference" not in compared(study, tmp_path, fewer)["plain"][DATASET]["methods"]["dsd"]["micro"]


def compared(study: Study, folder: Path, answers: dict[str, DatasetHits]) -> dict[str, Any]:
    evaluate, seed = study.params.evaluate, study.params.seed
    return compare_variants(folder / f"{study.name}.json", study.row, answers, evaluate, seed)


def data_of(study: Study, variant: str) -> str:
    of = study.variant(variant, DATASET)
    return studies.digest(of.datasets, of.images, of.seed)[:16]


def test_a_stopped_piece_resumes(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = with_study(params, "validation", plain={})

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(studies, "score", dies)
        with pytest.raises(KeyboardInterrupt):
            run_piece(study, "plain", DATASET, tmp_path, tmp_path / "work")
    (summary,) = (tmp_path / "work").glob("*/train/dsd/summary.json")
    before = summary.stat().st_mtime_ns
    assert missing_pieces(study, tmp_path) == [("plain", DATASET)]
    after: list[int] = []
    monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: after.append(summary.stat().st_mtime_ns))
    run_piece(study, "plain", DATASET, tmp_path, tmp_path / "work")
    assert after == [before]
    entry = json.loads((tmp_path / "some.json").read_text())["plain"][DATASET]
    assert len(entry["ranks"]["dsd"].split()) == entry["metrics"]["dsd"]["micro"]["n"]


def test_a_study_without_a_prompt_trains_none(params: Params, tmp_path: Path) -> None:
    study = with_study(params, "validation", ("dsd-zero-shot",), λ={"evidence.scale": 5.0})
    run_piece(study, "λ", DATASET, tmp_path, tmp_path / "work")
    assert list(read_study(tmp_path / "some.json")["λ"][DATASET]["ranks"]) == ["dsd-zero-shot"]
