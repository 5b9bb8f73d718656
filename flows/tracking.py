"""MLflow: every result once, whether it was computed or restored from DVC's cache.

The tag `dsd.key` of a run is a digest of its content, so publishing is an upsert. The next publication deletes a run
that a killed one left unfinished. A lock serializes the publications of several processes.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, ErrorCode
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from sqlalchemy.exc import SQLAlchemyError

from dsd.config import BackboneParams, MethodParams, Params
from dsd.store import digest, file_digest
from flows.command import commit
from flows.stores import MLFLOW, PARENT, artifacts, exclusive, is_server, store_error, store_errors, uri

logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # `store_error` reports its errors in one line

EXPERIMENT = "dsd"
FLUSH_SECONDS = 1.0
BATCH = 1000  # metrics per request, MLflow's limit
Intervals = Mapping[str, Mapping[str, float]]  # metric → value, low, high, n


@contextmanager
def locked() -> Iterator[None]:
    """Exclude other processes of this workspace, and for a PostgreSQL database those of all machines."""
    with store_errors(MLFLOW, uri()):
        artifacts().mkdir(exist_ok=True)
    with FileLock(artifacts() / ".lock"), exclusive(MLFLOW, uri()), mlflow_errors():
        yield


@contextmanager
def mlflow_errors() -> Iterator[None]:
    """Turn the errors of MLflow's store into one line; an invalid request is a defect and keeps its traceback."""
    try:
        yield
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(INVALID_PARAMETER_VALUE):
            raise
        raise store_error(MLFLOW, uri(), error.__cause__ or error) from error
    except SQLAlchemyError as error:
        raise store_error(MLFLOW, uri(), error) from error


class Runs:
    """The runs of this project's experiment."""

    def __init__(self) -> None:
        # Without the lock, processes that open a new database at once all create its tables, and all but one crash.
        with locked():
            self.client = MlflowClient(tracking_uri=uri())
            if (experiment := self.client.get_experiment_by_name(EXPERIMENT)) is not None:
                self.experiment = str(experiment.experiment_id)
            else:
                location = None if is_server(uri()) else artifacts().as_uri()  # a server has its own location
                self.experiment = str(self.client.create_experiment(EXPERIMENT, artifact_location=location))

    def find(self, kind: str, key: str | None = None) -> list[Run]:
        """The runs of a kind, or of a kind and key, the newest first."""
        where = f"tags.`dsd.kind` = '{kind}'" + (f" and tags.`dsd.key` = '{key}'" if key else "")
        search = partial(self.client.search_runs, [self.experiment], where, order_by=["attributes.start_time DESC"])
        return all_pages(search)

    def finished(self, kind: str, key: str) -> Run | None:
        """The finished run of a kind and key, if any; delete unfinished ones, which a killed publication left."""
        done = None
        for run in self.find(kind, key):
            if run.info.status == "FINISHED":
                done = run
            else:
                self.client.delete_run(run.info.run_id)
        return done

    def start(self, name: str, kind: str, key: str, tags: Mapping[str, str]) -> str:
        """Create a run; return its id."""
        tags = {"dsd.kind": kind, "dsd.key": key, **tags}
        return str(self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id)


def all_pages(search: Callable[..., Any]) -> list[Any]:
    """All results of one of MLflow's searches."""
    results: list[Any] = []
    token: str | None = None
    while token is None or token:
        page = search(page_token=token)
        results, token = [*results, *page], page.token or ""
    return results


def publish(params: Params, data: Path) -> int:
    """Add every result, curve and report of `data` that MLflow does not have yet; return their number."""
    runs, new = Runs(), 0
    metrics = json.loads((data / "evaluate" / "metrics.json").read_text())
    with locked():
        for dataset, methods in metrics.items():
            for method, intervals in methods.items():
                backbone = params.backbones[params.backbone_of(method)]
                new += _publish_result(runs, data, dataset, method, intervals, params.methods[method], backbone)
        for method in params.trained:
            tags = training_tags(params, method)
            for dataset in metrics:
                settings = training_settings(params, dataset, method)
                new += _publish_curve(runs, data, dataset, method, settings, tags)
        return new + _publish_report(runs, data)


def _publish_result(
    runs: Runs, data: Path, dataset: str, method: str, intervals: Intervals, row: MethodParams, backbone: BackboneParams
) -> bool:
    table = data / "evaluate" / "scores" / f"{dataset}.parquet"
    scores = pq.read_table(table, filters=[("method", "=", method)]).to_pylist()
    key = digest(dataset, method, intervals, row, backbone, scores)
    if runs.finished("result", key):
        return False
    tags = {"dsd.dataset": dataset, "dsd.method": method, **backbone_tags(backbone)}
    run = runs.start(f"{method} on {dataset}", "result", key, tags)
    values = {
        name if part == "value" else f"{name}_{part}": value
        for name, interval in intervals.items()
        for part, value in interval.items()
    }
    log_metrics(runs.client, run, values)
    settings = [Param(name, str(value)) for name, value in {"dataset": dataset, **row.model_dump()}.items()]
    runs.client.log_batch(run, params=settings)
    runs.client.log_figure(run, bars(f"{method} on {dataset}", intervals), "metrics.png")
    runs.client.set_terminated(run)
    return True


def log_metrics(client: MlflowClient, run: str, values: Mapping[str, float]) -> None:
    now = int(time.time() * 1000)
    _send(client, run, [Metric(name, value, now, 0) for name, value in values.items()])


def _send(client: MlflowClient, run: str, metrics: Sequence[Metric]) -> None:
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run, metrics=metrics[start : start + BATCH])


