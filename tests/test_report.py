"""The report on a small synthetic data folder, with fake heat maps."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markupsafe import Markup
from PIL import Image

from dsd.config import Params, StagedSchedule, StudyParams, load
from dsd.data.examples import MatchingExample, read_examples, write_examples
from dsd.data.image_table import ImageTable
from dsd.datasets.scenes_vqa import COUNTS
from dsd.errors import DataError
from dsd.evaluation import ablations, blind, claims
from dsd.evaluation.evaluate import SCHEMA, Results, forced_hits, hits_of, intervals, ranked_hits, write_metrics
from dsd.experiments.scaling import measure_scaling, read_scaling
from dsd.experiments.study_results import write_studies
from dsd.matcher import Heatmap
from dsd.metrics import SLOTS, rank
from dsd.report import build
from dsd.report.charts import DARK, LIGHT, THEME, Chart, smooth
from dsd.report.claims import cards, tally
from dsd.report.examples import card, choose, decimals, first_card, noisy_example
from dsd.report.heatmaps import CIVIDIS, HeatMaps, coloured
from dsd.report.inputs import Claim, DatasetResults, read_claims, read_datasets
from dsd.report.matrix import differences, leaders, verdict_on
from dsd.report.overview import lines, main_method, sides, tile, verdict
from dsd.report.papers import second_paper
from dsd.report.races import charts, front
from dsd.report.studies import sections
from dsd.report.tables import duration, names, points
from dsd.scenes.world import COLOURS, SHAPES
from dsd.schedules.replay import compare_settings
from dsd.scorers.evidence import INDEX, RACES, write_index
from dsd.statistics import Difference, Resampling, paired_difference
from tests.raced import few, synthetic_races

ROOT = Path(__file__).parent.parent
HOSTILE = """<script>alert("1")</script> & 'more'"""
NAMES = ("scenes-com", "scenes-ref", "scenes-vqa")
SKILL = {
    "dsd-zero-shot": 0.2,
    "dsd": 1.5,
    "denoising": 1.0,
    "dsd-plus": 1.7,
    "clip-zero-shot": 0.6,
    "clip-finetune": 0.7,
}  # added to the score of the correct candidate
STUDIES = {
    "search": {
        "split": "validation",
        "datasets": NAMES,
        "methods": ("dsd",),
        "variants": {"one": {"prompt.rank": 3}, "two": {"prompt.rank": 16}},
    },
    "samples": {
        "split": "test",
        "datasets": NAMES[:2],
        "methods": ("dsd", "clip-finetune"),
        "variants": {"1": {"dataset.sample": 1}, "2": {"dataset.sample": 2}},
    },
    "shares": {
        "split": "test",
        "datasets": NAMES,
        "methods": ("dsd",),
        "variants": {"1 %": {"dataset.few_shot": 0.01}, "10 %": {"dataset.few_shot": 0.1}},
    },
    "paper": {
        "split": "test",
        "datasets": NAMES[:1],
        "methods": ("dsd",),
        "variants": {"10 examples": {"dataset.few_shot": 0.01}},
    },
}
METRICS_OF = {"scenes-com": "macro", "scenes-ref": "top1", "scenes-vqa": "all"}
VOID = {"meta", "img", "br"}


def examples_of(name: str) -> list[MatchingExample]:
    if name == "scenes-com":
        return [
            MatchingExample(
                f"com/{n}/{slot}", (f"c{n}", f"c{n}{slot}"), (f"red circle {n} {HOSTILE}",), ((n % 2, 0),), slot
            )
            for n in range(12)
            for slot in SLOTS
        ]
    if name == "scenes-ref":
        texts, category = tuple(f"text {t}" for t in range(10)), ("above", "below")
        rights = [n % len(texts) for n in range(24)]
    else:
        answers = ("yes", "no", *COLOURS[:4], *SHAPES[:4], *COUNTS)
        texts, category = tuple(f"what is it ? {answer}" for answer in answers), ("binary", "colour")
        rights = [n // 2 % 2 if n % 2 == 0 else 2 + n // 2 % 4 for n in range(24)]
    return [
        MatchingExample(f"{name}/{n}", (f"{name}{n}",), texts, ((0, right),), category[n % 2])
        for n, right in enumerate(rights)
    ]


def png(rng: np.random.Generator) -> bytes:
    data = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((48, 48)).save(data, "PNG")
    return data.getvalue()


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_dataset(name: str, params: Params, data: Path) -> tuple[claims.DatasetHits, Results, blind.Blind]:
    """Write the outputs of earlier stages for a dataset; return its answers, metrics and blind baseline.

    Variants have their methods' hits.
    """
    examples, rng = examples_of(name), np.random.default_rng(len(name))
    prepared = data / "prepare" / name
    write_examples(prepared / "examples.parquet", [("test", e) for e in examples] + [("train", examples[0])])
    images = [{"id": i, "png": png(rng)} for i in dict.fromkeys(i for e in examples for i in e.images)]
    pq.write_table(pa.Table.from_pylist(images), prepared / "images.parquet")
    summary = {"train": 1, "validation": 0, "test": len(examples), "images": len(images), "repeated": 0}
    write(prepared / "summary.json", summary | {"quarantined": 1, "dropped": 2, "shared": 0})
    left_out = {f"{name}/7": "two texts are one to embedded-clip"} if name == "scenes-ref" else {}
    write_index(data / "score" / name, {}, [], 1, left_out)
    write(prepared / "quarantine.json", [{"name": f"{HOSTILE}.png", "reason": "truncated"}])
    kind, rows, hits, every = params.datasets[name].kind, [], {}, {}
    for method in params.methods:
        skill, ranks, tables = SKILL[method], [], []
        for e in examples:
            scores = rng.normal(size=(len(e.images), len(e.texts)))
            scores[e.answer[0]] += 2 * skill
            ranks.append(rank(scores, e.answer))
            tables.append(scores)
            rows.append(
                dict(id=e.id, category=e.category, method=method, scores=scores.ravel().tolist(), rank=ranks[-1])
            )
        hits[method] = hits_of(kind, examples, np.array(ranks))
        every[method] = hits[method] | forced_hits(kind, examples, tables, ranked_hits)
    path = data / "evaluate" / "scores" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    curve = [f"{step},{2 / step:.6f},{min(1, step / 40):.6f}" for step in range(1, 61)]
    for method in params.trained:
        (data / "train" / name / method).mkdir(parents=True)
        (data / "train" / name / method / "curve.csv").write_text("\n".join(["step,loss,accuracy", *curve, ""]))
    variants = {}
    for method in params.ablations.methods:
        changes = ablations.values(params.ablations, params.methods[method].ablation_keys)
        variants |= {ablations.ChangedMethod(method, key, text): hits[method] for key, text, _ in changes}
    options = params.evaluate, params.seed
    metrics = {method: intervals(examples, by_metric, *options) for method, by_metric in every.items()}
    no_change = Difference(0.0, -0.1, 0.1, 1.0, len(examples))
    gained = {"dsd": {m: no_change for m in every.get("dsd", {}) if m.endswith("all")}} if kind == "scenes-vqa" else {}
    baseline = blind.measure(kind, examples[:1], examples, every, gained, *options)
    return claims.DatasetHits(kind, examples, hits, variants), metrics, baseline


def write_results(params: Params, data: Path) -> None:
    """Write the outputs of the stages before the report."""
    answers, metrics, baselines, ablated = {}, {}, {}, {}
    for name in params.datasets:
        answers[name], metrics[name], baselines[name] = write_dataset(name, params, data)
    for name, answer in answers.items():
        ablated[name] = ablations.with_intervals(answer.examples, answer.variants, params.evaluate, params.seed)
    write_metrics(metrics, data / "evaluate")
    blind.write(baselines, data / "evaluate")
    ablations.write(ablated, data / "evaluate")
    judged = claims.judge(params, answers)
    fewer = claims.judge(params, {"scenes-com": answers["scenes-com"]._replace(variants={})})
    paper = {"10 examples": claims.AtPaper({"scenes-com": 10}, *fewer)} if fewer[0] else {}
    claims.write(*judged, paper, data / "evaluate")
    write_studies(study_results(params, metrics), data / "evaluate")
    write_races(params, data)


def write_races(params: Params, data: Path) -> None:
    """Write the races of denoising on questions, with live runs except those with a proposer."""
    learning, measured = synthetic_races(100), synthetic_races(60, seed=1)
    races = synthetic_races(40, seed=2), learning, measured
    _, results = compare_settings(*races, params.races, params.evaluate, params.seed)
    live = {"images": 5, "seconds": 0.25, "evaluations": 30.0, "fill": 0.97, "differ": 0}
    for row in results["chosen"].values():
        if not row["setting"].get("proposer"):
            row["live"] = live
    identity = {"key": "", "settings": ""}
    write(data / "races" / "scenes-vqa.json", {"denoising": {**identity, "examples": "", **results}})
    for name in params.races.datasets:
        write(data / "score" / name / RACES / INDEX, {"shards": {}, "compared": {"denoising": identity}})
    measure_scaling(params.races, params.evaluate, params.seed, data / "races")


def study_results(params: Params, metrics: dict[str, Results]) -> dict[str, object]:
    """Every variant of every study has the results of its methods; those of the first variant are not current.

    params.yaml has the variant "two" of the search.
    """
    difference = {"value": 0.1, "low": 0, "high": 0.2, "p": 0.01}

    def result(n: int, variant: str, dataset: str, method: str) -> dict[str, object]:
        values = {
            metric: v.as_dict() | {"difference": difference | {"n": v.n}}
            for metric, v in metrics[dataset][method].items()
        }
        return {"current": n > 0, "unchanged": variant == "two", "few_shot": 10 * (n + 1), "metrics": values}

    return {
        name: {
            variant: {
                dataset: {method: result(n, variant, dataset, method) for method in row.methods}
                for dataset in row.datasets
            }
            for n, variant in enumerate(row.variants)
        }
        for name, row in params.studies.items()
    }


class FakeHeatMaps:
    digest = "0123456789abcdef"

    def __call__(self, dataset: str, image: Image.Image, text: str) -> Heatmap:
        words, ramp = text.split(), np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
        return Heatmap(
            words, np.stack([np.roll(ramp, 5 * n) for n in range(len(words))]), np.array(image.resize((64, 64)))
        )

    def by_level(self, dataset: str, image: Image.Image, text: str) -> dict[float, Heatmap]:
        return {level: self(dataset, image, text) for level in (0.2, 0.8)}


@pytest.fixture(scope="module")
def params() -> Params:
    shipped = load(ROOT / "params.yaml")
    assert set(SKILL) <= set(shipped.methods) and set(NAMES) <= set(shipped.datasets)
    return shipped.model_copy(
        update={
            "methods": {name: shipped.methods[name] for name in SKILL},
            "datasets": {name: shipped.datasets[name] for name in NAMES},
            "evaluate": shipped.evaluate.model_copy(update={"resamples": 200}),
            "report": shipped.report.model_copy(update={"gallery": 3}),
            "races": few(shipped.races),
            "studies": {name: StudyParams.model_validate(row) for name, row in STUDIES.items()},
        }
    )


@pytest.fixture(scope="module")
def data(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only; tests that change something use `own_data`."""
    folder = tmp_path_factory.mktemp("data")
    write_results(params, folder)
    counts = {
        "prepare": {"seconds": 30.0},
        "cache": {"seconds": 3.0, "images": 4, "texts": 7, "truncated": 3, "corrupt": 0},
        "score": {"seconds": 4.0, "pairs": 5, "rows": 40, "computed": 20, "corrupt": 0},
    }
    for number, (stage, count) in enumerate(counts.items()):
        details = {name: count for name in params.datasets}
        record = {
            "stage": stage,
            "seconds": 90.0,
            "finished": f"2026-11-2{number}T10:00:00+00:00",
            "device": "a processor",
        }
        write(folder / "timings" / f"{stage}.json", {**record, "details": details})
    return folder


