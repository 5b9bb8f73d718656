"""The variants of a study: params with keys changed, and what the ranks of a method depend on. No model runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from pydantic import TypeAdapter, ValidationError

from dsd.config import BackboneParams, Params, StudyParams, assign, mistake
from dsd.errors import ParamsError
from dsd.store import digest
from dsd.versions import versioned

FEW_SHOT = "dataset.few_shot"
REPLICATED = {"dataset.sample", "noise.sample"}  # keys of variants that repeat a measurement, with other random choices
Identify: TypeAlias = Callable[[BackboneParams], str]  # the digest of a row's checkpoint


@dataclass(frozen=True)
class Study:
    """A row of `studies` and the params that its variants change."""

    name: str
    params: Params

    @property
    def row(self) -> StudyParams:
        return self.params.studies[self.name]

    def variant(self, variant: str, dataset: str, methods: Iterable[str]) -> Params:
        """The params that a variant is run with: the dataset alone, these methods, and the keys that it changes.

        The method that trains the attention prompt is added if one of these uses the prompt.

        Raises:
            ParamsError: a key that does not exist, or a value that it cannot have; one line.
        """
        content = self._changed(self.params.model_dump(mode="json"), variant, dataset)
        try:
            whole = Params.model_validate(content)
        except ValidationError as error:
            raise ParamsError(mistake(error.errors()[0], self._where(variant))) from None
        names = dict.fromkeys(methods)
        names |= {trainer: None for name in names if (trainer := trained_by(whole, name))}
        return whole.model_copy(
            update={
                "datasets": {dataset: whole.datasets[dataset]},
                "methods": {name: row for name, row in whole.methods.items() if name in names},
                "training": {name: row for name, row in whole.training.items() if name in names},
            }
        )

    def changed(self, variant: str, dataset: str) -> Params:
        """All params with the keys of a variant changed; the checks across sections are those of `variant`.

        Raises:
            ParamsError: as `variant`.
        """
        sections = {key.partition(".")[0] for key in self.row.variants[variant]}
        sections = {"datasets" if section == "dataset" else section for section in sections}
        content = self._changed(self.params.model_dump(mode="json", include=sections), variant, dataset)
        try:
            update = {
                section: TypeAdapter(cast(Any, Params.model_fields[section].annotation)).validate_python(value)
                for section, value in content.items()
            }
        except ValidationError as error:
            raise ParamsError(mistake(error.errors()[0], self._where(variant))) from None
        return self.params.model_copy(update=update)

    def keys(self, dataset: str, identify: Identify) -> dict[str, dict[str, str]]:
        """Return variant → method → the key of its ranks on a dataset."""
        return {variant: self._keys(self.changed(variant, dataset), dataset, identify) for variant in self.row.variants}

    def own_keys(self, dataset: str, identify: Identify) -> dict[str, str]:
        """Return method → the key of its ranks under the params without changes."""
        return self._keys(self.params, dataset, identify)

    def _keys(self, params: Params, dataset: str, identify: Identify) -> dict[str, str]:
        return {m: method_key(params, dataset, m, self.row.split, identify) for m in self.row.methods}

    def pieces(self, dataset: str, identify: Identify) -> dict[str, dict[str, str]]:
        """Return `keys`, of each distinct key the first.

        On the test split those of the params without changes are left out too: their results are those of the report.
        """
        known = set(self.own_keys(dataset, identify).values()) if self.row.split == "test" else set[str]()
        pieces: dict[str, dict[str, str]] = {}
        for variant, keys in self.keys(dataset, identify).items():
            pieces[variant] = {method: key for method, key in keys.items() if key not in known}
            known |= set(keys.values())
        return pieces

    def _where(self, variant: str) -> str:
        return f"studies.{self.name}.variants.{variant}"

    def _changed(self, content: dict[str, Any], variant: str, dataset: str) -> dict[str, Any]:
        for key, value in self.row.variants[variant].items():
            assign(content, self.row.path_of(key, dataset), value, f"{self._where(variant)}.{key}")
        return content


def trained_by(params: Params, method: str) -> str | None:
    """Return the row of `training` that a method uses, None for a method without training."""
    row = params.methods[method]
    if row.zero_shot:
        return None
    return method if row.contrastive else params.prompted


def method_key(params: Params, dataset: str, method: str, split: str, identify: Identify) -> str:
    """Return the digest of everything that the ranks of a method without a schedule depend on.

    What it does not depend on is left out: a method without training does not depend on the few-shot split, a
    contrastive one not on noise, and only one that reads attention, or was trained by it, on how it is pooled.
    """
    row, trainer = params.methods[method], trained_by(params, method)
    backbone = params.backbones[params.backbone_of(method)]
    unused = {"draws_per_level"} | ({"few_shot", "sample"} if trainer is None else set())
    content = [dataset, split, params.seed, params.images, params.datasets[dataset].model_dump(exclude=unused)]
    content += [row, backbone, identify(backbone)]
    if not row.contrastive:
        content.append(params.noise_of(dataset))
    if row.reads_pooling is not None or (trainer is not None and not row.contrastive):
        content.append({prompt: params.evidence.settings(prompt) for prompt in row.evidence_prompts})
    if trainer is not None:
        training = params.methods[trainer]
        sections = {"attention prompt": params.prompt, "context": params.context}
        content += [params.training[trainer], training, sections.get(str(training.learns))]
    if row.fits_weights:
        content.append(params.fusion)
    return versioned("studies", digest(content))