def backbone_tags(backbone: BackboneParams) -> dict[str, str]:
    """The source of a backbone, and its digest; the revision if it is on the hub."""
    if not Path(backbone.source).exists():
        identity = str(backbone.revision)
    else:
        from dsd.models.checkpoint import identify  # it imports torch

        identity = identify(backbone)
    return {"dsd.backbone": backbone.source, "dsd.backbone.digest": identity}


def bars(title: str, intervals: Intervals) -> Any:
    """A matplotlib figure of metrics with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.9 * len(intervals), 3), layout="constrained")
    axes = figure.subplots()
    rows = list(intervals.values())
    values = [row["value"] for row in rows]
    errors = [[row["value"] - row["low"] for row in rows], [row["high"] - row["value"] for row in rows]]
    axes.bar(list(intervals), values, yerr=errors, capsize=4, color="#4c72b0")
    axes.set(ylim=(0, 1), title=title)
    return figure


def _publish_curve(
    runs: Runs, data: Path, dataset: str, method: str, settings: Mapping[str, Any], tags: Mapping[str, str]
) -> bool:
    """Log the curve of a training; this adds nothing unless the training was restored from DVC's cache."""
    folder = data / "train" / dataset / method
    summary = folder / "summary.json"
    if not summary.exists():
        return False
    key = json.loads(summary.read_text())["key"]
    training = TrainingRun(dataset, method, key, settings, tags, runs)
    with (folder / "curve.csv").open(newline="") as file, training as run:
        for row in csv.DictReader(file):
            run.log({name: float(value) for name, value in row.items()})
    return run.new


def _publish_report(runs: Runs, data: Path) -> bool:
    """Log the page, in one run per set of results; another page of the same results replaces the first."""
    page = data / "report" / "index.html"
    if not page.exists():
        return False
    key, content = digest(file_digest(data / "evaluate" / "metrics.json")), file_digest(page)
    existing = runs.finished("report", key)
    if existing is not None and existing.data.tags.get("dsd.page") == content:
        return False
    run = existing.info.run_id if existing is not None else runs.start("report", "report", key, {})
    runs.client.log_artifact(run, str(page))
    runs.client.set_tag(run, "dsd.page", content)
    runs.client.set_terminated(run)
    return existing is None


def training_settings(params: Params, dataset: str, method: str) -> dict[str, Any]:
    """The settings that MLflow shows for the training of a method."""
    row = params.methods[method]
    sections: dict[str, Any] = {"training": params.training[method]}
    if row.learns == "attention prompt":
        sections["prompt"] = params.prompt
    elif row.learns == "context":
        sections["context"] = params.context
    values = {f"{name}.{key}": value for name, part in sections.items() for key, value in part.model_dump().items()}
    backbone = params.backbone_of(method)
    return {"dataset": dataset, "method": method, "backbone": backbone, "seed": params.seed, **values}


def training_tags(params: Params, method: str) -> dict[str, str]:
    """The backbone that a method is trained for, the commit of the code, and the parent run if there is one."""
    tags = {**backbone_tags(params.backbones[params.backbone_of(method)]), "dsd.commit": commit(Path())}
    return {**tags, MLFLOW_PARENT_RUN_ID: os.environ[PARENT]} if PARENT in os.environ else tags


class TrainingRun:
    """The run of a training, which logs the curve while it trains.

    `key` is the digest of the training's inputs. A training that was killed resumes its run, in which rows are logged
    once. If a row differs from the run's, because the code has changed, a new run starts.
    """

    def __init__(
        self,
        dataset: str,
        method: str,
        key: str,
        settings: Mapping[str, Any],
        tags: Mapping[str, str],
        runs: Runs | None = None,
    ) -> None:
        self._runs = runs or Runs()
        self._dataset, self._method, self._key, self._tags = dataset, method, key, tags
        self._params = [Param(name, str(value)) for name, value in settings.items()]
        self._losses: dict[int, float] = {}  # of the steps that the run has already
        self.new = False
        self._rows: list[Mapping[str, float]] = []
        self._pending: list[Mapping[str, float]] = []
        self._flushed = time.monotonic()

    @mlflow_errors()
    def __enter__(self) -> Self:
        existing = self._runs.find("training", self._key)
        if not existing:
            self._start()
            return self
        self._run, self._status = existing[0].info.run_id, existing[0].info.status
        history = self._runs.client.get_metric_history(self._run, "loss")
        self._losses = {metric.step: metric.value for metric in history}
        return self

    def _start(self) -> None:
        tags = {"dsd.dataset": self._dataset, "dsd.method": self._method, **self._tags}
        self._run = self._runs.start(f"train {self._method} on {self._dataset}", "training", self._key, tags)
        self._runs.client.log_batch(self._run, params=self._params)
        self._losses, self._status, self.new = {}, "RUNNING", True
        self._pending = list(self._rows)

    @mlflow_errors()
    def log(self, row: Mapping[str, float]) -> None:
        """Log a row of the curve; rows are sent in batches, at most one per second."""
        self._rows.append(row)
        loss = self._losses.get(int(row["step"]))
        if loss is None:
            self._pending.append(row)
        elif loss != row["loss"]:
            self._start()
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, int(row["step"]))
            for row in self._pending
            for name, value in row.items()
            if name != "step"
        ]
        if metrics and self._status != "RUNNING":
            self._runs.client.update_run(self._run, "RUNNING")
            self._status = "RUNNING"
        _send(self._runs.client, self._run, metrics)
        self._pending, self._flushed = [], time.monotonic()

    @mlflow_errors()
    def __exit__(self, kind: object, *_: object) -> None:
        self._flush()
        status = "FINISHED" if kind is None else "FAILED"
        if self._status != status:
            self._runs.client.set_terminated(self._run, status)
