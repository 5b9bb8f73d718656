"""The results of a reproduction in a workspace, as the registry records them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from dsd.config import Params
from dsd.errors import DataError
from dsd.store import file_digest
from dsd.versions import VERSIONS, moved_versions
from flows import absolute
from flows.command import commit

if TYPE_CHECKING:  # it imports mlflow.pyfunc and starlette
    from flows.serving.settings import Settings


class Measurement:
    """The results in the workspace `root`, and the checkpoint and the params that they were measured with."""

    def __init__(self, params: Params, root: Path) -> None:
        from dsd.models.checkpoint import identify  # it imports torch

        file = root / "data" / "evaluate" / "metrics.json"
        if not file.exists():
            raise DataError(f"{file}: no results in this workspace; run `dsd reproduce` first")
        self.params, self.root = params, root
        # Older workspaces have no record.
        record = file.with_name("code.json")
        self.code = json.loads(record.read_text()) if record.exists() else {}
        if moved := moved_versions(self.code.get("versions", {}), VERSIONS):
            raise DataError(f"{file}: measured by other code ({', '.join(moved)}); run `dsd reproduce` first")
        row = params.backbones[params.backbone]
        self.digest = row.digest or identify(row)  # a checkpoint whose digest differs from its row is never measured
        # dataset → method → metric → value, low, high, n
        self.metrics: dict[str, Any] = json.loads(file.read_text())

    def tags(self) -> dict[str, str]:
        """The tags that all versions of this measurement share."""
        row = self.params.backbones[self.params.backbone]
        return {
            "dsd.digest": self.digest,
            "dsd.source": absolute(row).source,
            "dsd.revision": row.revision or "",
            "dsd.commit": commit(self.root),
            "dsd.lock": file_digest(self.root / "dvc.lock"),
            "dsd.versions": json.dumps(self.code.get("versions", {})),
            "dsd.libraries": json.dumps(self.code.get("libraries", {})),
            "dsd.params": self.params.model_dump_json(exclude={"studies", "pretrain"}),
        }

    def values(self) -> dict[str, float]:
        """The value of each metric by dataset/method/metric."""
        return {
            f"{dataset}/{method}/{metric}": interval["value"]
            for dataset, methods in self.metrics.items()
            for method, intervals in methods.items()
            for metric, interval in intervals.items()
        }

    def prompts(self, datasets: Iterable[str] | None = None) -> dict[str, Path]:
        """The file of the attention prompt that was trained on each dataset; by default on those with results."""
        from dsd.models.prompts import PROMPT  # it imports torch

        folder, method = self.root / "data" / "train", str(self.params.prompted)
        files = {name: folder / name / method / PROMPT for name in (self.metrics if datasets is None else datasets)}
        return {name: file for name, file in files.items() if file.exists()}

    def served(self) -> tuple[Settings, Path | None]:
        """The settings and the prompt file of the served model."""
        from flows.serving.settings import Settings

        settings = Settings.of(self.params, self.digest)
        if (dataset := self.params.serving.prompt) is None:
            return settings, None
        if (file := self.prompts([dataset]).get(dataset)) is None:
            folder = self.root / "data" / "train" / dataset
            raise DataError(f"{folder}: no attention prompt (serving.prompt); run `dsd reproduce`")
        return settings, file

    def ranks(self) -> dict[str, dict[str, Any]]:
        """`gate.Ranks` of each dataset, with the ranks of every method."""
        from dsd.evaluation.gate import Ranks
        from dsd.scorers.evidence import scored_examples

        data, ranks = self.root / "data", dict[str, dict[str, Any]]()
        for dataset in self.metrics:
            examples = scored_examples(data / "prepare" / dataset, data / "score" / dataset, "test")
            table = pq.read_table(data / "evaluate" / "scores" / f"{dataset}.parquet", columns=["method", "rank"])
            by_method: dict[str, list[int]] = {}
            for method, rank in zip(*(column.to_pylist() for column in table.columns), strict=True):
                by_method.setdefault(method, []).append(rank)
            common = Ranks.of(self.params.datasets[dataset].kind, examples, [])
            ranks[dataset] = {**common._asdict(), "ranks": by_method}
        return ranks