@pytest.fixture
def own_data(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "data"))


@pytest.fixture(scope="module")
def page(params: Params, data: Path) -> str:
    return build(params, data, data / "report", FakeHeatMaps()).read_text(encoding="utf-8")


@dataclass
class Parsed(HTMLParser):
    """Attributes of a page, and its tables as rows of texts by caption; checks that elements are nested correctly."""

    page: str
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self.feed(self.page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "caption":
            self._caption, self._rows = "", []
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "table":
            self.tables[self._caption] = [[" ".join(cell.split()) for cell in row] for row in self._rows]

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            return
        self.text += data
        if "caption" in self._open:
            self._caption += data
        if "th" in self._open or "td" in self._open:
            self._rows[-1][-1] += data


read = cache(Parsed)  # of a page


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts without an image: most of a build's time."""

    def draw(chart: object, caption: str, alt_text: str, **data: object) -> Chart:
        return Chart(caption, alt_text, Markup("<svg></svg>"), Markup("{}"))

    monkeypatch.setattr("dsd.report.charts.draw", draw)


def test_the_page_is_one_well_formed_file(page: str) -> None:
    parsed = read(page)
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    for tag, name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href", "srcset"):
            assert value.startswith("data:image/") if tag == "img" else value[1:] in ids or value.startswith("data:")
        assert not name.startswith("on")
    assert {"link", "iframe", "object"}.isdisjoint(tag for tag, _, _ in parsed.attributes)
    shown = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert all(target.removeprefix("#") in ids for target in re.findall(r"url\(([^)]*)\)", shown))
    assert len(page.encode()) < 5e6
    images, texts = (sum(n == name for t, n, v in parsed.attributes if t == "img" and v) for name in ("src", "alt"))
    assert images == texts > 0


def test_a_page_where_every_method_has_a_schedule(params: Params, tmp_path: Path, undrawn: None) -> None:
    """As with thousands of candidates shortlisted by a CLIP: there is no evidence for ablations."""
    listed = StagedSchedule(kind="staged", shortlist=None, to_keep=(1,), n_samples=(4,), budget=None)
    methods = {name: params.methods[name] for name in ("dsd-zero-shot", "dsd", "denoising", "clip-zero-shot")}
    methods = {
        name: row if row.scorer == "contrastive" else row.model_copy(update={"schedule": "listed"})
        for name, row in methods.items()
    }
    training = {"dsd": params.training["dsd"]}
    ablations_ = params.ablations.model_copy(update={"methods": ()})
    update = {"methods": methods, "training": training, "studies": {}, "ablations": ablations_}
    bare = params.model_copy(update={**update, "schedules": {"listed": listed}})
    write_results(bare, tmp_path)
    text = build(bare, tmp_path, tmp_path / "report", FakeHeatMaps()).read_text(encoding="utf-8")
    assert 'data-method="dsd"' in text and "Figure 5:" not in text


def test_a_page_without_trained_methods(params: Params, tmp_path: Path, undrawn: None) -> None:
    """Few-shot prompting is not mentioned; the first diffusion method is the one under test."""
    kept = {name: params.methods[name] for name in ("clip-zero-shot", "denoising")}
    ablations_ = params.ablations.model_copy(update={"methods": ()})
    bare = params.model_copy(update={"methods": kept, "training": {}, "studies": {}, "ablations": ablations_})
    write_results(bare, tmp_path)
    text = build(bare, tmp_path, tmp_path / "report", FakeHeatMaps()).read_text(encoding="utf-8")
    text = read(text).text
    assert "the wrong answers of denoising" in text and "Heat maps of denoising" in text
    for absent in ("with the attention prompt", "trained methods ()", "None", "Figure 5:"):
        assert absent not in text
    assert json.loads((tmp_path / "evaluate" / "claims.json").read_text()) == {}


def matrix_of(page: str, name: str) -> tuple[list[str], dict[str, list[str]]]:
    """The heads of a matrix and its cells by method."""
    tables = read(page).tables
    head, *rows = next(rows for caption, rows in tables.items() if caption.startswith(f"{name}: accuracy in %"))
    methods = [*SKILL, "blind", "chance"]
    assert len(rows) == len(methods)
    return head[1:], {method: row[1:] for method, row in zip(methods, rows, strict=True) if method in row[0]}


def span(v: dict[str, float]) -> str:
    return f"{100 * v['value']:.1f}[{100 * v['low']:.1f}, {100 * v['high']:.1f}]"


def test_every_metric_is_in_the_matrices_and_equal_averages_once(page: str, data: Path) -> None:
    for dataset, methods in json.loads((data / "evaluate" / "metrics.json").read_text()).items():
        heads, cells = matrix_of(page, dataset)
        shown = [metric for metric in methods["dsd"] if metric != "micro"]
        labels = ["macro (= micro)" if metric == "macro" else metric for metric in shown]
        assert [head.partition(",")[0].removeprefix(dataset) for head in heads] == labels
        for method, metrics in methods.items():
            for head, cell, metric in zip(heads, cells[method], shown, strict=True):
                assert cell.startswith(span(metrics[metric])) and head.endswith(f"n = {metrics[metric]['n']}")


def test_chance_follows_the_number_of_candidates(params: Params, data: Path) -> None:
    chance = {d.name: d.chance for d in read_datasets(params, data, {})}
    assert chance["scenes-com"] == pytest.approx(dict.fromkeys((*SLOTS, "micro", "macro"), 1 / 2))
    assert chance["scenes-ref"] == pytest.approx({"top1": 1 / 10, "top5": 5 / 10})
    forced = {"forced binary": 1 / 2, "forced other": 1 / 4, "forced all": 3 / 8}
    assert chance["scenes-vqa"] == pytest.approx(dict.fromkeys(("binary", "other", "all"), 1 / 13) | forced)


def test_the_blind_baseline_is_a_row_of_the_matrices(page: str, data: Path) -> None:
    for name, row in json.loads((data / "evaluate" / "blind.json").read_text()).items():
        _, cells = matrix_of(page, name)
        assert cells["blind"] == [span(v) for metric, v in row["metrics"].items() if metric != "micro"]
    reason = "It is at chance on scenes-com, since all candidates of an example have the same text"
    assert reason in read(page).text


def test_the_first_screen_has_the_verdict_and_a_tile_per_dataset(page: str, params: Params, data: Path) -> None:
    datasets = read_datasets(params, data, {})
    gaps = differences(datasets, resampling(params))
    sentence = verdict(datasets, params, gaps, "drawn scenes")
    assert sentence in read(page).text and sentence.startswith(f"On drawn scenes, {main_method(datasets, gaps)} is ")
    both = sides(params)
    assert both.clips == ["clip-zero-shot", "clip-finetune"] and "dsd-plus" in both.diffusion
    pairs = [both.over_clip(d, gaps) for d in datasets]
    higher = sum(pair is not None and pair[2].low > 0 for pair in pairs)
    assert f"the best diffusion method beats the best CLIP on {higher} of 3 datasets" in sentence
    for dataset, pair in zip(datasets, pairs, strict=True):
        shown = tile(dataset, both, gaps)
        assert shown.best == leaders(dataset, gaps) and pair is not None and shown.clip == pair[1]
        assert shown.over_clip.text == points(pair[2].value)
        assert pair[:2] == (dataset.best(both.diffusion), dataset.best(both.clips))
        assert f"{shown.dataset} {shown.task}" in " ".join(read(page).text.split())
    assert [metric for d in datasets for metric, _, _ in tile(d, both, gaps).image] == [
        "macro",
        "top1",
        "all",
        "forced all",
    ]
    assert [row[0] for row in read(page).tables["Prior-calibrated scores"][1:]] == ["dsd"]


def test_every_method_has_a_line_and_a_term(page: str, params: Params) -> None:
    parsed = read(page)
    targets = {value for tag, name, value in parsed.attributes if (tag, name) == ("a", "href")}
    for number, line in enumerate(lines(params, list(SKILL)), start=1):
        assert f"#method-{number}" in targets and f"{line.name} {line.text}" in " ".join(parsed.text.split())


def test_chance_of_two_by_two_examples() -> None:
    examples = [MatchingExample(str(n), ("i", "j"), ("a", "b"), ((0, 0), (1, 1)), "Object") for n in range(3)]
    dataset = DatasetResults(
        "w", "winoground", {}, examples, {}, {}, {}, {}, {}, [], {}, {}, blind.Blind(None, {}, {}, {})
    )
    assert dataset.chance == pytest.approx({"text": 1 / 4, "image": 1 / 4, "group": 1 / 6})


def test_external_texts_are_escaped(page: str) -> None:
    assert "&lt;script&gt;alert(" in page
    assert "<script>alert(" not in page and r"\u003cscript>alert(" not in page.partition("vega")[0]


def test_the_same_input_gives_the_same_bytes(page: str, params: Params, data: Path) -> None:
    assert build(params, data, data / "again", FakeHeatMaps()).read_bytes() == page.encode()


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.2, "higher"),
        (-0.2, -0.01, "lower"),
        (-0.01, 0.3, "no difference shown"),
        (0.0, 0.3, "no difference shown"),
    ],
)
def test_verdicts_follow_the_interval(low: float, high: float, verdict: str) -> None:
    assert verdict_on(Difference((low + high) / 2, low, high, 0.5, 10)) == verdict


