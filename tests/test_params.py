"""Params: what the sections must agree on, the files they are read from, kinds of rows, and one line per mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from dsd.config import (
    DatasetParams,
    MethodParams,
    Params,
    ScheduledMethod,
    ScheduleParams,
    by_file,
    file_of,
    files,
    load,
    merged,
    mistake,
    read,
)
from dsd.config.load import EXTENSIBLE
from dsd.errors import ParamsError
from tests.conftest import ROOT, read_settings, write_settings

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
        (
            lambda s: s["methods"]["dsd"].update(layers=-1),
            "methods.dsd.layers: must be all or a number above 0, found -1",
        ),
        (lambda s: s["methods"]["dsd"].update(levels=[]), "methods.dsd.levels: needs at least one value"),
        (lambda s: s["noise"]["levels"].append(0.2), "noise.levels: needs at least one value, and none twice"),
        (
            lambda s: s["methods"]["dsd-plus"].update(parts=["denoising", "denoising"]),
            "methods.dsd-plus.parts: needs at least one value, and none twice",
        ),
        (lambda s: s["ablations"].update(parts=[[]]), "ablations.parts.0: needs at least one value"),
        (lambda s: s["evidence"]["poolings"].append("cosine"), "evidence.poolings: needs at least one value"),
        (lambda s: s["fusion"].update(penalties=[]), "fusion.penalties: needs at least one value"),
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
            "races.datasets.scenes-cls: unknown schedulable method 'denoisin': did you mean 'denoising'",
        ),
        (
            lambda s: s["races"]["datasets"].update({"scenes-cls": ["dsd-plus"]}),
            "races.datasets.scenes-cls: unknown schedulable method 'dsd-plus'",
        ),
        (
            lambda s: s["races"]["datasets"].update({"scenes-cls": ["clip-zero-shot"]}),
            "races.datasets.scenes-cls: unknown schedulable method 'clip-zero-shot'",
        ),
        (
            lambda s: s["races"]["racing"]["proposer"].append("denoising"),
            "races.racing.proposer: unknown contrastive method 'denoising'",
        ),
        (
            lambda s: s["schedules"].update(few=staged(shortlist={"proposer": "clip-zero-shot", "keep": 0})),
            "schedules.few.shortlist.keep: Input should be greater than 0",
        ),
        (
            lambda s: s["ablations"].update(heads=[0]),
            "ablations.heads.0: must be weighted, mean or a number above 0, found",
        ),
        (
            lambda s: s["gate"].update(method="clip-prompt"),
            "gate.method: clip-prompt uses embedded-clip whatever the ch",
        ),
        (
            lambda s: s["evaluate"].update(resamples=39),
            "evaluate.resamples: must be at least 40 for a confidence of 0.9",
        ),
        (lambda s: s["evidence"].update(scale=0.01), "evidence.scale: Input should be greater than or equal to 1"),
        (lambda s: s["images"].update(parity=10**6), "images.parity: Input should be less than or equal to 4096"),
        (lambda s: s["noise"].update(sample=2**32), "noise.sample: Input should be less than 4294967296"),
        (
            lambda s: s["datasets"]["scenes-vqa"].update(binary=1.0),
            "datasets.scenes-vqa.binary: 1 leaves one kind of questions without",
        ),
        (lambda s: s["gate"].update(method="dsdd"), "gate.method: unknown method 'dsdd': did you mean 'dsd'?"),
        (
            lambda s: move(s["gate"]["datasets"], "scenes-com", "scenes-con"),
            "gate.datasets.scenes-con: unknown dataset 'scenes-con': did you mean 'scenes-com'?",
        ),
        (
            lambda s: s["backbones"]["embedded"].update(family="stable-difusion"),
            "backbones.embedded.family: unknown family 'stable-difusion': did you mean 'stable-diffusion'?",
        ),
        (
            lambda s: s.update(backbone="embedded-clip"),
            "backbone: embedded-clip is of family clip; the model under test",
        ),
        (
            lambda s: s["methods"]["clip-prompt"].update(backbone="embedded"),
            "methods.clip-prompt.backbone: unknown CLIP in backbones 'embedded': did you mean 'embedded-clip'?",
        ),
        (
            lambda s: s["backbones"]["embedded-clip"].update(lora="mine.bin"),
            "backbones.embedded-clip.lora: must be null for family clip",
        ),
        (
            lambda s: s["datasets"]["scenes-ref"].update(candidates=1),
            "datasets.scenes-ref.candidates: Input should be greater than or equal to 2, found 1",
        ),
        (
            lambda s: s["datasets"]["scenes-ref"].pop("candidates"),
            "datasets.scenes-ref.candidates: scenes-ref needs it",
        ),
        (lambda s: s["datasets"]["scenes-vqa"].pop("binary"), "datasets.scenes-vqa.binary: scenes-vqa needs it"),
        (lambda s: s["datasets"]["scenes-cls"].pop("template"), "datasets.scenes-cls.template: scenes-cls needs it"),
        (lambda s: s["datasets"]["scenes-com"].update(binary=0.5), "datasets.scenes-com.binary: scenes-com takes none"),
        (
            lambda s: s["datasets"]["scenes-cls"].update(test=4000),
            "datasets.scenes-cls.size: 4000, but its three splits have 4320 examples",
        ),
        (
            lambda s: s["datasets"]["scenes-cls"].update(few_shot=0.0001),
            "datasets.scenes-cls.few_shot: 0.0001 leaves no example, but dsd is trained on them",
        ),
        (lambda s: s["watch"].update(cron="61 * * * *"), "watch.cron: must be five fields: minute, hour,"),
        (lambda s: s["watch"].update(cron="0 0 31 2 *"), "watch.cron: must be five fields: minute, hour,"),
        (lambda s: s["watch"].update(cron="* * * * * *"), "watch.cron: must be five fields: minute, hour,"),
        (
            lambda s: s["serving"].update(method="dsd"),
            "serving.prompt: dsd needs the dataset whose prompt it uses, found",
        ),
        (
            lambda s: s["methods"]["dsd"].update(scorer="dsd"),
            "methods.dsd.scorer: unknown scorer 'dsd' (choices: contra",
        ),
        (lambda s: s["methods"]["dsd"].pop("scorer"), "methods.dsd.scorer: Field required"),
        (
            lambda s: s["datasets"]["scenes-com"].update(kind="scenes-con"),
            "datasets.scenes-com.kind: unknown kind 'scenes-con': did you mean 'scenes-com'?",
        ),
        (
            lambda s: s["studies"]["samples"]["variants"].update(bad={"dataset.sampel": 1}),
            "studies.samples.variants.bad.dataset.sampel: unknown key 'sampel': did you mean 'sample'?",
        ),
        (lambda s: s["races"]["staged"].update(to_keep=[[1, 5]]), "races.staged.to_keep.0: must fall from stage to"),
        (lambda s: s["datasets"].update({"../up": s["datasets"]["scenes-com"]}), "datasets.../up: a name has letters"),
        (lambda s: s["methods"].update({"a/b": s["methods"]["denoising"]}), "methods.a/b: a name has letters"),
        (lambda s: s["studies"].update({"..": s["studies"]["samples"]}), "studies...: a name has letters"),
        (lambda s: s.update(seed=False), "seed: must not be yes, no, true or false, found False"),
        (
            lambda s: s["runtime"].update(batch_size=True),
            "runtime.batch_size: must not be yes, no, true or false, found",
        ),
        (
            lambda s: s["datasets"]["scenes-com"].update(few_shot=True),
            "datasets.scenes-com.few_shot: must not be yes, no, true or false, found True",
        ),
        (
            lambda s: s["training"]["dsd"].update(learning_rate=float("inf")),
            "training.dsd.learning_rate: Input should be a finite number",
        ),
        (lambda s: s["races"]["exhaustive"].update(draws=[]), "races.exhaustive.draws: needs at least one value"),
        (lambda s: s["races"]["racing"].update(threshold=[]), "races.racing.threshold: needs at least one value"),
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
            "schedules.few.to_keep: must fall from stage to stage, found [1, 2]",
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
                    "reading": "text",
                    "shortlist": None,
                    "budget": None,
                }
            ),
            "schedules.few.samples: 9 at each level, but races.draws_per_level is 8",
        ),
        (lambda s: s.update(seed=2**32), "seed: Input should be less than 4294967296"),
        (lambda s: s["noise"].update(levels=[0.5, 0.5000001]), "noise.levels: levels must differ by at least 1e-06"),
        (lambda s: s["races"]["exhaustive"].update(draws=[True, 2]), "races.exhaustive.draws: must not be yes, no,"),
        (lambda s: s["gate"]["datasets"]["scenes-com"].update(minimum_effect=1), "gate.datasets.scenes-com.minimum_ef"),
        (lambda s: s["races"]["published"].update(samples=9), "races.published.samples: more than the 8 of"),
        (lambda s: s["races"]["racing"].update(deltas=[1.0]), "races.racing.deltas.0: Input should be less than 1"),
        (
            lambda s: s["schedules"]["racing"].update(delta=0.03),
            "schedules.racing.delta: 0.03 is not calibrated; add it to races.racing.deltas",
        ),
        (
            lambda s: s["schedules"]["racing"].update(budget=3.0),
            "schedules.racing.budget: 3.0 is not calibrated; add it to races.racing.budget",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(
    change: Callable[[Settings], object], line: str, tmp_path: Path
) -> None:
    settings = read_settings(ROOT)
    change(settings)
    write_settings(settings, tmp_path)
    path = tmp_path / "params.yaml"
    with pytest.raises(ParamsError) as error:
        load(path)
    section = line.split(".")[0]
    file = path.with_name(f"{section}.yaml") if section in ("races", "studies") else path
    assert str(error.value).startswith(f"{file}: {line}") and "\n" not in str(error.value)


def test_nothing_need_learn(tmp_path: Path) -> None:
    settings = read_settings(ROOT)
    settings["methods"] = {name: settings["methods"][name] for name in ("clip-zero-shot", "denoising")}
    settings |= {"training": {}, "studies": {}, "schedules": {}}
    settings["ablations"]["methods"] = []
    settings["races"]["datasets"] = {}
    settings["gate"]["method"] = "denoising"
    path = tmp_path / "params.yaml"
    write_settings(settings, tmp_path)
    params = load(path)
    assert (params.prompted, params.under_test, params.twin, params.trained) == (None, "denoising", None, [])
    settings["methods"].pop("denoising")
    write_settings(settings, tmp_path)
    with pytest.raises(ParamsError, match="methods: none uses the diffusion model; one must"):
        load(path)


def test_what_has_a_schedule_may_learn_and_needs_its_pooling(tmp_path: Path) -> None:
    settings = read_settings(ROOT)
    levels = settings["races"]["levels"]
    listed = {"kind": "staged", "shortlist": None, "to_keep": [1], "n_samples": [4], "budget": None}
    own = {**settings["methods"]["dsd"], "schedule": "listed", "levels": levels}
    settings |= {"schedules": {"listed": listed}, "studies": {}}

    def loaded(**methods: object) -> Params:
        write_settings(settings | {"methods": {**methods, **settings["methods"]}}, tmp_path)
        return load(tmp_path / "params.yaml")

    assert loaded(first=own).prompted == "dsd"  # one without a schedule goes before
    settings["ablations"]["methods"] = []
    settings["races"]["datasets"] = {}
    del settings["training"]["dsd"]
    settings["serving"] |= {"method": "first", "prompt": "scenes-com"}
    settings["gate"]["method"] = "first"
    settings["methods"] = {name: row for name, row in settings["methods"].items() if row["scorer"] == "contrastive"}
    with pytest.raises(ParamsError, match=r"methods\.first: learns, but training has no row first"):
        loaded(first=own)
    settings["training"]["first"] = read_settings(ROOT)["training"]["dsd"]
    params = loaded(first=own)
    assert (params.prompted, params.trained[0]) == ("first", "first")
    with pytest.raises(ParamsError, match=r"methods\.first\.pooling: 'logsumexp' is not among evidence\.poolings"):
        settings["evidence"]["poolings"] = ["maximum", "logits"]
        settings["ablations"]["pooling"] = ["maximum"]
        loaded(first=own)


def test_what_learns_has_a_row() -> None:
    params = load(ROOT / "params.yaml")
    assert params.trained == list(params.training) == ["dsd", "clip-finetune", "clip-prompt"]
    assert params.prompted == "dsd"
    assert [row.levels is not None for row in params.training.values()] == [True, False, False]


def test_sections_are_read_from_all_files() -> None:
    sections = read(ROOT / "params.yaml")
    assert list(load(ROOT / "params.yaml").model_dump()) and set(sections) == set(Params.model_fields)
    contents = by_file(sections, ROOT / "params.yaml")
    assert list(contents) == files(ROOT / "params.yaml") and merged(contents, ROOT / "params.yaml") == sections
    assert all(section in contents[file_of(section, ROOT / "params.yaml")] for section in sections)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("studies.yaml", None, "{}/studies.yaml: no such file; it must hold the section studies"),
        ("params.yaml", None, "{}/params.yaml: no such file; run from the project's folder"),
        ("races.yaml", "races: [", "{}/races.yaml: not valid YAML"),
        ("races.yaml", "", "{}/races.yaml: not a mapping of sections, found None"),
        ("races.yaml", "raecs: {}", "{0}/races.yaml: holds the section raecs, which belongs in {0}/params.yaml alone"),
        ("races.yaml", "{}", "{}/races.yaml: races: Field required"),
        ("races.yaml", "races: {}", "{}/races.yaml: races.datasets: Field required"),
        ("params.yaml", "races: {}", "{0}/params.yaml: holds the section races, which belongs in {0}/races.yaml alone"),
        ("studies.yaml", "{studies: {}, seed: 1}", "{0}/studies.yaml: holds the section seed, which belongs in {0}/pa"),
        ("studies.yaml", "studies: {a: 1}", "{}/studies.yaml: studies.a: Input should be a valid dictionary"),
    ],
)
def test_a_mistake_in_a_file_names_it(name: str, text: str | None, line: str, tmp_path: Path) -> None:
    write_settings(read_settings(ROOT), tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(ParamsError) as error:
        load(tmp_path / "params.yaml")
    assert str(error.value).startswith(line.format(tmp_path)) and "\n" not in str(error.value)


@pytest.fixture
def no_new_kinds() -> Iterator[None]:
    """Forgets the kinds that a test registers."""
    before = {base: dict(base.kinds) for base in EXTENSIBLE.values()}
    yield
    for base, kinds in before.items():
        base.kinds = kinds


def test_params_are_utf8_whatever_the_locale() -> None:
    """An environment such as LC_ALL=de_DE.ISO-8859-1, where Python reads text as Latin-1."""
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    script = "from dsd.config import load; from flows.presets import applied; from pathlib import Path; load();"
    script += "applied(Path('presets/own-folder.yaml'))"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ascii_only, check=True)


@pytest.mark.usefixtures("no_new_kinds")
def test_a_new_kind_is_one_class() -> None:
    settings = read_settings(ROOT)
    settings["methods"]["mine"] = {"scorer": "mine", "prompt": "none", "levels": [0.2], "schedule": "few", "power": 2}
    settings["schedules"]["few"] = {"kind": "few", "budget": None, "most": 3}
    settings["datasets"]["own"] = {"kind": "own", "few_shot": 0, "sample": 0, "validation": 0, "colours": 5}

    with pytest.raises(ValidationError, match="Input tag 'own' found using 'kind' does not match"):
        Params.model_validate(settings)

    class FewSchedule(ScheduleParams):
        kind: Literal["few"]
        most: int

        @property
        def proposed_by(self) -> str:
            return "clip-zero-shot"

    class OwnDataset(DatasetParams):
        kind: Literal["own"]
        colours: int

    with pytest.raises(ValidationError, match="Input tag 'mine' found using 'scorer' does not match"):
        Params.model_validate(settings)

    class MineMethod(ScheduledMethod):
        scorer: Literal["mine"]
        schedule: str
        power: int

        def check(self, name: str, params: Params) -> None:
            if self.power > 3:
                raise ValueError(f"methods.{name}.power: {self.power} is too much")

    params = Params.model_validate(settings)
    assert isinstance(params.methods["mine"], MineMethod) and isinstance(params.datasets["own"], OwnDataset)
    assert (list(params.raced), params.schedules["few"].proposed_by) == (["mine"], "clip-zero-shot")
    assert (params.backbone_of("mine"), params.noise_of("own")) == (params.backbone, params.noise)
    assert params.model_dump(mode="json")["methods"]["mine"] == settings["methods"]["mine"]
    assert Params.model_validate(params.model_dump()) == params

    settings["methods"]["mine"]["powr"] = settings["methods"]["mine"].pop("power")
    with pytest.raises(ValidationError) as error:
        Params.model_validate(settings)
    assert {mistake(problem, "x") for problem in error.value.errors()} == {
        "x: methods.mine.power: Field required",
        "x: unknown key 'methods.mine.powr': did you mean 'methods.mine.power'? (choices: methods.mine.levels, "
        "methods.mine.power, methods.mine.prompt, methods.mine.schedule, methods.mine.scorer)",
    }
    settings["methods"]["mine"]["power"] = 4
    del settings["methods"]["mine"]["powr"]
    with pytest.raises(ValidationError, match=r"methods\.mine\.power: 4 is too much"):
        Params.model_validate(settings)
    with pytest.raises(TypeError, match="kind 'few' is both"):
        type("Other", (ScheduleParams,), {"__annotations__": {"kind": Literal["few"]}, "__module__": __name__})


@pytest.mark.usefixtures("no_new_kinds")
def test_a_kind_is_found_in_the_package_of_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "own_scorers"
    package.mkdir()
    (package / "__init__.py").write_text("from own_scorers import mine\n")
    (package / "mine.py").write_text(
        "from typing import Literal\n"
        "from dsd.config import DiffusionMethod\n"
        "class MineMethod(DiffusionMethod):\n"
        "    scorer: Literal['found']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(MethodParams, "package", "own_scorers")
    load(ROOT / "params.yaml")
    assert "own_scorers" not in sys.modules  # what is known needs no import
    settings = read_settings(ROOT)
    settings["methods"]["mine"] = {"scorer": "found", "prompt": "none", "levels": [0.2]}
    write_settings(settings, tmp_path)
    assert load(tmp_path / "params.yaml").methods["mine"].evidence_prompts == ("none",)


def test_rows_answer_for_themselves() -> None:
    methods = load(ROOT / "params.yaml").methods
    answers = {
        name: (row.evidence_prompts, row.reads_pooling, row.learns, row.zero_shot, row.own_backbone)
        for name, row in methods.items()
    }
    assert answers == {
        "dsd-zero-shot": (("none",), "logsumexp", None, True, None),
        "dsd": (("few-shot",), "logsumexp", "attention prompt", False, None),
        "denoising": (("none",), None, None, True, None),
        "dsd-released": (("none",), "logits", None, True, None),
        "dsd-plus": (("none", "few-shot"), "logsumexp", None, False, None),
        "clip-zero-shot": ((), None, None, True, "embedded-clip"),
        "clip-finetune": ((), None, "projections", False, "embedded-clip"),
        "clip-prompt": ((), None, "context", False, "embedded-clip"),
    }
    unconditional = {
        name: [p for p in ("none", "few-shot") if row.reads_unconditional(p)] for name, row in methods.items()
    }
    assert {name: prompts for name, prompts in unconditional.items() if prompts} == {
        "denoising": ["none"],
        "dsd-released": ["none"],
        "dsd-plus": ["none"],
    }
    denoising = methods["denoising"].model_copy(update={"schedule": "racing"})
    assert (denoising.has_schedule, denoising.evidence_prompts, denoising.reads_unconditional("none")) == (
        True,
        (),
        False,
    )


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "datasets:\n  a: 1\n  b: 2\n  a: 3\n"])
def test_a_key_twice_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ParamsError, match=r"params\.yaml: not valid YAML: the key '(seed|a)' is given twice") as error:
        load(tmp_path / "params.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", ["010", "-07", "1:30"])
def test_a_number_that_dvc_reads_as_another_is_refused(number: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(f"seed: {number}\n")
    with pytest.raises(ParamsError, match=rf"{number} is another number in YAML 1\.2") as error:
        load(tmp_path / "params.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: " + "[" * 3000, "a: " + "9" * 5000])
def test_what_no_parser_survives_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ParamsError) as error:
        load(tmp_path / "params.yaml")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


OUTSIDE = ["../up", "../../../up", "/tmp/up", "a/b", "..", ".", "", "a\0b", "a\nb", "~/up", "a\\b", "-rf", "x" * 101]
NAMED = ["backbones", "datasets", "training", "schedules", "methods", "studies", "watch.sources"]


@pytest.mark.parametrize("section", NAMED)
@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_the_workspace(section: str, name: str) -> None:
    """Stages write to folders and files of these names."""
    settings = read_settings(ROOT)
    rows = settings["watch"]["sources"] if section == "watch.sources" else settings[section]
    rows[name] = next(iter(rows.values()))
    with pytest.raises(ValidationError) as error:
        Params.model_validate(settings)
    assert "a name has letters" in mistake(error.value.errors()[0], "x")


def test_every_table_of_rows_has_checked_names() -> None:
    """A new section of rows by name gets `Name`, unless its names are checked against those of another section."""
    known = {"datasets", "methods", "variants"}  # of races, gate and studies; variants are names in JSON alone

    def unchecked(kind: Any, path: str) -> Iterator[str]:
        for name, field in getattr(kind, "model_fields", {}).items():
            annotation = str(field.annotation)
            free = "Annotated[str" not in annotation and "dict[typing.Literal" not in annotation
            if "dict[" in annotation and free and name not in known:
                yield f"{path}{name}"
            yield from unchecked(field.annotation, f"{path}{name}.")

    assert not list(unchecked(Params, ""))
