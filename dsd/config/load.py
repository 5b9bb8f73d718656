"""The whole of params: its files, the checks across sections, error messages, and functions of several sections."""

from __future__ import annotations

import re
from importlib import import_module
from itertools import product
from math import ceil
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, cast, get_args, get_origin

from pydantic import ValidationError, model_validator
from pydantic_core import ErrorDetails

from dsd.config.base import WORD_FOR_NUMBER, Kind, Name, ParamsModel, Seed, check_known, registered
from dsd.config.datasets import DatasetParams
from dsd.config.experiments import AblationParams, EvaluateParams, RacesParams, ReportParams, StudyParams
from dsd.config.files import file_of, node_at, read
from dsd.config.methods import (
    ContrastiveMethod,
    FusionParams,
    MethodParams,
    ScheduledMethod,
    ScheduleParams,
    TrainingParams,
)
from dsd.config.models import (
    BackboneParams,
    ContextParams,
    EvidenceParams,
    ImageParams,
    NoiseParams,
    PromptParams,
    RuntimeParams,
)
from dsd.config.operations import GateParams, PretrainParams, ServingParams, WatchParams
from dsd.errors import ParamsError, unknown

EXTENSIBLE: dict[str, type[Kind]] = {"datasets": DatasetParams, "schedules": ScheduleParams, "methods": MethodParams}