def resampling(params: Params) -> Resampling:
    return Resampling(**params.evaluate.model_dump(), seed=params.seed)


def test_differences_are_paired_and_of_both_orders(page: str, params: Params, data: Path) -> None:
    dataset = read_datasets(params, data, {})[0]
    rows = differences([dataset], resampling(params))[dataset.name]
    for metric in dataset.metrics:
        d, reverse = rows["dsd-zero-shot"]["dsd"][metric], rows["dsd"]["dsd-zero-shot"][metric]
        own, other = (dataset.results[method][metric].value for method in ("dsd", "dsd-zero-shot"))
        assert d.value == pytest.approx(own - other) and reverse == Difference(-d.value, -d.high, -d.low, d.p, d.n)
        hits, groups = dataset.hits["dsd"][metric]
        clusters = [example.cluster for example in dataset.examples]
        against = dataset.hits["dsd-zero-shot"][metric][0]
        again = paired_difference(hits, against, clusters, groups, **resampling(params))
        assert vars(d) == pytest.approx(vars(again))
    _, cells = matrix_of(page, dataset.name)
    d = rows["clip-zero-shot"]["dsd"]["macro"]
    assert cells["dsd"][-1].endswith(f"{points(d.value)} [{points(d.low)}, {points(d.high)}]")
    assert cells["clip-zero-shot"][-1].endswith("reference")
    stored = json.loads(re.findall(r'<script type="application/json" id="gaps">(.*?)</script>', page)[0])
    d = rows["denoising"]["dsd"]["macro"]
    assert stored[dataset.name]["denoising"]["dsd"][-1]["text"] == points(d.value)


