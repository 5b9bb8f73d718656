"""The registry: checkpoints and prompts by version and alias, and the gate between challenger and champion.

A version of the model `dsd-backbone` is one checkpoint as it was measured under some params: a reference to it, never a
copy, which MLflow can load and serve (`flows.serving`). One of `dsd-prompt-<dataset>` is what was trained for it, with
the digest of the backbone that it belongs to. Registering is an upsert, as publishing is.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from dsd.config import BackboneParams, Params, backbone_of, prompted, raced
from dsd.errors import DataError, DsdError
from dsd.store import digest, file_digest, libraries
from dsd.versions import VERSIONS, dependencies, versioned
from flows.tracking import Runs, locked, log_metrics

if TYPE_CHECKING:  # it loads scipy, and a server, which who only looks up can do without
    from dsd.evaluation.gate import Ranks, Verdict
    from flows.serving.server import Settings

BACKBONE = "dsd-backbone"
CHAMPION, CHALLENGER = "champion", "challenger"
PROMOTED, KEPT_OUT, NOT_COMPARED = "promoted", "kept out", "not compared"  # the gate's verdicts
# What no result depends on, and what stands apart from those of `evaluate`.
ASIDE = {
    *("ablations", "backbone", "backbones", "gate", "pretrain", "races"),
    *("report", "runtime", "serving", "studies", "watch"),
}


@dataclass(frozen=True)
class Version:
    """A measured checkpoint: where it is, what it is, what was found, and what the gate said of it ("" if unasked).

    row: that of `backbones` by which it can be had again.
    metrics: dataset → method → metric → value, low, high, n.
    versions: of the code that measured it, by kind of result; empty for one from before versions were recorded.
    compared, against: by dataset the `Compared` with a champion, and the number of that one's version.
    """

    number: int
    key: str
    digest: str
    source: str
    revision: str | None
    row: BackboneParams
    metrics: dict[str, Any]
    verdict: str
    reason: str
    compared: dict[str, Any]
    against: int | None
    commit: str
    lock: str
    versions: dict[str, int]
    created: datetime
    run: str

    @property
    def name(self) -> str:
        return Path(self.source).name


def prompt_model(dataset: str) -> str:
    return f"dsd-prompt-{dataset}"


def evaluation_key(params: Params, identity: str) -> str:
    """The digest of a checkpoint's own digest, and of each setting and code version that its results depend on."""
    used = {name: params.backbones[name] for m in params.methods if (name := backbone_of(params, m)) != params.backbone}
    aside = ASIDE - {"races"} if raced(params) else ASIDE
    arithmetic = params.backbones[params.backbone].dtype
    return versioned("scores", digest(identity, arithmetic, used, params.model_dump(mode="json", exclude=aside)))