class Params(ParamsModel):
    seed: Seed
    runtime: RuntimeParams
    backbones: dict[Name, BackboneParams]
    backbone: str
    images: ImageParams
    datasets: dict[Name, DatasetParams]
    noise: NoiseParams
    evidence: EvidenceParams
    prompt: PromptParams
    context: ContextParams
    training: dict[Name, TrainingParams]
    schedules: dict[Name, ScheduleParams]
    methods: dict[Name, MethodParams]
    fusion: FusionParams
    evaluate: EvaluateParams
    ablations: AblationParams
    studies: dict[Name, StudyParams]
    races: RacesParams
    report: ReportParams
    gate: GateParams
    serving: ServingParams
    watch: WatchParams
    pretrain: PretrainParams

    built_with: ClassVar[list[tuple[str, Any]]] = registered()

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Params:
        """Validate against all kinds that are registered now; on an unknown kind, import further kinds and try again.

        Raises:
            ValidationError: see `mistake`.
        """

        def validated() -> Params:
            if cls.built_with != registered():
                cls.model_rebuild(force=True)
                cls.built_with = registered()
            return super(Params, cls).model_validate(obj, **options)

        try:
            return validated()
        except ValidationError as error:
            places = {problem["loc"][0] for problem in error.errors() if problem["type"] == "union_tag_invalid"}
            for section in places & EXTENSIBLE.keys():
                import_module(EXTENSIBLE[str(section)].package)  # its modules register their kinds; takes seconds
            if cls.built_with == registered():
                raise
        return validated()

    @model_validator(mode="after")
    def _rows_agree_with_other_sections(self) -> Params:
        check_known("backbone", "backbone", self.backbone, self.backbones)
        for section in ("backbones", *EXTENSIBLE):
            for name, row in getattr(self, section).items():
                row.check(name, self)
        return self

    @model_validator(mode="after")
    def _ablations_have_evidence(self) -> Params:
        for name in self.ablations.methods:
            check_known("ablations.methods", "method", name, self.methods)
            if not self.methods[name].ablation_keys:
                raise ValueError(f"ablations.methods: {name} cannot be ablated: neither cross-attention nor parts")
            if self.methods[name].has_schedule:
                raise ValueError(f"ablations.methods: {name} has a schedule, so no evidence of it is stored")
        for pooling in self.ablations.pooling:
            if pooling not in self.evidence.poolings:
                raise ValueError(f"ablations.pooling: {pooling!r} is not among evidence.poolings")
        for level in {level for levels in self.ablations.levels for level in levels}:
            if level not in self.noise.levels:
                raise ValueError(f"ablations.levels: {level} is not among noise.levels {list(self.noise.levels)}")
        return self

    @model_validator(mode="after")
    def _studies_have_rows(self) -> Params:
        for name, study in self.studies.items():
            for kind, rows, choices in (
                ("dataset", study.datasets, self.datasets),
                ("method", study.methods, self.methods),
            ):
                for row in rows:
                    check_known(f"studies.{name}.{kind}s", kind, row, choices)
            for row in study.methods:
                if self.methods[row].has_schedule:
                    raise ValueError(f"studies.{name}.methods: {row} has a schedule that was learned for other params")
        return self

    @model_validator(mode="after")
    def _races_have_rows_and_draws(self) -> Params:
        races = self.races
        for name, methods in races.datasets.items():
            check_known("races.datasets", "dataset", name, self.datasets)
            fitting = {method: row for method, row in self.methods.items() if row.can_have_schedule}
            for method in methods:
                check_known(f"races.datasets.{name}", "schedulable method", method, fitting)
        for proposer in filter(None, races.racing.proposer if races.datasets else ()):
            check_known("races.racing.proposer", "contrastive method", proposer, self.contrastive)
        if max(races.exhaustive.draws) > races.draws:
            raise ValueError(
                f"races.exhaustive.draws: {max(races.exhaustive.draws)}, but there are {races.draws} in all"
            )
        if races.published.samples > races.draws_per_level:
            raise ValueError(f"races.published.samples: more than the {races.draws_per_level} of races.draws_per_level")
        return self

    @model_validator(mode="after")
    def _training_rows_match_methods(self) -> Params:
        if all(row.contrastive for row in self.methods.values()):
            raise ValueError("methods: none uses the diffusion model; one must")
        learning = self.trained
        for name in self.training:
            check_known(f"training.{name}", "trained method", name, learning)
        for name in learning:
            row = self.training.get(name)
            if row is None:
                raise ValueError(f"methods.{name}: learns, but training has no row {name}")
            noisy = self.methods[name].learns == "attention prompt"
            if noisy and not row.levels:
                raise ValueError(f"training.{name}.levels: missing; an attention prompt is trained at noise levels")
            if row.levels and not noisy:
                raise ValueError(f"training.{name}.levels: superfluous; a CLIP is trained without noise")
        return self

    @model_validator(mode="after")
    def _serving_has_rows(self) -> Params:
        name, prompt = self.serving.method, self.serving.prompt
        check_known("serving.method", "method", name, self.methods)
        row = self.methods[name]
        if not row.can_be_served:
            raise ValueError(f"serving.method: the scorer of {name} is neither cross-attention nor denoising")
        if row.zero_shot and prompt is not None:
            raise ValueError(f"serving.prompt: {name} has none; set it to null")
        if not row.zero_shot and prompt is None:
            raise ValueError(f"serving.prompt: {name} needs the dataset whose prompt it uses, found null")
        if prompt is not None:
            check_known("serving.prompt", "dataset", prompt, self.datasets)
        return self

    @model_validator(mode="after")
    def _variants_change_existing_keys(self) -> Params:
        sections = self.model_dump(mode="json") if self.studies else {}
        for name, study in self.studies.items():
            for variant, dataset in product(study.variants, study.datasets):
                for key in study.variants[variant]:
                    try:
                        node_at(sections, study.path_of(key, dataset), f"studies.{name}.variants.{variant}.{key}")
                    except ParamsError as error:
                        raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _limits_have_resamples(self) -> Params:
        """Below one resample beyond each limit, an interval is the range of the resamples, whatever its confidence."""
        resamples, confidence = self.evaluate.resamples, self.evaluate.confidence
        if resamples < (least := ceil(round(2 / (1 - confidence), 6))):
            problem = f"must be at least {least} for a confidence of {confidence}, found {resamples}"
            raise ValueError(f"evaluate.resamples: {problem}")
        return self

    @model_validator(mode="after")
    def _gate_has_rows(self) -> Params:
        check_known("gate.method", "method", self.gate.method, self.methods)
        if (own := self.methods[self.gate.method].own_backbone) is not None:
            problem = f"{self.gate.method} uses {own} whatever the checkpoint, so every comparison would be a tie"
            raise ValueError(f"gate.method: {problem}")
        for name in self.gate.datasets:
            check_known(f"gate.datasets.{name}", "dataset", name, self.datasets)
        return self

    def noise_of(self, dataset: str) -> NoiseParams:
        """The noise at which the examples of a dataset are scored."""
        draws = self.datasets[dataset].draws_per_level
        return self.noise if draws is None else self.noise.model_copy(update={"draws_per_level": draws})

    def backbone_of(self, method: str) -> str:
        """The row of `backbones` that a method uses."""
        return self.methods[method].own_backbone or self.backbone

    @property
    def used_backbones(self) -> list[str]:
        """The rows of `backbones` that are used: the model under test first, then those of methods with their own."""
        return list(dict.fromkeys([self.backbone, *map(self.backbone_of, self.methods)]))

    @property
    def contrastive(self) -> dict[str, ContrastiveMethod]:
        """The methods that use a CLIP."""
        return {name: row for name, row in self.methods.items() if isinstance(row, ContrastiveMethod)}

    @property
    def raced(self) -> dict[str, ScheduledMethod]:
        """The methods whose schedule is not exhaustive; they leave rankings and no evidence."""
        return {n: row for n, row in self.methods.items() if isinstance(row, ScheduledMethod) and row.has_schedule}

    def compared(self, dataset: str) -> dict[str, ScheduledMethod]:
        """The methods that `make races` compares schedules for on a dataset."""
        names = self.races.datasets.get(dataset, ())
        return {name: cast(ScheduledMethod, self.methods[name]) for name in names if name in self.methods}

    @property
    def prompted(self) -> str | None:
        """The method whose score trains the attention prompt that all methods with prompt: few-shot share, if any.

        It is the first cross-attention method with prompt: few-shot; one without a schedule takes precedence.
        """
        names = [name for name, row in self.methods.items() if row.learns == "attention prompt"]
        return min(names, key=lambda name: self.methods[name].has_schedule, default=None)

    @property
    def under_test(self) -> str:
        """The method that the report is about: the prompted one, else the first that uses the diffusion model."""
        return self.prompted or next(name for name, row in self.methods.items() if not row.contrastive)

    @property
    def twin(self) -> str | None:
        """The method that differs from the prompted one in its prompt alone, if any."""
        if self.prompted is None:
            return None
        bare = self.methods[self.prompted].model_copy(update={"prompt": "none"})
        return next((name for name, method in self.methods.items() if method == bare), None)

    @property
    def trained(self) -> list[str]:
        """The methods that are trained: the rows of `training`."""
        others = [name for name, row in self.methods.items() if row.learns not in (None, "attention prompt")]
        return [*([self.prompted] if self.prompted else []), *others]