def test_claims_are_cards_with_their_comparisons(page: str, params: Params, data: Path) -> None:
    stored, rows = (json.loads((data / "evaluate" / f"{name}.json").read_text()) for name in ("claims", "comparisons"))
    paper, paper_rows = stored.pop("paper")["10 examples"], rows.pop("paper")["10 examples"]
    assert list(stored) == [str(number) for number in range(1, 11)] and list(paper["claims"]) == ["1", "4", "10"]
    judged, at_paper = read_claims(data)
    scope = "on drawn scenes, with this model"
    shown = list(cards(judged, scope, at_paper, read_datasets(params, data, {}), "dsd", ["denoising"]))
    text = " ".join(read(page).text.split())
    for one in shown:
        claim, bound = stored[one.number], rows[one.number][stored[one.number]["binding"]]
        assert (one.claim, one.verdict, one.effect) == (claim["claim"], claim["verdict"], points(bound["value"]))
        assert one.binding.startswith(f"{bound['dataset']}, {bound['metric']}: ") and one.n == str(bound["n"])
        title = f"Claim {one.number} · first paper {one.claim[:1].upper()}{one.claim[1:]}"
        assert f"{title} {one.symbol} {one.verdict} {scope}" in text
        assert any("10 examples" in fact for fact in one.facts) == (one.number in paper["claims"])
        assert "1 × 1 few-shot samples × noise sets" in one.facts
    assert f"Of 10 claims, {tally(shown)}." in text
    numbers = [row[0] for row in read(page).tables["Comparisons behind the claims"]]
    assert numbers.count("4, 10 examples") == len(paper_rows["4"]) > 0
    assert len(numbers) == 1 + sum(map(len, [*rows.values(), *paper_rows.values()]))


def test_a_claim_names_the_comparison_that_binds_with_its_margin_apart(params: Params, data: Path) -> None:
    """The second comparison has the smallest difference and exceeds its margin; the first does not."""
    sides_ = {"dataset": "scenes-ref", "metric": "top1", "a": "denoising, x", "b": "denoising, y", "p": 0.4, "n": 24}
    rows = [{**sides_, "value": -0.05, "least": -0.04}, {**sides_, "value": -0.06, "least": -0.42}]
    judgement = claims.Judgement("kept", 0, -0.05, -0.1, 0.0, -0.04, 0.8, "not shown", 1, 1, 1)
    datasets = read_datasets(params, data, {})
    [one] = cards([Claim("11", judgement, rows)], "here", [], datasets, "dsd", ["denoising"])
    assert (one.binding, one.effect, one.must) == ("scenes-ref, top1: denoising, x vs. denoising, y", "−5.0", "−4.0")
    assert one.reason.startswith("On scenes-ref (top1): dsd ") and one.source == "second paper"


