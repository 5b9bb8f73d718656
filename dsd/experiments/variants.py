"""The variants of a study: params with keys changed. No model runs here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from dsd.config import Params, StudyParams, assign, mistake
from dsd.errors import ParamsError
from dsd.store import digest
from dsd.versions import versioned

# Sections that scores and ranks depend on.
RANKED_BY = (
    *("seed", "backbone", "backbones", "images", "datasets", "noise", "evidence", "prompt", "context", "training"),
    *("methods", "fusion"),
)


@dataclass(frozen=True)
class Study:
    """A row of `studies` and the params that its variants change."""

    name: str
    params: Params

    @property
    def row(self) -> StudyParams:
        return self.params.studies[self.name]

    def variant(self, variant: str, dataset: str) -> Params:
        """The params of a variant: the dataset alone, the methods of the study, and the keys that the variant changes.

        A key is a path such as `prompt.rank`, see `StudyParams.path_of`.

        Raises:
            ParamsError: a key that does not exist, or a value that it cannot have; one line.
        """
        content = self._changed(self.params.model_dump(mode="json"), variant, dataset)
        try:
            whole = Params.model_validate(content)
        except ValidationError as error:
            raise ParamsError(mistake(error.errors()[0], f"studies.{self.name}.variants.{variant}")) from None
        return whole.model_copy(
            update={
                "datasets": {dataset: whole.datasets[dataset]},
                "methods": {name: whole.methods[name] for name in self.row.methods},
                "training": {name: row for name, row in whole.training.items() if name in self.row.methods},
            }
        )

    def key(self, variant: str, dataset: str) -> str:
        """The digest of all params, and of the code versions, that the ranks of a variant depend on."""
        content = self._changed(self._ranked_by(), variant, dataset)
        content["datasets"] = content["datasets"][dataset]
        for section in ("methods", "training"):
            content[section] = {name: row for name, row in content[section].items() if name in self.row.methods}
        return versioned("studies", digest(content))

    def in_force(self, variant: str) -> bool:
        """Whether params.yaml has the values of a variant, on every dataset."""
        ranked_by = self._ranked_by()
        return all(self._changed(self._ranked_by(), variant, dataset) == ranked_by for dataset in self.row.datasets)

    def _ranked_by(self) -> dict[str, Any]:
        return dict(to_jsonable_python({section: getattr(self.params, section) for section in RANKED_BY}))

    def _changed(self, content: dict[str, Any], variant: str, dataset: str) -> dict[str, Any]:
        for key, value in self.row.variants[variant].items():
            where = f"studies.{self.name}.variants.{variant}.{key}"
            assign(content, self.row.path_of(key, dataset), value, where)
        return content