class Registry:
    """The registered models of this project, in the store that its runs are in."""

    def __init__(self, runs: Runs | None = None) -> None:
        self.runs = runs or Runs()
        self.client = self.runs.client

    def versions(self) -> list[Version]:
        """Every measured checkpoint, the newest first."""
        return [_version(found) for found in self._all(BACKBONE)]

    def alias(self, alias: str) -> Version | None:
        """The measured checkpoint that has an alias."""
        number = self._aliases(BACKBONE).get(alias)
        return None if number is None else _version(self.client.get_model_version(BACKBONE, number))

    def register(self, params: Params, root: Path) -> Version:
        """Enters what was measured in the workspace `root` as the challenger, unless it is there already.

        Raises:
            DataError: nothing was measured there.
            CheckpointError: the checkpoint cannot be had any more.
        """
        file = root / "data" / "evaluate" / "metrics.json"
        if not file.exists():
            raise DataError(f"{file}: nothing has been measured here; run `dsd reproduce` first")
        row = params.backbones[params.backbone]
        identity = row.digest or _located(row)  # nothing is measured that has another digest than its row
        key, metrics = evaluation_key(params, identity), json.loads(file.read_text())
        source = str(Path(row.source).resolve()) if Path(row.source).exists() else row.source
        tags = {
            "dsd.digest": identity,
            "dsd.source": source,
            "dsd.revision": row.revision or "",
            "dsd.commit": commit(root),
            "dsd.lock": file_digest(root / "dvc.lock"),
            "dsd.versions": json.dumps(VERSIONS),
            "dsd.libraries": json.dumps(libraries()),
            "dsd.params": params.model_dump_json(exclude={"studies", "pretrain"}),
        }
        with locked():
            run = self._measured(params, root, digest(key, metrics), metrics, tags)
            for dataset in metrics:
                self._register_prompt(params, root, dataset, run, {**tags, "dsd.metrics": json.dumps(metrics[dataset])})
            shown = {**tags, "dsd.key": key, "dsd.metrics": json.dumps(metrics)}
            number = self._upsert(BACKBONE, run, "backbone", digest(key, metrics), shown)
            if self._aliases(BACKBONE).get(CHAMPION) != number:
                self.client.set_registered_model_alias(BACKBONE, CHALLENGER, number)
        return _version(self.client.get_model_version(BACKBONE, number))

    def challenge(self, params: Params, challenger: Version) -> Verdict:
        """Lets a version challenge the champion; the verdict stands in its tags, and the aliases follow it.

        Where the champion itself was asked other examples than before, nobody can be compared with what it answered
        then: its new version takes the place of the old one.

        Raises:
            DsdError: see `dsd.evaluation.gate.judge`; the tags say it too, as the reason why it was not compared.
        """
        from dsd.evaluation.gate import Verdict, judge, others_asked

        with locked():
            champion = self.alias(CHAMPION)
            if champion is not None and champion.number == challenger.number:
                if challenger.verdict:
                    return Verdict(False, "it is the champion already", {})
                self._carry_out(challenger, PROMOTED, challenger.reason)  # a kill has kept it from being said
                return Verdict(True, challenger.reason, {})
            against = {} if champion is None else {"against": str(champion.number)}
            try:
                asked = self.ranks(challenger, params.gate.method)
                before = None if champion is None else self.ranks(champion, params.gate.method)
                own = champion is not None and champion.digest == challenger.digest
                moved = [] if champion is None else _moved(champion.versions, challenger.versions)
                if own and before is not None and (moved or others_asked(params, asked, before)):
                    what = "by other code" if moved else "on other examples"
                    verdict = Verdict(True, f"the champion itself, measured {what} than before", {})
                elif moved:
                    raise DataError(f"measured by other code than the champion ({', '.join(moved)}): evaluate it again")
                else:
                    verdict = judge(params, asked, before)
            except DsdError as error:
                self._carry_out(challenger, NOT_COMPARED, str(error), **against)
                raise
            compared = json.dumps({name: asdict(compared) for name, compared in verdict.compared.items()})
            told = PROMOTED if verdict.promoted else KEPT_OUT
            self._carry_out(challenger, told, verdict.reason, compared=compared, **against)
        return verdict

    def _carry_out(self, version: Version, verdict: str, reason: str, **more: str) -> None:
        """Does what the verdict says and writes it down, as tags and as the description that MLflow's own pages show.

        The verdict is last: where a kill comes before it, the gate is asked again.
        """
        for name, value in {"reason": reason, **more}.items():
            self.client.set_model_version_tag(BACKBONE, str(version.number), f"dsd.{name}", value)
        if verdict == PROMOTED:
            self._promote(version)
        self.client.update_model_version(BACKBONE, str(version.number), f"{verdict}: {reason}")
        self.client.set_model_version_tag(BACKBONE, str(version.number), "dsd.verdict", verdict)

    def ranks(self, version: Version, method: str) -> dict[str, Ranks]:
        """By dataset, how a method answered the test examples with a version.

        Raises:
            DataError: it was not measured by that method.
        """
        from dsd.evaluation.gate import Ranks

        found = {}
        with TemporaryDirectory() as folder:
            told = json.loads(Path(self.client.download_artifacts(version.run, "ranks.json", folder)).read_text())
        for name, row in told.items():
            if method not in row["ranks"]:
                raise DataError(f"{BACKBONE} version {version.number}: was not measured by {method} (gate.method)")
            found[name] = Ranks(**{**row, "ranks": row["ranks"][method]})
        return found

    def prompt(self, reference: str, target: Path) -> Path:
        """Fetches a registered prompt, `models:/dsd-prompt-<dataset>@<alias>` or `…/<version>`, into a folder.

        Raises:
            DsdError: there is none.
        """
        from dsd.models.prompts import PROMPT  # it loads torch

        try:
            name, _, alias = reference.removeprefix("models:/").partition("@")
            if alias:
                version = self.client.get_model_version_by_alias(name, alias)
            else:
                version = self.client.get_model_version(*name.split("/"))
            found = f"prompts/{version.tags['dsd.dataset']}"
            return Path(self.client.download_artifacts(version.run_id, found, str(target))) / PROMPT
        except (MlflowException, TypeError, KeyError, OSError):
            there = sorted(model.name for model in self.client.search_registered_models("name LIKE 'dsd-prompt-%'"))
            known = ", ".join(f"models:/{name}@{CHAMPION}" for name in there) or "none; `dsd promote` enters them"
            raise DsdError(f"--prompt {reference}: no such registered prompt; there is {known}") from None

    def _measured(
        self, params: Params, root: Path, key: str, metrics: Mapping[str, Any], tags: Mapping[str, str]
    ) -> Run:
        """The run that holds all that was measured, entered once."""
        run = self.runs.finished("evaluation", key)
        if run is None:
            model = _served(params, root, tags["dsd.digest"])
            name = f"{Path(tags['dsd.source']).name} {tags['dsd.digest'][:8]}"
            made = self.runs.start(name, "evaluation", key, {k: v for k, v in tags.items() if k != "dsd.params"})
            log_metrics(
                self.client,
                made,
                {
                    f"{dataset}/{method}/{metric}": interval["value"]
                    for dataset, methods in metrics.items()
                    for method, found in methods.items()
                    for metric, interval in found.items()
                },
            )
            from flows.serving.server import save  # it loads a server

            with TemporaryDirectory() as folder:
                save(*model, Path(folder) / "backbone")
                self.client.log_artifacts(made, folder)
            self.client.log_dict(made, params.model_dump(mode="json"), "params.json")
            self.client.log_dict(made, {name: _ranks(params, root, name) for name in metrics}, "ranks.json")
            for dataset, file in prompts(params, root, metrics).items():
                self.client.log_artifact(made, str(file), f"prompts/{dataset}")
            self.client.set_terminated(made)
            run = self.client.get_run(made)
        return run

    def _register_prompt(self, params: Params, root: Path, dataset: str, run: Run, tags: Mapping[str, str]) -> None:
        """A version for each measurement, though its file be another's: it goes where its backbone's version goes."""
        if (file := prompts(params, root, [dataset]).get(dataset)) is None:
            return
        shown = {**tags, "dsd.dataset": dataset, "dsd.method": str(prompted(params))}
        model = prompt_model(dataset)
        content = digest(run.info.run_id, file_digest(file))
        number = self._upsert(model, run, f"prompts/{dataset}", content, shown)
        if self._aliases(model).get(CHAMPION) != number:
            self.client.set_registered_model_alias(model, CHALLENGER, number)

    def _upsert(self, model: str, run: Run, part: str, content: str, tags: Mapping[str, str]) -> str:
        """The number of the version with this content, which is made of a part of the run where there is none."""
        try:
            self.client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in self._all(model):
            if version.tags.get("dsd.content") == content:
                return str(version.version)
        source, shown = f"{run.info.artifact_uri}/{part}", {**tags, "dsd.content": content}
        made = self.client.create_model_version(model, source, run_id=run.info.run_id, tags=shown)
        return str(made.version)

    def _promote(self, version: Version) -> None:
        """The champion's alias to a version and to the prompts that were trained for it."""
        of_run = [(BACKBONE, str(version.number))]
        for model in self.client.search_registered_models("name LIKE 'dsd-prompt-%'"):
            of_run += [(model.name, str(v.version)) for v in self._all(model.name) if v.run_id == version.run]
        for model, number in of_run:
            self.client.set_registered_model_alias(model, CHAMPION, number)
            if self._aliases(model).get(CHALLENGER) == number:
                self.client.delete_registered_model_alias(model, CHALLENGER)

    def _all(self, model: str) -> list[ModelVersion]:
        found: list[ModelVersion] = []
        token: str | None = None
        while token is None or token:
            page = self.client.search_model_versions(f"name = '{model}'", page_token=token)
            found, token = [*found, *page], page.token or ""
        return sorted(found, key=lambda version: -int(version.version))

    def _aliases(self, model: str) -> dict[str, str]:
        try:
            return {alias: str(number) for alias, number in self.client.get_registered_model(model).aliases.items()}
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}