def test_races(page: str, data: Path, params: Params) -> None:
    parsed, results = read(page), json.loads((data / "races" / "scenes-vqa.json").read_text())["denoising"]
    rows = {row[0]: row[1:] for row in parsed.tables["scenes-vqa: denoising"][1:]}
    assert list(rows) == [name for name in results["chosen"] if ", within " not in name]
    assert rows["exhaustive, all draws"][1:3] == ["reference", "reference"]  # not a difference of 0.0 from itself
    assert rows["exhaustive, all draws"][4] == "1.0×"
    for reading in ("text", "listing"):
        assert f"reading {reading}, samples 2" in rows[f"hierarchical as published ({reading}), from clean"][-1]
    proposed = rows["racing, δ = 0.1, clip-zero-shot first, budget 5"]
    assert "proposer clip-zero-shot" in proposed[-1] and "budget 5" in proposed[-1] and proposed[5] == "–"
    assert "The stated error rate was met by" in parsed.text and "calibrated, on 100 validation races" in parsed.text
    alone = results["recall"]["clip-zero-shot"]["1"]
    assert "clip-zero-shot costs as much as 1.5 evaluations per race, which every cost here includes" in parsed.text
    assert f"in its top 1 in {100 * alone:.1f} %, 2 in" in parsed.text
    grown = {row[0]: row[1:] for row in parsed.tables["Racing by number of candidates, on synthetic evidence"][1:]}
    rows_ = read_scaling(data / "races")["rows"]
    assert list(grown) == ["10", "40"]
    assert grown["40"][0].startswith(f"{8 * rows_[1]['share']['value']:.2f} [")
    assert grown["40"][3].startswith(f"{100 * rows_[3]['disagreement']['value']:.1f} %")
    figures = [v for _, name, v in parsed.attributes if name == "aria-label" and "evaluations per candidate" in v]
    assert [figure.split(" over evaluations")[0].split(": ")[-1] for figure in figures] == [
        "disagreement with all draws",
        "accuracy",
        "accuracy",
    ]


def test_schedules_are_compared_at_equal_disagreement(page: str, data: Path) -> None:
    parsed, results = read(page), json.loads((data / "races" / "scenes-vqa.json").read_text())["denoising"]
    rows = {row[0]: row[1:] for row in parsed.tables["scenes-vqa: denoising, at equal disagreement"][1:]}
    labels = ("exhaustive", "staged", "hierarchical", "racing", "racing, clip-zero-shot first")
    assert list(rows) == [f"{label}, within {rate} %" for rate in (2, 20) for label in labels]
    cells, staged = rows["staged, within 20 %"], results["chosen"]["staged, within 20 %"]
    assert cells[-1].startswith("to keep ") and cells[0].startswith(f"{100 * staged['accuracy']['value']:.1f} %")
    assert cells[2].startswith(f"{100 * staged['disagreement']['value']:.1f} % [")
    assert cells[3].startswith(f"{8 * staged['share']['value']:.2f} [") and cells[5:7] == ["0.25 5 images", "97.0 %"]
    least = min(run["validation"]["disagreement"] for run in results["runs"] if run["schedule"] == "staged")
    assert "staged, within 2 %" not in results["chosen"]
    assert rows["staged, within 2 %"] == ["–", "–", f"not reached: {100 * least:.1f} % at least", *["–"] * 5]
    assert rows["exhaustive, within 2 %"][1:3] == ["reference", "reference"]


def test_readings_of_algorithm_1_are_drawn_apart(data: Path) -> None:
    results = json.loads((data / "races" / "scenes-vqa.json").read_text())["denoising"]
    _, _, figure_4 = charts({"scenes-vqa": {"denoising": results}})
    assert figure_4.svg.count("from clean, text") == figure_4.svg.count("from clean, listing") > 0


def test_the_first_example_is_shown_at_increasing_noise(params: Params, data: Path) -> None:
    (dataset,) = (d for d in read_datasets(params, data, {}) if d.name == "scenes-vqa")
    shown = noisy_example(dataset, data / "prepare" / "scenes-vqa", FakeHeatMaps())
    example = dataset.examples[0]
    assert shown.text == example.texts[example.answer[0][1]]
    answer = shown.text.split()[-1]  # the words before it are function words
    assert [(level, [word.word for word in words]) for level, _, words in shown.levels] == [
        (0.2, [answer]),
        (0.8, [answer]),
    ]


def test_fronts_of_costs_are_chosen_on_validation_and_drawn_on_test() -> None:
    def run(cost: float, chosen: float, measured: float) -> dict[str, dict[str, float]]:
        return {
            split: {"evaluations": cost, "accuracy": share, "disagreement": 1 - share}
            for split, share in (("validation", chosen), ("test", measured))
        }

    runs = [run(4, 0.8, 0.9), run(1, 0.5, 0.4), run(2, 0.5, 0.95), run(3, 0.7, 0.6)]
    assert front(runs, "accuracy") == [(1, 0.4), (3, 0.6), (4, 0.9)]
    assert np.array(front(runs, "disagreement")) == pytest.approx(np.array([(1, 0.6), (3, 0.4), (4, 0.1)]))


def test_the_second_papers_tables_have_its_numbers_and_ours(params: Params, data: Path) -> None:
    results = json.loads((data / "races" / "scenes-vqa.json").read_text())
    (dataset,) = (d for d in read_datasets(params, data, {}) if d.name == "scenes-vqa")
    classes = replace(dataset, kind="scenes-cls")
    first, second = second_paper({"scenes-vqa": results}, [classes], "clip-zero-shot")
    assert [cell.text for cell in first.rows[0].cells] == ["published", "86.6", "110 h", "85.5", "57 h"]
    for place, reading in ((-2, "text"), (-1, "listing")):
        row = results["denoising"]["chosen"][f"hierarchical as published ({reading}), from clean"]
        ours, label = f"{100 * row['accuracy']['value']:.1f}", f"ours (denoising), {reading}"
        assert first.rows[place].cells[3].text == second.rows[place].cells[2].text == ours
        assert first.rows[place].cells[0].text == second.rows[place].cells[0].text == label
    assert list(second_paper({}, [classes], "clip-zero-shot")) == []


