"""Studies: params with keys changed, each piece run on its own, resumed, and told beside what it is compared with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dsd.config import Params, StudyParams
from dsd.data.examples import read_examples
from dsd.errors import ParamsError
from dsd.evaluation.claims import Answers
from dsd.evaluation.evaluate import hits_of
from dsd.experiments import studies as study
from dsd.experiments.studies import keys, missing, run
from dsd.experiments.variants import changed, compare, in_force, params_key, read

DATASET = "scenes-com"


def with_study(params: Params, split: str = "test", methods: tuple[str, ...] = ("dsd",), **variants: object) -> Params:
    row = StudyParams.model_validate(dict(split=split, datasets=(DATASET,), methods=methods, variants=variants))
    return params.model_copy(update={"studies": {"some": row}})


def test_a_variant_changes_its_keys_and_nothing_else(params: Params) -> None:
    of = changed(with_study(params, small={"prompt.rank": 2, "dataset.sample": 3}), "some", DATASET, "small")
    assert of.prompt.rank == 2 and of.datasets[DATASET].sample == 3
    assert list(of.methods) == list(of.training) == ["dsd"] and list(of.datasets) == [DATASET]
    assert of.evidence == params.evidence and of.training["dsd"] == params.training["dsd"]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("prompt.rnk", 2, r"studies\.some\.variants\.v\.prompt\.rnk: .*did you mean 'rank'"),
        ("dataset.sampel", 2, r"studies\.some\.variants\.v\.dataset\.sampel: .*did you mean 'sample'"),
        ("prompt.rank", 0, r"studies\.some\.variants\.v: prompt\.rank: "),
        ("prompt.rank.deep", 0, r"studies\.some\.variants\.v\.prompt\.rank\.deep: "),
    ],
)
def test_mistakes_are_one_line(params: Params, key: str, value: object, told: str) -> None:
    with pytest.raises(ParamsError, match=told) as error:
        changed(with_study(params, v={key: value}), "some", DATASET, "v")
    assert "\n" not in str(error.value)


def test_the_key_is_of_what_ranks_depend_on(params: Params) -> None:
    of = with_study(params, v={"prompt.rank": 2})
    key = params_key(of, "some", DATASET, "v")
    for section, changes in {
        "evaluate": {"resamples": 7},
        "report": {"gallery": 9},
        "runtime": {"batch_size": 3},
        "prompt": {"rank": 5},  # the variant's own
    }.items():
        row = getattr(of, section).model_copy(update=changes)
        assert params_key(of.model_copy(update={section: row}), "some", DATASET, "v") == key
    other = of.model_copy(update={"prompt": of.prompt.model_copy(update={"conditional": False})})
    assert params_key(other, "some", DATASET, "v") != key
    alone = {name: row for name, row in of.methods.items() if name != "clip-prompt"}
    assert params_key(of.model_copy(update={"methods": alone}), "some", DATASET, "v") == key


def test_what_params_have_is_in_force(params: Params) -> None:
    same = {"prompt.rank": params.prompt.rank, "training.dsd.epochs": int(params.training["dsd"].epochs)}
    of = with_study(params, same=same, other={"prompt.rank": 3})
    assert in_force(of, "some", "same") and not in_force(of, "some", "other")


def test_a_piece_is_run_once_and_told_beside_the_unchanged(params: Params, tmp_path: Path) -> None:
    of = with_study(params, plain={}, other={"dataset.sample": 1})
    assert missing("some", of, tmp_path) == [("plain", DATASET), ("other", DATASET)]
    run("some", "plain", DATASET, of, tmp_path, tmp_path / "work")
    assert missing("some", of, tmp_path) == [("other", DATASET)]
    run("some", "other", DATASET, of, tmp_path, tmp_path / "work")
    assert missing("some", of, tmp_path) == []
    assert missing("some", of.model_copy(update={"seed": 5}), tmp_path) == [("plain", DATASET), ("other", DATASET)]
    found = read(tmp_path / "some.json")
    assert list(found) == ["plain", "other"] and not list((tmp_path / "work").glob("*/train"))

    prepared = tmp_path / "work" / data_of(of, "plain") / "prepare"
    examples = read_examples(prepared / "examples.parquet", "test")
    kind, ranks = params.datasets[DATASET].kind, np.array(found["plain"][DATASET]["ranks"]["dsd"].split(), dtype=int)
    answers = {DATASET: Answers(kind, examples, {"dsd": hits_of(kind, examples, ranks)}, {})}
    told = compare(of, "some", tmp_path, answers)
    row = told["plain"][DATASET]["methods"]["dsd"]["micro"]
    assert row["difference"]["value"] == 0 and {"value", "low", "high", "n"} < set(row)
    # Another few-shot sample is measured on the same test examples.
    assert "difference" in told["other"][DATASET]["methods"]["dsd"]["micro"]
    assert told["other"][DATASET]["params"] == keys("some", "other", DATASET, of)["params"]
    assert compare(with_study(params, methods=("denoising",), plain={}), "some", tmp_path, answers) == {}
    fewer = {DATASET: answers[DATASET]._replace(examples=examples[1:])}
    assert "difference" not in compare(of, "some", tmp_path, fewer)["plain"][DATASET]["methods"]["dsd"]["micro"]


def data_of(params: Params, variant: str) -> str:
    of = changed(params, "some", DATASET, variant)
    return study.digest(of.datasets, of.images, of.seed)[:16]


def test_a_stopped_piece_goes_on(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = with_study(params, "validation", plain={})

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study, "score", dies)
        with pytest.raises(KeyboardInterrupt):
            run("some", "plain", DATASET, of, tmp_path, tmp_path / "work")
    (summary,) = (tmp_path / "work").glob("*/train/dsd/summary.json")
    before = summary.stat().st_mtime_ns
    assert missing("some", of, tmp_path) == [("plain", DATASET)]
    seen: list[int] = []
    monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: seen.append(summary.stat().st_mtime_ns))
    run("some", "plain", DATASET, of, tmp_path, tmp_path / "work")
    assert seen == [before]
    entry = json.loads((tmp_path / "some.json").read_text())["plain"][DATASET]
    assert len(entry["ranks"]["dsd"].split()) == entry["metrics"]["dsd"]["micro"]["n"]


def test_a_study_without_a_prompt_trains_none(params: Params, tmp_path: Path) -> None:
    of = with_study(params, "validation", ("dsd-zero-shot",), λ={"evidence.scale": 5.0})
    run("some", "λ", DATASET, of, tmp_path, tmp_path / "work")
    assert list(read(tmp_path / "some.json")["λ"][DATASET]["ranks"]) == ["dsd-zero-shot"]
