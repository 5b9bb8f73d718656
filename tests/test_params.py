"""params.yaml: what the sections must agree on, and one line for each mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsd.config import NoisyTrainingParams, Params, load, prompted, trained, twin, under_test
from dsd.errors import ParamsError
from tests.conftest import ROOT

Settings = dict[str, Any]


def move(settings: Settings, old: str, new: str) -> None:
    settings[new] = settings.pop(old)


def staged(**changed: object) -> Settings:
    row: Settings = {"kind": "staged", "to_keep": [5, 1], "n_samples": [1, 8], "shortlist": None, "budget": None}
    return row | changed


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda s: s["training"]["clip-prompt"].update(learningrate=1),
            "unknown key 'training.clip-prompt.learningrate': did you mean 'training.clip-prompt.learning_rate'?",
        ),
        (
            lambda s: s["methods"]["dsd"].update(poolin="maximum"),
            "unknown key 'methods.dsd.poolin': did you mean 'methods.dsd.pooling'?",
        ),
        (
            lambda s: move(s["training"], "clip-prompt", "clip-promt"),
            "training.clip-promt: unknown trained method 'clip-promt': did you mean 'clip-prompt'?",
        ),
        (
            lambda s: s["training"].update({"clip-zero-shot": s["training"]["clip-finetune"]}),
            "training.clip-zero-shot: unknown trained method 'clip-zero-shot'",
        ),
        (lambda s: s["training"].pop("dsd"), "methods.dsd: learns, but training has no row dsd"),
        (lambda s: s["training"]["clip-finetune"].update(levels=[0.2]), "training.clip-finetune.levels: superfluous"),
        (lambda s: s["training"]["dsd"].pop("levels"), "training.dsd.levels: missing"),
        (lambda s: s["training"].update(dsd=3), "training.dsd: Input should be a valid dictionary"),
        (
            lambda s: s["training"]["dsd"].update(epochs=0),
            "training.dsd.epochs: Input should be greater than 0, found 0",
        ),
        (
            lambda s: s["methods"]["clip-finetune"].update(tuned="all"),
            "methods.clip-finetune.tuned: Input should be 'none', 'projections' or 'context', found 'all'",
        ),
        (lambda s: s["methods"]["dsd"].update(layers=-1), "methods.dsd.layers: Input should be 'all', found -1"),
        (
            lambda s: s["methods"]["dsd"].update(prompt="none"),
            "methods.dsd-plus.prompt: few-shot, but no method trains it",
        ),
        (
            lambda s: s["races"]["datasets"].update({"scenes-clss": ["denoising"]}),
            "races.datasets: unknown dataset 'scenes-clss': did you mean 'scenes-cls'",
        ),
        (
            lambda s: s["datasets"]["scenes-cls"].update(template="a photo"),
            "datasets.scenes-cls.template: String should match pattern",
        ),
        (
            lambda s: s["races"]["datasets"].update({"scenes-cls": ["denoisin"]}),
            "races.datasets.scenes-cls: unknown method 'denoisin': did you mean 'denoising'",
        ),
        (lambda s: s["races"]["exhaustive"]["draws"].append(65), "races.exhaustive.draws: 65, but there are 64 in all"),
        (
            lambda s: s["schedules"].update(few=staged(n_samples=[1, 65])),
            "schedules.few.n_samples: 65, but races has 64 draws in all",
        ),
        (
            lambda s: s["schedules"].update(few=staged(n_samples=[4, 4])),
            "schedules.few.n_samples: must rise from stage to stage, not [4, 4]",
        ),
        (
            lambda s: s["schedules"].update(few=staged(to_keep=[1, 2])),
            "schedules.few.to_keep: must fall from stage to stage, not [1, 2]",
        ),
        (
            lambda s: s["schedules"].update(few=staged(shortlist={"proposer": "clip", "keep": 5})),
            "schedules.few.shortlist.proposer: unknown contrastive method 'clip'",
        ),
        (
            lambda s: s["schedules"].update(
                few={
                    "kind": "hierarchical",
                    **s["races"]["published"],
                    "samples": 9,
                    "direction": "clean",
                    "shortlist": None,
                    "budget": None,
                }
            ),
            "schedules.few.samples: 9 at each level, but races.draws_per_level is 8",
        ),
        (lambda s: s["races"]["published"].update(samples=9), "races.published.samples: more than the 8 of"),
        (lambda s: s["races"]["racing"].update(deltas=[1.0]), "races.racing.deltas.0: Input should be less than 1"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(
    change: Callable[[Settings], object], line: str, tmp_path: Path
) -> None:
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    change(settings)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    with pytest.raises(ParamsError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: {line}") and "\n" not in str(error.value)


def test_nothing_need_learn(tmp_path: Path) -> None:
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["methods"] = {name: settings["methods"][name] for name in ("clip-zero-shot", "denoising")}
    settings |= {"training": {}, "studies": {}, "schedules": {}}
    settings["ablations"]["methods"] = []
    settings["races"]["datasets"] = {}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(settings))
    params = load(path)
    assert (prompted(params), under_test(params), twin(params), trained(params)) == (None, "denoising", None, [])
    settings["methods"].pop("denoising")
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ParamsError, match="methods: none sees with the diffusion model; one must"):
        load(path)


def test_what_has_a_schedule_may_learn_and_needs_its_pooling(tmp_path: Path) -> None:
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    levels = settings["races"]["levels"]
    listed = {"kind": "staged", "shortlist": None, "to_keep": [1], "n_samples": [4], "budget": None}
    own = {**settings["methods"]["dsd"], "schedule": "listed", "levels": levels}
    settings |= {"schedules": {"listed": listed}, "studies": {}}
    path = tmp_path / "params.yaml"

    def loaded(**methods: object) -> Params:
        path.write_text(yaml.safe_dump(settings | {"methods": {**methods, **settings["methods"]}}, sort_keys=False))
        return load(path)

    assert prompted(loaded(first=own)) == "dsd"  # one without a schedule goes before
    settings["ablations"]["methods"] = []
    settings["races"]["datasets"] = {}
    del settings["training"]["dsd"]
    settings["serving"] |= {"method": "first", "prompt": "scenes-com"}
    settings["methods"] = {name: row for name, row in settings["methods"].items() if row["scorer"] == "contrastive"}
    with pytest.raises(ParamsError, match=r"methods\.first: learns, but training has no row first"):
        loaded(first=own)
    settings["training"]["first"] = yaml.safe_load((ROOT / "params.yaml").read_text())["training"]["dsd"]
    params = loaded(first=own)
    assert (prompted(params), trained(params)[0]) == ("first", "first")
    with pytest.raises(ParamsError, match=r"methods\.first\.pooling: 'logsumexp' is not among evidence\.poolings"):
        settings["evidence"]["poolings"] = ["maximum", "logits"]
        settings["ablations"]["pooling"] = ["maximum"]
        loaded(first=own)


def test_what_learns_has_a_row() -> None:
    params = load(ROOT / "params.yaml")
    assert trained(params) == list(params.training) == ["dsd", "clip-finetune", "clip-prompt"]
    assert prompted(params) == "dsd"
    assert [isinstance(row, NoisyTrainingParams) for row in params.training.values()] == [True, False, False]
