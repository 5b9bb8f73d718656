"""The registry of checkpoints and prompts by version and alias, and the promotion of the champion.

A version of the model `dsd-backbone` is a checkpoint as measured with some params. It refers to the checkpoint without
a copy; MLflow can load and serve it (`flows.serving`). A version of `dsd-prompt-<dataset>` is the attention prompt that
was trained for it, with the digest of its backbone. Registering the same results twice changes nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from dsd.config import BackboneParams, Params
from dsd.errors import DataError, DsdError
from dsd.store import digest, file_digest
from dsd.versions import moved_versions, versioned
from flows.registry.measurement import Measurement
from flows.tracking import Runs, all_pages, locked, log_metrics

if TYPE_CHECKING:  # it imports scipy
    from dsd.evaluation.gate import Ranks, Verdict

BACKBONE = "dsd-backbone"
MODEL = "backbone"  # the folder of a version's artifacts that MLflow loads
META = "registered_model_meta"  # a file that MLflow adds when it loads a model
FILES = "dsd.files"  # the tag with the digest of that folder
CHAMPION, CHALLENGER = "champion", "challenger"
PROMOTED, KEPT_OUT, NOT_COMPARED = "promoted", "kept out", "not compared"  # the gate's verdicts
ROLLED_BACK = "rolled back"  # the verdict on a champion that an operator took back
# Sections left out of the key: those that change no result, and those that `evaluation_key` adds itself.
EXCLUDED = {
    *("ablations", "backbone", "backbones", "gate", "pretrain", "races"),
    *("report", "runtime", "serving", "studies", "watch"),
}


@dataclass(frozen=True)
class Version:
    """A measured checkpoint: its location, its results and its verdict ("" before the gate has run).

    row: the row of `backbones` that opens the checkpoint.
    metrics: dataset → method → metric → value, low, high, n.
    versions: of the code that measured it, by kind of result; empty if they were not recorded yet.
    compared, against: dataset → `gate.Compared`, and the number of the version that was the champion.
    """

    number: int
    key: str
    digest: str
    source: str
    row: BackboneParams
    metrics: dict[str, Any]
    verdict: str
    reason: str
    compared: dict[str, Any]
    against: int | None
    commit: str
    versions: dict[str, int]
    created: datetime
    run: str

    @property
    def name(self) -> str:
        return Path(self.source).name

    @classmethod
    def of(cls, version: ModelVersion) -> Version:
        """Read a version from the tags of MLflow's entity."""
        tags = {name.removeprefix("dsd."): value for name, value in version.tags.items()}
        params = json.loads(tags["params"])
        row = params["backbones"][params["backbone"]]
        return cls(
            number=int(version.version),
            key=tags["key"],
            digest=tags["digest"],
            source=tags["source"],
            row=BackboneParams.model_validate({**row, "source": tags["source"], "digest": tags["digest"]}),
            metrics=json.loads(tags["metrics"]),
            verdict=tags.get("verdict", ""),
            reason=tags.get("reason", ""),
            compared=json.loads(tags.get("compared", "{}")),
            against=int(tags["against"]) if "against" in tags else None,
            commit=tags["commit"],
            versions=json.loads(tags.get("versions", "{}")),
            created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
            run=version.run_id,
        )


def files_digest(folder: Path) -> str:
    """Return the digest of the names and contents of all files in a folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return digest({file.relative_to(folder).as_posix(): file_digest(file) for file in files})


def evaluation_key(params: Params, identity: str) -> str:
    """Return the digest of a checkpoint's own digest and of every setting and version that its results depend on."""
    used = {name: params.backbones[name] for name in params.used_backbones if name != params.backbone}
    excluded = EXCLUDED - {"races"} if params.raced else EXCLUDED
    arithmetic = params.backbones[params.backbone].dtype
    return versioned("scores", digest(identity, arithmetic, used, params.model_dump(mode="json", exclude=excluded)))


