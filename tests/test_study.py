"""Studies: params with keys changed; methods of pieces run one by one, resumed, and compared with params.yaml."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsd.config import BackboneParams, Params, StudyParams
from dsd.data.examples import MatchingExample, read_examples
from dsd.errors import ParamsError
from dsd.evaluation.claims import AtPaper, DatasetHits, Judgement, judge
from dsd.evaluation.evaluate import hits_of
from dsd.experiments import studies
from dsd.experiments.studies import missing_pieces, run_piece
from dsd.experiments.study_results import (
    Stored,
    compare_variants,
    judge_at_paper,
    method_results,
    read_study,
    with_replicates,
)
from dsd.experiments.variants import Study, method_key
from dsd.models.checkpoint import identify

DATASET = "scenes-com"


def with_study(params: Params, split: str = "test", methods: tuple[str, ...] = ("dsd",), **variants: object) -> Study:
    row = StudyParams.model_validate(dict(split=split, datasets=(DATASET,), methods=methods, variants=variants))
    return Study("some", params.model_copy(update={"studies": {"some": row}}))


def with_params(study: Study, **sections: object) -> Study:
    return Study(study.name, study.params.model_copy(update=sections))


def run(study: Study, variant: str, folder: Path, *methods: str, trained: str = "none") -> None:
    run_piece(study, variant, DATASET, methods or study.row.methods, folder, folder / "work", folder / trained)


def keys(params: Params, variant: dict[str, object]) -> dict[str, str]:
    """Method → key of every method without a schedule under a variant; no checkpoint is read."""
    study = with_study(params, methods=tuple(params.methods), v=variant)
    return study.keys(DATASET, lambda row: row.source)["v"]


def test_a_variant_changes_its_keys_and_nothing_else(params: Params) -> None:
    of = with_study(params, small={"prompt.rank": 2, "dataset.sample": 3}).variant("small", DATASET, ["dsd"])
    assert of.prompt.rank == 2 and of.datasets[DATASET].sample == 3
    assert list(of.methods) == list(of.training) == ["dsd"] and list(of.datasets) == [DATASET]
    assert of.evidence == params.evidence and of.training["dsd"] == params.training["dsd"]


def test_the_method_that_trains_the_prompt_is_run_with_those_that_use_it(params: Params) -> None:
    study = with_study(params, methods=("dsd-plus",), v={})
    assert list(study.variant("v", DATASET, ["dsd-plus"]).methods) == ["dsd", "dsd-plus"]
    assert list(study.variant("v", DATASET, ["denoising"]).methods) == ["denoising"]


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
        with_study(params, v={key: value}).variant("v", DATASET, ["dsd"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("variant", "methods"), [
    ({"prompt.rank": 2}, {"dsd", "dsd-plus"}),
    ({"context.tokens": 2}, {"clip-prompt"}),
    ({"fusion.examples": 3}, {"dsd-plus"}),
    ({"training.dsd.epochs": 9}, {"dsd", "dsd-plus"}),
    ({"training.clip-finetune.epochs": 9}, {"clip-finetune"}),
    ({"dataset.sample": 1}, {"dsd", "dsd-plus", "clip-finetune", "clip-prompt"}),
    ({"dataset.few_shot": 0.2}, {"dsd", "dsd-plus", "clip-finetune", "clip-prompt"}),
    ({"dataset.draws_per_level": 3}, {"dsd", "dsd-plus", "dsd-zero-shot", "denoising", "dsd-released"}),
    ({"noise.sample": 1}, {"dsd", "dsd-plus", "dsd-zero-shot", "denoising", "dsd-released"}),
    ({"evidence.scale": 9.0}, {"dsd", "dsd-plus", "dsd-zero-shot", "dsd-released"}),
    ({"backbones.embedded-clip.source": "other"}, {"clip-zero-shot", "clip-finetune", "clip-prompt"}),
    ({"backbones.embedded.source": "other"}, {"dsd", "dsd-plus", "dsd-zero-shot", "denoising", "dsd-released"}),
    ({"runtime.batch_size": 3}, set()),
    ({"training.dsd.epochs": 2}, set()),  # as params has it, though it is no float here
])  # fmt: skip
def test_the_key_of_a_method_is_of_what_its_ranks_depend_on(
    params: Params, variant: dict[str, object], methods: set[str]
) -> None:
    before, after = keys(params, {}), keys(params, variant)
    assert {method for method in params.methods if before[method] != after[method]} == methods


def test_the_key_does_not_depend_on_other_methods_and_datasets(params: Params) -> None:
    """But on the checkpoint, and on the split."""
    few = params.model_copy(update={"methods": {"dsd": params.methods["dsd"]}})

    def key(of: Params, split: str = "test", identity: str = "") -> str:
        return method_key(of, DATASET, "dsd", split, lambda _: identity)

    assert key(params) == key(few)
    assert len({key(params), key(params, "validation"), key(params, identity="other")}) == 3


def test_a_variant_runs_the_methods_that_it_can_change_and_whose_results_are_not_there(params: Params) -> None:
    methods = ("dsd", "clip-finetune", "denoising")
    study = with_study(params, methods=methods, same={}, a={"dataset.sample": 1}, b={"dataset.sample": 1})

    def runs(study: Study) -> list[list[str]]:
        return [list(of) for of in study.pieces(DATASET, lambda _: "").values()]

    grid = {"a": {"dataset.sample": 1}, "b": {"noise.sample": 1}, "c": {"dataset.sample": 1, "noise.sample": 1}}
    study_of_both = with_study(params, methods=methods, **grid)
    assert runs(study_of_both) == [["dsd", "clip-finetune"], ["dsd", "denoising"], ["dsd"]]

    assert runs(study) == [[], ["dsd", "clip-finetune"], []]
    search = with_study(params, "validation", methods=methods, same={}, a={"dataset.sample": 1})
    assert runs(search) == [list(methods), ["dsd", "clip-finetune"]]


def test_a_piece_is_run_once_and_compared_with_the_unchanged(params: Params, tmp_path: Path) -> None:
    study = with_study(params, plain={}, other={"dataset.sample": 1}, third={"dataset.sample": 2})
    missing = {("other", DATASET): ["dsd"], ("third", DATASET): ["dsd"]}
    assert missing_pieces(study, tmp_path) == missing
    run(study, "plain", tmp_path)
    run(study, "other", tmp_path)
    assert list(missing_pieces(study, tmp_path)) == [("third", DATASET)]
    assert missing_pieces(with_params(study, seed=5), tmp_path) == missing
    results = read_study(tmp_path / "some.json")
    assert list(results) == ["plain", "other"]
    stored = results["other"][DATASET]["dsd"]
    assert set(stored) == {"key", "libraries", "examples", "few_shot", "metrics", "ranks"}

    prepared = tmp_path / "work" / data_of(study, "plain") / "prepare"
    examples = read_examples(prepared / "examples.parquet", "test")
    assert stored["few_shot"] == len(read_examples(prepared / "examples.parquet", "train"))
    ranks = np.array(results["plain"][DATASET]["dsd"]["ranks"].split(), dtype=int)
    kind = params.datasets[DATASET].kind
    answers = {DATASET: DatasetHits(kind, examples, {"dsd": hits_of(kind, examples, ranks)}, {})}
    comparison = compared(study, tmp_path, answers)
    plain, other = (comparison[variant][DATASET]["dsd"] for variant in ("plain", "other"))
    row = plain["metrics"]["micro"]
    assert row["difference"]["value"] == 0 and {"value", "low", "high", "n"} < set(row)
    # Another few-shot sample is measured on the same test examples.
    assert "difference" in other["metrics"]["micro"]
    assert (plain["current"], plain["unchanged"], other["current"], other["unchanged"]) == (True, True, True, False)
    stale = compared(with_params(study, prompt=params.prompt.model_copy(update={"rank": 1})), tmp_path, answers)
    assert not stale["other"][DATASET]["dsd"]["current"]
    assert compared(with_study(params, methods=("denoising",), plain={}), tmp_path, answers) == {}
    fewer = {DATASET: answers[DATASET]._replace(examples=examples[1:])}
    assert "difference" not in compared(study, tmp_path, fewer)["plain"][DATASET]["dsd"]["metrics"]["micro"]


def compared(study: Study, folder: Path, answers: dict[str, DatasetHits]) -> dict[str, Any]:
    return compare_variants(study, read_study(folder / f"{study.name}.json"), answers, identify)


def data_of(study: Study, variant: str) -> str:
    of = study.variant(variant, DATASET, study.row.methods)
    return studies.digest(of.datasets, of.images, of.seed)[:16]


def test_a_new_method_and_another_clip_rerun_no_other_method(params: Params, tmp_path: Path) -> None:
    sample = {"dataset.sample": 1}
    run(with_study(params, methods=("clip-finetune",), v=sample), "v", tmp_path)
    before = read_study(tmp_path / "some.json")["v"][DATASET]
    study = with_study(params, methods=("dsd", "clip-finetune"), v=sample)
    assert missing_pieces(study, tmp_path) == {("v", DATASET): ["dsd"]}
    run(study, "v", tmp_path, "dsd")
    after = read_study(tmp_path / "some.json")["v"][DATASET]
    assert list(after) == ["dsd", "clip-finetune"] and after["clip-finetune"] == before["clip-finetune"]
    clip = params.backbones["embedded-clip"]
    other: BackboneParams = clip.model_copy(update={"dtype": "float16"})
    changed = with_params(study, backbones={**params.backbones, "embedded-clip": other})
    assert missing_pieces(changed, tmp_path) == {("v", DATASET): ["clip-finetune"]}


def test_a_stopped_piece_resumes(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = with_study(params, "validation", plain={})

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(studies, "score", dies)
        with pytest.raises(KeyboardInterrupt):
            run(study, "plain", tmp_path)
    (summary,) = (tmp_path / "work").glob("*/train/dsd/summary.json")
    before = summary.stat().st_mtime_ns
    assert missing_pieces(study, tmp_path) == {("plain", DATASET): ["dsd"]}
    run(study, "plain", tmp_path)
    assert summary.stat().st_mtime_ns == before and missing_pieces(study, tmp_path) == {}
    entry = read_study(tmp_path / "some.json")["plain"][DATASET]["dsd"]
    assert len(entry["ranks"].split()) == entry["metrics"]["micro"]["n"]


def test_a_training_is_shared_by_variants_and_with_the_stage_train(params: Params, tmp_path: Path) -> None:
    """Variants that change the evaluation alone use the weights of the stage `train`, and of one another."""
    study = with_study(params, "validation", plain={}, deep={"prompt.rank": 2})
    run(study, "plain", tmp_path)
    (summary,) = (tmp_path / "work").glob("*/train/dsd/summary.json")
    shutil.copytree(summary.parent.parent, tmp_path / "data" / DATASET)
    trained = summary.stat().st_mtime_ns
    shutil.rmtree(tmp_path / "work")
    run(study, "plain", tmp_path, trained="data")
    assert summary.stat().st_mtime_ns == trained
    run(study, "deep", tmp_path, trained="data")
    assert summary.stat().st_mtime_ns != trained


def test_a_study_without_a_prompt_trains_none(params: Params, tmp_path: Path) -> None:
    study = with_study(params, "validation", ("dsd-zero-shot",), λ={"evidence.scale": 5.0})
    run(study, "λ", tmp_path)
    assert list(read_study(tmp_path / "some.json")["λ"][DATASET]) == ["dsd-zero-shot"]


def stored(study: Study, variant: str, ranks: dict[str, list[int]], examples: list[MatchingExample]) -> Stored:
    """Results of a variant with these ranks, as `run_piece` stores them; no model is run."""
    keys = study.keys(DATASET, lambda _: "")[variant]
    results = {m: {"key": keys[m], **method_results(examples, 270, {}, ranks_n)} for m, ranks_n in ranks.items()}
    return {variant: {DATASET: results}}


def test_claims_over_samples_and_noise_sets_and_at_the_papers_number_of_examples(params: Params) -> None:
    rng = np.random.default_rng(0)
    slots = ("subject", "object", "predicate")
    rows = [
        MatchingExample(f"{n}/{slot}", (f"{n}a", f"{n}{slot}"), (f"sentence {n}",), ((0, 0),), slot)
        for n in range(40)
        for slot in slots
    ]

    def ranks(share: float) -> list[int]:
        return [int(rank) for rank in np.where(rng.random(len(rows)) < share, 1, 2)]

    own = {
        method: hits_of(DATASET, rows, np.array(ranks(share)))
        for method, share in (("dsd", 0.9), ("dsd-zero-shot", 0.6), ("clip-finetune", 0.7), ("clip-prompt", 0.7))
    }
    params = params.model_copy(update={"methods": {name: params.methods[name] for name in own}})
    data = {DATASET: DatasetHits(DATASET, rows, own, {})}
    variants = {"s": {"dataset.sample": 1}, "n": {"noise.sample": 1}, "r": {"prompt.rank": 2}}
    row = dict(split="test", datasets=(DATASET,), methods=("dsd", "clip-finetune", "clip-prompt"))
    rows_ = {"samples": variants, "paper": {"270 examples": {"dataset.few_shot": 0.05}}}
    studies_ = {name: StudyParams.model_validate({**row, "variants": changes}) for name, changes in rows_.items()}
    params = params.model_copy(update={"studies": studies_})
    samples, paper = Study("samples", params), Study("paper", params)
    trained = {"dsd": ranks(0.3), "clip-finetune": ranks(0.9), "clip-prompt": ranks(0.9)}
    results = {
        "samples": stored(samples, "s", trained, rows) | stored(samples, "n", {"dsd": ranks(0.9)}, rows),
        "paper": stored(paper, "270 examples", trained, rows),
    }
    results["samples"] |= stored(samples, "r", trained, rows)  # not another sample: no replicate

    def claims(of: Params, stored: dict[str, Stored]) -> tuple[dict[int, Judgement], dict[str, AtPaper]]:
        judged, _ = judge(of, with_replicates(of, data, stored, lambda _: ""))
        return judged, judge_at_paper(of, data, stored, lambda _: "")

    judged, at_paper = claims(params, results)
    assert {number: (row.samples, row.noise_sets, row.replicates) for number, row in judged.items()} == {
        1: (2, 2, 3),  # tuned CLIP depends on the sample alone
        4: (2, 1, 2),  # without a prompt, it depends on the noise alone, and was not measured with the other set
        10: (2, 2, 3),
    }
    fewer = at_paper["270 examples"]
    assert fewer.few_shot == {DATASET: 270} and list(fewer.judgements) == [1, 4, 10]
    assert fewer.judgements[1].verdict == "contradicted" and fewer.judgements[1].replicates == 1
    alone, _ = judge(params, data)
    assert claims(params, {"samples": {}, "paper": {}}) == (alone, {})
    # Results under other params count for nothing.
    other = params.model_copy(update={"images": params.images.model_copy(update={"parity": 5})})
    assert claims(other, results) == (alone, {})