def load(path: Path | str = "params.yaml") -> Params:
    """Read and check params.yaml and the files beside it.

    Raises:
        ParamsError: one line that names the file and the key.
    """
    sections = read(path)
    try:
        return Params.model_validate(sections)
    except ValidationError as error:
        problem = error.errors()[0]
        # The message of a check across sections starts with the key.
        section = problem["loc"][0] if problem["loc"] else re.split(r"\W", problem["msg"].removeprefix(CHECK))[0]
        raise ParamsError(mistake(problem, file_of(str(section), path))) from None


CHECK = "Value error, "  # how pydantic marks the messages of our own checks


def mistake(error: ErrorDetails, where: object) -> str:
    """One line for a validation error: where, which key, and what would be right."""
    key, known = _place(error["loc"])
    value = error["input"]
    if error["type"] == WORD_FOR_NUMBER:
        key, value = [*key, error["ctx"]["key"]], value[error["ctx"]["key"]]
    location = ".".join(key)
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        selector, choices = error["ctx"]["discriminator"].strip("'"), error["ctx"].get("expected_tags")
        location += f".{selector}"
        if choices is None:
            return f"{where}: {location}: Field required"
        known = choices.strip("'").split("', '")
        return f"{where}: {location}: {unknown(selector, error['ctx']['tag'], known)}"
    if error["type"] == "extra_forbidden":
        return f"{where}: {unknown('key', location, ['.'.join([*key[:-1], other]) for other in known])}"
    found = "" if error["type"] == "missing" or not location else f", found {value!r}"
    return f"{where}: {location + ': ' if location else ''}{error['msg'].removeprefix(CHECK)}{found}"


def _place(location: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The key of an error's location, and the keys that its parent accepts, for "did you mean".

    The location of a row also names the chosen member of a union (a method's scorer), which is not part of the key.
    """
    kind: Any = Params
    key: list[str] = []
    known: list[str] = []
    for part in location:
        kind = _bare(kind)
        if part == "[key]":  # the name of a row, which pydantic marks so
            continue
        if choices := _choices(kind):
            kind = choices.get(part)
            continue
        key.append(str(part))
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif get_origin(kind) is tuple:
            kind = get_args(kind)[0]
        else:
            fields = getattr(kind, "model_fields", {})
            known, kind = list(fields), fields[part].annotation if part in fields else None
    return key, known


def _bare(kind: Any) -> Any:
    """The type without annotations and without None."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    members = [member for member in get_args(kind) if member is not type(None)]
    return _bare(members[0]) if get_origin(kind) in (Union, UnionType) and len(members) == 1 else kind


def _choices(kind: Any) -> dict[Any, Any]:
    """The members of a union, by their names in a location."""
    if isinstance(kind, type) and issubclass(kind, Kind):
        return kind.choices()
    return {"": None} if get_origin(kind) in (Union, UnionType) else {}  # no key is below a plain union