def test_studies(page: str, data: Path) -> None:
    parsed = read(page)
    metrics = json.loads((data / "evaluate" / "metrics.json").read_text())
    head, *rows = parsed.tables["search: validation split"]
    assert head[2] == "scenes-commacro, n = 36" and [row[0] for row in rows] == ["one (other params)", "two"]
    assert "dsd: of 2 variants, “one” has the best mean; params.yaml has “two”." in parsed.text
    headlines = {name: METRICS_OF[name] for name in NAMES}
    values = [metrics[name]["dsd"][metric]["value"] for name, metric in headlines.items()]
    assert rows[0][-1] == f"{100 * sum(values) / 3:.1f}"
    _, *rows = parsed.tables["samples: test split"]
    assert [row[:2] for row in rows[:4]] == [
        ["params.yaml", "dsd"],
        ["1 (other params)", "dsd"],
        ["2", "dsd"],
        ["params.yaml", "clip-finetune"],
    ]
    assert "+10.0, p 0.010" in rows[1][2] and rows[0][2].endswith("]; reference")
    assert rows[-2][0] == "mean ± standard deviation" and "± 0.0, 3 results" in rows[-2][2]
    own = {name: len(read_examples(data / "prepare" / name / "examples.parquet", "train")) for name in NAMES}
    curves = [value for _, name, value in parsed.attributes if name == "aria-label" and "few-shot examples: " in value]
    # Two of the shares, one of the study with a single variant, and params.yaml; on the first dataset alone.
    shots = sorted({10, 20, own["scenes-com"]})
    assert (
        len(curves) == 3 and f"scenes-com, macro over {names([str(n) for n in shots])} few-shot examples" in curves[0]
    )


def test_a_variant_that_a_method_does_not_depend_on_has_no_row(params: Params, data: Path) -> None:
    datasets = read_datasets(params, data, {})
    stored = json.loads((data / "evaluate" / "studies.json").read_text())
    for by_method in stored["samples"]["2"].values():
        del by_method["clip-finetune"]
    [study] = [part for part in sections(params, stored, datasets, dict.fromkeys(SKILL, 0)) if part.title == "samples"]
    rows = [(row.head, row.cells[0].text) for row in study.table.rows if row.kind != "total"]
    assert ("2", "dsd") in rows and ("2", "clip-finetune") not in rows
    assert "2 results" in study.table.rows[-1].cells[1].interval


def test_published_numbers_are_labelled(page: str, data: Path) -> None:
    tables = read(page).tables
    metrics = json.loads((data / "evaluate" / "metrics.json").read_text())
    head, *rows = tables["Table 1 of the first paper"]
    places = [f"{m}ComVG / scenes-com" for m in ("subject", "object", "predicate", "average")]
    assert head[2:] == [*places, "top-1RefCOCOg / scenes-ref", "top-5RefCOCOg / scenes-ref"]
    assert rows[4][:3] == ["DSD", "published", "80.81"] and rows[5][:2] == ["DSD", "ours (dsd)"]
    own = metrics["scenes-com"]["dsd"]["subject"]["value"]
    assert rows[5][2].startswith(f"{100 * own:.1f} [")
    assert rows[3][2] == "–"  # clip-prompt is not among the methods here
    assert [row[-1] for row in tables["Table 2 of the first paper"][1::2]] == [
        "17.86",
        "18.03",
        "20.43",
    ]
    drawn = [v for _, name, v in read(page).attributes if name == "aria-label" and v.startswith("Figure")]
    assert [text.split(":")[0] for text in drawn] == [f"Figure {n} of the paper, from our data" for n in (3, 4, 5, 6)]


def test_examples_are_sampled_by_the_seed_in_every_category(params: Params, data: Path) -> None:
    dataset = read_datasets(params, data, {})[0]
    chosen = choose(dataset, "dsd-zero-shot", 6, seed=0)
    assert chosen == choose(dataset, "dsd-zero-shot", 6, seed=0) != choose(dataset, "dsd-zero-shot", 6, seed=1)
    groups = [(dataset.examples[n].category, bool(dataset.ranks["dsd-zero-shot"][n] == 1)) for n in chosen]
    assert {group: groups.count(group) for group in groups} == {
        (slot, right): 2 for slot in SLOTS for right in (True, False)
    }


def test_an_example_has_every_methods_answer_and_the_maps_of_content_words(params: Params, data: Path) -> None:
    (dataset,) = (d for d in read_datasets(params, data, {}) if d.name == "scenes-vqa")
    n = int(np.flatnonzero(dataset.ranks["dsd"] != 1)[0])
    images = ImageTable(data / "prepare" / dataset.name / "images.parquet")
    shown, example = card(dataset, n, "dsd", images, FakeHeatMaps()), dataset.examples[n]
    assert [answer.method for answer in shown.answers] == list(SKILL) and shown.total == len(example.texts)
    for answer in shown.answers:
        assert answer.right == (answer.rank == 1) == example.texts[example.answer[0][1]].endswith(f"? {answer.named}")
        assert answer.rank == dataset.ranks[answer.method][n]
        assert answer.method in next(c.methods for c in shown.candidates if c.label == answer.named)
    assert shown.right == [answer.method for answer in shown.answers if answer.right]
    assert len(shown.maps) == 2  # the right text, and the one that the method names
    words = [word.word for word in shown.maps[0].words]
    assert words == [shown.maps[0].label] and {"what", "is", "it", "?"}.isdisjoint(words)


def test_the_first_screens_example_is_the_first_with_several_texts(params: Params, data: Path) -> None:
    datasets = read_datasets(params, data, {})
    first = first_card(datasets, "dsd", data)
    assert first is not None and first[0].id == datasets[1].examples[0].id and not first[1].correct
    scores = datasets[1].scores["dsd"][0][0].copy()
    scores[datasets[1].examples[0].answer[0][1]] = -np.inf
    assert first[1].label == datasets[1].examples[0].texts[int(scores.argmax())]
    assert first_card(datasets[:1], "dsd", data) is None


def test_downloads_have_every_number(page: str, params: Params, data: Path) -> None:
    links = re.findall(r'href="data:[a-z/]+;base64,([^"]*)" download="([^"]*)"', page)
    files = {name: base64.b64decode(content).decode() for content, name in links}
    stored = ("claims", "comparisons", "ablations", "studies")
    assert list(files) == ["results.csv", "differences.csv", *(f"{name}.json" for name in stored), "params.json"]
    metrics = json.loads((data / "evaluate" / "metrics.json").read_text())
    rows = list(csv.DictReader(io.StringIO(files["results.csv"])))
    assert len(rows) == sum(len(by_metric) for methods in metrics.values() for by_metric in methods.values())
    for row in rows:
        v = metrics[row["dataset"]][row["method"]][row["metric"]]
        assert float(row["value"]) == pytest.approx(v["value"], rel=1e-5) and int(row["n"]) == v["n"]
    assert {row["backbone"] for row in rows} == {"embedded", "embedded-clip"}
    assert json.loads(files["claims.json"]) == json.loads((data / "evaluate" / "claims.json").read_text())
    assert json.loads(files["params.json"])["seed"] == params.seed