class Registry:
    """The registered models of this project, in the tracking store."""

    def __init__(self) -> None:
        self.runs = Runs()
        self.client = self.runs.client

    def versions(self) -> list[Version]:
        """Return all measured checkpoints, the newest first."""
        return [Version.of(version) for version in self._all(BACKBONE)]

    def alias(self, alias: str) -> Version | None:
        """Return the measured checkpoint with this alias."""
        number = self._aliases(BACKBONE).get(alias)
        return None if number is None else Version.of(self.client.get_model_version(BACKBONE, number))

    def register(self, params: Params, root: Path) -> Version:
        """Register the results of the workspace `root` as the challenger, once.

        Raises:
            DataError: the workspace has no results, or no prompt for `serving.prompt`.
            CheckpointError: the checkpoint is no longer available.
        """
        measured = Measurement(params, root)
        key, tags = evaluation_key(params, measured.digest), measured.tags()
        content = digest(key, measured.metrics)
        with locked():
            run = self._evaluation(measured, content, tags)
            for dataset, file in measured.prompts().items():
                own = {"dsd.dataset": dataset, "dsd.method": str(params.prompted)}
                own["dsd.metrics"] = json.dumps(measured.metrics[dataset])
                # A version per measurement, even of the same file: a prompt is promoted together with its backbone.
                of_prompt = digest(run.info.run_id, file_digest(file))
                self._enter(f"dsd-prompt-{dataset}", run, f"prompts/{dataset}", of_prompt, {**tags, **own})
            files = run.data.tags.get(FILES) or self._files(run)  # older runs have no such tag
            own = {"dsd.key": key, "dsd.metrics": json.dumps(measured.metrics), FILES: files}
            number = self._enter(BACKBONE, run, MODEL, content, {**tags, **own})
            if FILES not in self.client.get_model_version(BACKBONE, number).tags:
                self.client.set_model_version_tag(BACKBONE, number, FILES, files)
        return Version.of(self.client.get_model_version(BACKBONE, number))

    def challenge(self, params: Params, challenger: Version, first: str | None = None) -> Verdict:
        """Compare a version with the champion, write the verdict to its tags, and move the aliases.

        Without a champion the version becomes it, unless `first` is the digest of another checkpoint.

        If the champion itself was measured again on other examples or by other code, its old results are no longer
        comparable, and the new version replaces the old one.

        Raises:
            DsdError: see `dsd.evaluation.gate.judge`, measured by other code than the champion, or not the first. The
                tags hold the message as the reason of the verdict "not compared".
        """
        from dsd.evaluation.gate import Verdict, check_gate, judge, other_examples

        with locked():
            champion = self.alias(CHAMPION)
            if champion is not None and champion.number == challenger.number:
                if challenger.verdict:
                    return Verdict(False, "it is the champion already", {})
                self._carry_out(challenger, PROMOTED, challenger.reason)  # interrupted before the verdict was written
                return Verdict(True, challenger.reason, {})
            against = {} if champion is None else {"against": str(champion.number)}
            try:
                now = self.ranks(challenger, params.gate.method)
                before = None if champion is None else self.ranks(champion, params.gate.method)
                own = champion is not None and champion.digest == challenger.digest
                check_gate(params, list(now))
                if champion is None and first not in (None, challenger.digest):
                    raise DataError("there is no champion: the backbone of the workspace has to be evaluated first")
                moved = [] if champion is None else moved_versions(champion.versions, challenger.versions)
                if own and before is not None and (moved or other_examples(params.gate, now, before)):
                    what = "by other code" if moved else "on other examples"
                    verdict = Verdict(True, f"the champion itself, measured {what} than before", {})
                elif moved:
                    raise DataError(f"measured by other code than the champion ({', '.join(moved)}); evaluate it again")
                else:
                    verdict = judge(params.gate, params.evaluate, params.seed, now, before)
            except DsdError as error:
                self._carry_out(challenger, NOT_COMPARED, str(error), **against)
                raise
            compared = json.dumps({name: asdict(compared) for name, compared in verdict.compared.items()})
            result = PROMOTED if verdict.promoted else KEPT_OUT
            self._carry_out(challenger, result, verdict.reason, compared=compared, **against)
        return verdict

    def rollback(self) -> tuple[Version, Version]:
        """Make the champion before this one the champion again, with its prompts; return (taken back, champion).

        Raises:
            DsdError: there is no champion, or none before it.
        """
        with locked():
            champion = self.alias(CHAMPION)
            if champion is None:
                raise DsdError("there is no champion; `dsd promote` registers one")
            if champion.against is None:
                raise DsdError(f"{BACKBONE} version {champion.number} is the first champion: there is none before it")
            before = Version.of(self.client.get_model_version(BACKBONE, str(champion.against)))
            self._promote(before)
            self._carry_out(champion, ROLLED_BACK, f"version {before.number} is the champion again")
        return champion, before

    def _carry_out(self, version: Version, verdict: str, reason: str, **more: str) -> None:
        """Apply a verdict: set the tags, the aliases and the description that MLflow's pages show.

        The tag of the verdict is written last: if interrupted before, the gate runs again.
        """
        for name, value in {"reason": reason, **more}.items():
            self.client.set_model_version_tag(BACKBONE, str(version.number), f"dsd.{name}", value)
        if verdict == PROMOTED:
            self._promote(version)
        self.client.update_model_version(BACKBONE, str(version.number), f"{verdict}: {reason}")
        self.client.set_model_version_tag(BACKBONE, str(version.number), "dsd.verdict", verdict)

    def ranks(self, version: Version, method: str) -> dict[str, Ranks]:
        """Read the ranks of a method on the test examples of each dataset; raise DataError if there are none."""
        from dsd.evaluation.gate import Ranks

        with TemporaryDirectory() as folder:
            stored = json.loads(Path(self.client.download_artifacts(version.run, "ranks.json", folder)).read_text())
        for row in stored.values():
            if method not in row["ranks"]:
                raise DataError(f"{BACKBONE} version {version.number}: was not measured by {method} (gate.method)")
        return {name: Ranks(**{**row, "ranks": row["ranks"][method]}) for name, row in stored.items()}

    def prompt(self, reference: str, target: Path) -> Path:
        """Download a registered prompt, `models:/dsd-prompt-<dataset>@<alias>` or `…/<version>`, into a folder."""
        from dsd.models.prompts import PROMPT  # it imports torch

        try:
            version = self._version(reference)
            artifact = f"prompts/{version.tags['dsd.dataset']}"
            return Path(self.client.download_artifacts(version.run_id, artifact, str(target))) / PROMPT
        except (MlflowException, TypeError, KeyError, OSError):
            names = sorted(model.name for model in self.client.search_registered_models("name LIKE 'dsd-prompt-%'"))
            known = ", ".join(f"models:/{name}@{CHAMPION}" for name in names) or "none; `dsd promote` registers them"
            raise DsdError(f"--prompt {reference}: no such registered prompt (choices: {known})") from None

    def model(self, reference: str, target: Path) -> Path:
        """Download the model of a version, `models:/dsd-backbone@<alias>` or `…/<number>`, into a folder.

        Raises:
            DsdError: there is no such version.
            DataError: its files, whose code runs when it is loaded, are not those that were registered.
        """
        version = self._named(reference)
        folder = self._download(version.run_id, str(target))
        if (registered := version.tags.get(FILES)) is None:
            raise DataError(f"--model {reference}: registered without a digest of its files; run `dsd promote` again")
        if (current := files_digest(folder)) != registered:
            line = f"its files have the digest {current}, not {registered}: they were changed after the registration"
            raise DataError(f"--model {reference}: {line}; register it again")
        return folder

    def newer(self, reference: str, known: str | None, target: Path) -> tuple[str, Path] | None:
        """Download the model that a reference names now, unless it is version `known`; return its number and folder.

        Raises:
            DsdError, DataError: see `model`.
        """
        number = str(self._named(reference).version)
        if number == known:
            return None
        folder = target / number
        folder.mkdir(exist_ok=True)
        return number, self.model(reference, folder)

    def _named(self, reference: str) -> ModelVersion:
        """The version that a reference names; raise DsdError if there is none."""
        try:
            return self._version(reference)
        except (MlflowException, TypeError):
            line = "no such registered version; `dsd promote` registers versions"
            raise DsdError(f"--model {reference}: {line}") from None

    def _version(self, reference: str) -> ModelVersion:
        name, _, alias = reference.removeprefix("models:/").partition("@")
        if alias:
            return self.client.get_model_version_by_alias(name, alias)
        return self.client.get_model_version(*name.split("/"))

    def _files(self, run: Run) -> str:
        """The digest of the files of a registered model, as they are stored now."""
        with TemporaryDirectory() as folder:
            return files_digest(self._download(run.info.run_id, folder))

    def _download(self, run: str, target: str) -> Path:
        """Download the model of a run into a folder, without what MLflow has left in it."""
        folder = Path(self.client.download_artifacts(run, MODEL, target))
        for left in [*folder.rglob("__pycache__"), *folder.glob(META)]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return folder

    def _evaluation(self, measured: Measurement, key: str, tags: Mapping[str, str]) -> Run:
        """Return the run that holds a measurement, created once."""
        if (run := self.runs.finished("evaluation", key)) is not None:
            return run
        from flows.serving.service import save  # it imports mlflow.pyfunc and starlette

        settings, prompt = measured.served()
        name = f"{Path(tags['dsd.source']).name} {measured.digest[:8]}"
        own = {name: value for name, value in tags.items() if name != "dsd.params"}
        new = self.runs.start(name, "evaluation", key, own)
        log_metrics(self.client, new, measured.values())
        with TemporaryDirectory() as folder:
            save(settings, prompt, Path(folder) / MODEL)
            self.client.set_tag(new, FILES, files_digest(Path(folder) / MODEL))
            self.client.log_artifacts(new, folder)
        self.client.log_dict(new, measured.params.model_dump(mode="json"), "params.json")
        self.client.log_dict(new, measured.ranks(), "ranks.json")
        for dataset, file in measured.prompts().items():
            self.client.log_artifact(new, str(file), f"prompts/{dataset}")
        self.client.set_terminated(new)
        return self.client.get_run(new)

    def _enter(self, model: str, run: Run, artifact: str, content: str, tags: Mapping[str, str]) -> str:
        """Create the version with this content unless it exists, as the challenger; return its number."""
        number = self._upsert(model, run, artifact, {**tags, "dsd.content": content})
        if self._aliases(model).get(CHAMPION) != number:
            self.client.set_registered_model_alias(model, CHALLENGER, number)
        return number

    def _upsert(self, model: str, run: Run, artifact: str, tags: Mapping[str, str]) -> str:
        try:
            self.client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in self._all(model):
            if version.tags.get("dsd.content") == tags["dsd.content"]:
                return str(version.version)
        source = f"{run.info.artifact_uri}/{artifact}"
        return str(self.client.create_model_version(model, source, run_id=run.info.run_id, tags=tags).version)

    def _promote(self, version: Version) -> None:
        """Move the alias `champion` to a version, and to the prompts that were trained for it."""
        promoted = [(BACKBONE, str(version.number))]
        for model in self.client.search_registered_models("name LIKE 'dsd-prompt-%'"):
            promoted += [(model.name, str(v.version)) for v in self._all(model.name) if v.run_id == version.run]
        for model, number in promoted:
            self.client.set_registered_model_alias(model, CHAMPION, number)
            if self._aliases(model).get(CHALLENGER) == number:
                self.client.delete_registered_model_alias(model, CHALLENGER)

    def _all(self, model: str) -> list[ModelVersion]:
        versions = all_pages(partial(self.client.search_model_versions, f"name = '{model}'"))
        return sorted(versions, key=lambda version: -int(version.version))

    def _aliases(self, model: str) -> dict[str, str]:
        try:
            return {alias: str(number) for alias, number in self.client.get_registered_model(model).aliases.items()}
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}