def prompts(params: Params, root: Path, datasets: Iterable[str]) -> dict[str, Path]:
    """By dataset, the file of the attention prompt that was trained for it."""
    from dsd.models.prompts import PROMPT  # it loads torch

    method = prompted(params)
    files = {name: root / "data" / "train" / name / str(method) / PROMPT for name in datasets}
    return {name: file for name, file in files.items() if file.exists()}


def commit(root: Path) -> str:
    """The commit that a workspace is at, with a plus where its code differs from it; "" outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "dsd", "flows", "dvc.yaml")
    return git("rev-parse", "HEAD") + ("+" if changed else "")


def _served(params: Params, root: Path, identity: str) -> tuple[Settings, Path | None]:
    """What the model of a version is made of: its settings, and the file of its prompt.

    Raises:
        DataError: no prompt was trained for `serving.prompt`.
    """
    from flows.serving.server import Settings

    if (dataset := params.serving.prompt) is None:
        return Settings.of(params, identity), None
    if (file := prompts(params, root, [dataset]).get(dataset)) is None:
        raise DataError(
            f"{root / 'data' / 'train' / dataset}: no attention prompt (serving.prompt); run `dsd reproduce`"
        )
    return Settings.of(params, identity), file


def _located(row: BackboneParams) -> str:
    from dsd.models.checkpoint import locate  # it loads torch

    return locate(row)[1]


def _ranks(params: Params, root: Path, dataset: str) -> dict[str, Any]:
    """`Ranks` of every method, which share the examples."""
    from dsd.data.examples import read_examples
    from dsd.evaluation.gate import Ranks

    examples = read_examples(root / "data" / "prepare" / dataset / "examples.parquet", "test")
    scores = pq.read_table(root / "data" / "evaluate" / "scores" / f"{dataset}.parquet", columns=["method", "rank"])
    ranks: dict[str, list[int]] = {}
    for method, rank in zip(*(column.to_pylist() for column in scores.columns), strict=True):
        ranks.setdefault(method, []).append(rank)
    return {**Ranks.of(params.datasets[dataset].kind, examples, [])._asdict(), "ranks": ranks}


def _moved(before: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    """The kinds of results that scores depend on whose code has another version; no record is version 1."""
    pairs = {kind: (before.get(kind, 1), now.get(kind, 1)) for kind in dependencies("scores")}
    return [f"{kind} {a} → {b}" for kind, (a, b) in sorted(pairs.items()) if a != b]


def _version(found: ModelVersion) -> Version:
    tags = {name.removeprefix("dsd."): value for name, value in found.tags.items()}
    measured = json.loads(tags["params"])
    row = measured["backbones"][measured["backbone"]]
    return Version(
        number=int(found.version),
        key=tags["key"],
        digest=tags["digest"],
        source=tags["source"],
        revision=tags["revision"] or None,
        row=BackboneParams.model_validate({**row, "source": tags["source"], "digest": tags["digest"]}),
        metrics=json.loads(tags["metrics"]),
        verdict=tags.get("verdict", ""),
        reason=tags.get("reason", ""),
        compared=json.loads(tags.get("compared", "{}")),
        against=int(tags["against"]) if "against" in tags else None,
        commit=tags["commit"],
        lock=tags["lock"],
        versions=json.loads(tags.get("versions", "{}")),
        created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
        run=found.run_id,
    )