def test_counts_and_times(page: str) -> None:
    tables, text = read(page).tables, read(page).text
    assert tables["Data loss"][1] == ["scenes-com", "48", "1", "2", "0", "7", "3", "0", "0", "0"]
    assert [row[-1] for row in tables["Data loss"][1:]] == ["1" if name == "scenes-ref" else "0" for name in NAMES]
    assert "scenes-ref: scenes-ref/7 (two texts are one to embedded-clip)" in " ".join(text.split())
    assert tables["Evidence: U-Net passes"][1] == ["scenes-com", "5", "40", "20", "4.0 s", "5"]
    assert tables["Time by stage"][-1][:2] == ["total", "4 min 30 s"]
    assert "0123456789abcdef" in text and "2026-11-22 10:00:00 UTC" in text and "48 → 64 pixels" in text


def test_images_can_be_decoded(page: str) -> None:
    images = [base64.b64decode(data) for data in re.findall(r"data:image/[a-z]+;base64,([^\"]*)", page)]
    assert images
    for image in images[:5]:
        Image.open(io.BytesIO(image)).load()


def test_methods_and_timings_are_optional(params: Params, own_data: Path, undrawn: None) -> None:
    path = own_data / "evaluate" / "metrics.json"
    metrics = json.loads(path.read_text())
    write(path, {name: {"denoising": rows["denoising"]} for name, rows in metrics.items()})
    for timing in (own_data / "timings").iterdir():
        timing.unlink()
    text = read(build(params, own_data, own_data / "report", FakeHeatMaps()).read_text()).text
    assert "No stage has recorded its time" in text and "dsd was not evaluated" in text and "not recorded" in text


def broken(data: Path) -> Iterator[tuple[Path, str]]:
    yield data / "evaluate" / "metrics.json", "{"
    yield data / "evaluate" / "metrics.json", '{"scenes-com": {}}'
    yield data / "evaluate" / "metrics.json", json.dumps({name: {"dds": {}} for name in NAMES})
    yield data / "evaluate" / "metrics.json", json.dumps({name: {"dsd": {"top1": 0.5}} for name in NAMES})
    yield data / "evaluate" / "ablations.json", json.dumps({NAMES[0]: {"dsd": {"heads": {"mean": 0.5}}}})
    yield data / "evaluate" / "blind.json", json.dumps({name: {"reason": None} for name in NAMES})
    yield data / "evaluate" / "claims.json", json.dumps({"4": {"claim": "ahead"}})
    yield data / "train" / "scenes-com" / "clip-finetune" / "curve.csv", "step,loss\n1,2\n"
    yield data / "prepare" / "scenes-ref" / "summary.json", ""
    yield data / "timings" / "score.json", '{"stage": "score"}'


def test_malformed_or_missing_files_are_one_line_errors(params: Params, own_data: Path) -> None:
    for path, content in broken(own_data):
        sound = path.read_bytes()
        path.write_text(content)
        with pytest.raises(DataError, match=f"^{re.escape(str(path))}: .*run the stage") as error:
            build(params, own_data, own_data / "report", FakeHeatMaps())
        assert "\n" not in str(error.value)
        path.write_bytes(sound)
    for path in (
        own_data / "evaluate" / "scores" / "scenes-com.parquet",
        own_data / "prepare" / "scenes-vqa" / "examples.parquet",
    ):
        sound = path.read_bytes()
        path.unlink()
        with pytest.raises(DataError, match=f"^{re.escape(str(path))}: no such file"):
            build(params, own_data, own_data / "report", FakeHeatMaps())
        path.write_bytes(sound)


def test_scores_of_other_examples_are_refused(params: Params, own_data: Path) -> None:
    path = own_data / "evaluate" / "scores" / "scenes-com.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(DataError, match="not the scores of the test examples"):
        build(params, own_data, own_data / "report", FakeHeatMaps())


def test_heat_maps_are_those_of_the_trained_prompt(models: Path, tmp_path: Path) -> None:
    from dsd.models.prompts import AttentionPrompt
    from tests.tiny import small

    params = small(models)
    heat = HeatMaps(params, tmp_path)
    backbone = heat._backbone
    prompt = AttentionPrompt(
        backbone.unet.config.cross_attention_dim, backbone.layer_widths, 4, rank=2, conditional=False, seed=0
    )
    for name, value in {"fresh": 0, "trained": 1}.items():
        for up in prompt.up:
            up.data += value
        (tmp_path / name / "dsd").mkdir(parents=True)
        prompt.save(tmp_path / name / "dsd" / "prompt.safetensors", heat.digest)
    image, text = Image.new("RGB", (24, 24), "red"), "a red circle"
    trained_, fresh = heat("trained", image, text), heat("fresh", image, text)
    assert trained_.words == text.split() and trained_.maps.shape == (3, 32, 32)
    assert not np.allclose(trained_.maps, fresh.maps)


@pytest.mark.parametrize(
    ("scores", "digits"), [([0.17, 0.19], 3), ([0.1717, 0.1709], 5), ([12.0, 3.0], 1), ([0.5, 0.5], 4)]
)
def test_scores_show_their_difference(scores: list[float], digits: int) -> None:
    assert decimals(scores) == digits


def test_smoothing_keeps_a_constant_and_averages_neighbours() -> None:
    assert smooth([2.0] * 9, 5) == pytest.approx([2.0] * 9)
    assert smooth([0.0, 3.0, 6.0], 3) == pytest.approx([1.5, 3.0, 4.5])


def test_a_heat_map_is_coloured_by_cividis() -> None:
    heat = np.zeros((64, 64), np.float32)
    heat[:, 32:] = 1
    image = coloured(heat)
    shown = np.array(image.convert("RGB"))
    assert image.size == (32, 32) and image.mode == "P"
    ends = [tuple(int(colour[n : n + 2], 16) for n in (1, 3, 5)) for colour in (CIVIDIS[0], CIVIDIS[-1])]
    assert [tuple(shown[0, 0]), tuple(shown[0, -1])] == ends


def test_charts_are_valid_vega_lite_in_the_colours_of_their_methods(page: str) -> None:
    specs = [
        json.loads(text)
        for text in re.findall(r'<div class="plot">.*?<script type="application/json">(.*?)</script>', page)
    ]
    assert len(specs) > 10
    for spec in specs:
        alt.Chart.from_dict(spec)
    scale = specs[0]["spec"]["layer"][1]["encoding"]["color"]["scale"]
    assert scale["domain"] == list(SKILL) and scale["range"] == [f"var(--m{n})" for n in range(len(SKILL))]
    assert THEME["m1"] == (LIGHT[1], DARK[1]) and len({*LIGHT, *DARK}) == 16


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (60, "1 min 00 s"), (3725, "1 h 02 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("difference", "text"), [(0.1234, "+12.3"), (-0.02, "−2.0"), (-0.0001, "0.0"), (0.0, "0.0")])
def test_points(difference: float, text: str) -> None:
    assert points(difference) == text


@pytest.mark.parametrize("schedule", ["racing", "hierarchical", "staged"])
def test_a_schedule_without_runs_is_not_plotted(schedule: str, data: Path) -> None:
    results = json.loads((data / "races" / "scenes-vqa.json").read_text())["denoising"]
    results["runs"] = [run for run in results["runs"] if run["schedule"] != schedule]
    assert len(charts({"scenes-vqa": {"denoising": results}})) == (2 if schedule == "hierarchical" else 3)


def linear(colour: str) -> np.ndarray:
    """The linear RGB of a hexadecimal colour."""
    rgb = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, WCAG 2.2."""
    dark, light = sorted(float(linear(colour) @ (0.2126, 0.7152, 0.0722)) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    scaled = xyz @ rgb.clip(0, 1) / (0.9505, 1, 1.089)
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


VISION = {  # Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("palette", [LIGHT, DARK])
@pytest.mark.parametrize("vision", VISION)
def test_colours_of_methods_differ_for_colour_blind_readers(palette: tuple[str, ...], vision: str) -> None:
    seen = [lab(np.array(VISION[vision]) @ linear(colour)) for colour in palette]
    assert min(np.linalg.norm(a - b) for n, a in enumerate(seen) for b in seen[:n]) > 10


def test_colours_contrast_with_the_page() -> None:
    for theme in (0, 1):
        for ground in ("paper", "card", "tint"):
            behind = THEME[ground][theme]
            assert min(contrast(THEME[name][theme], behind) for name in ("ink", "muted", "accent")) >= 4.5
            assert min(contrast(THEME[f"m{n}"][theme], behind) for n in range(8)) >= 3


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


# The lowest contrast of visible text with what is behind it: the nearest ancestor with an opaque background.
CONTRAST = """() => {
  const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");
  const rgb = (colour) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => c.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c; }
    return rgb("white");
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), low = [];
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement, style = getComputedStyle(e);
    if (!texts.currentNode.data.trim() || e.closest("script, .mark") || !e.checkVisibility()) continue;
    const colour = e.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(rgb(colour)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([texts.currentNode.data.trim(), ratio]);
  }
  return low;
}"""
WIDER = "() => document.documentElement.scrollWidth - innerWidth"
OPEN_ALL = "() => document.querySelectorAll('details').forEach((part) => (part.open = true))"
BROKEN = """() => [...document.querySelectorAll("main *")].filter((e) => e.checkVisibility() && !e.closest("svg")
  && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 120))"""


@pytest.mark.browser
@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_every_width_and_its_texts_have_contrast(
    page: str, data: Path, browser: Any, scripts: bool, scheme: str
) -> None:
    tab = browser.new_page(color_scheme=scheme)
    errors: list[str] = []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    text = page if scripts else re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    (data / "report" / "shown.html").write_text(text)
    tab.goto((data / "report" / "shown.html").as_uri())
    tab.evaluate(OPEN_ALL)
    for width in (390, 768, 1280, 3840):
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate(WIDER) == 0 and tab.evaluate(BROKEN) == [], width
        assert tab.locator(".chart svg:visible").count() > 5 and tab.locator("tbody tr:visible").count() > 20
    assert tab.evaluate(CONTRAST) == [] and errors == []
    assert tab.locator(".scripted:visible").count() == (0 if not scripts else tab.locator(".scripted").count())
    tab.close()


@pytest.mark.browser
def test_filters_sorting_references_theme_and_charts_work(page: str, data: Path, browser: Any) -> None:
    tab = browser.new_page(color_scheme="light", viewport={"width": 1280, "height": 800})
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto((data / "report" / "index.html").as_uri())
    shown = tab.locator(".examples > li:visible")
    total = tab.locator(".examples > li").count()
    assert {shown.nth(n).get_attribute("data-dataset") for n in range(shown.count())} == {"scenes-com"}
    tab.select_option("[name=dataset]", "")
    assert shown.count() == total
    tab.select_option("[name=method]", "clip-zero-shot")
    counts = {}
    for outcome in ("right", "wrong"):
        tab.select_option("[name=outcome]", outcome)
        counts[outcome] = shown.count()
        named = [shown.nth(n).get_attribute("data-right").split() for n in range(shown.count())]
        assert all(("clip-zero-shot" in methods) == (outcome == "right") for methods in named)
    assert sum(counts.values()) == total and min(counts.values()) > 0
    tab.select_option("[name=dataset]", "scenes-vqa")
    tab.select_option("[name=category]", "binary")
    assert f"{shown.count()} of {total}" in tab.locator("#shown").inner_text()

    box = tab.locator(".matrix").first
    column = box.locator("thead button").nth(2)
    column.click()
    values = [float(text) for text in box.locator("tbody td:nth-child(3) span:first-child").all_inner_texts()]
    assert values == sorted(values, reverse=True) and box.locator("[aria-sort=descending]").count() == 1
    box.locator("select.reference").select_option("denoising")
    row = box.locator("tr[data-method=denoising]")
    assert set(row.locator(".gap").all_inner_texts()) == {"reference"}
    stored = json.loads(re.findall(r'id="gaps">(.*?)</script>', page)[0])["all"]["denoising"]["dsd"][0]
    assert stored["text"] in box.locator("tr[data-method=dsd] .gap").first.inner_text()
    box.locator("tr[data-method=dsd] th button").click()
    assert set(box.locator("tr[data-method=dsd] .gap").all_inner_texts()) == {"reference"}

    before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.click("#theme")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
    chart = tab.locator(".chart:visible").first
    label = chart.locator("svg").get_attribute("aria-label")
    chart.hover()
    tab.wait_for_selector(".chart[data-live=yes]", timeout=60_000)
    assert chart.locator("svg").get_attribute("aria-label") == label and errors == []
    tab.close()
