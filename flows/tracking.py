"""MLflow: every result once, whether it was computed or came out of DVC's cache.

An entry is found by its tag `dsd.key`, a digest of what it shows, so publishing is an upsert. A run in which
a publication was killed is removed by the next; a lock lets several processes publish at once.
"""

from __future__ import annotations

import csv
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow.parquet as pq
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, ErrorCode
from sqlalchemy.exc import SQLAlchemyError

from dsd.config import BackboneParams, ContrastiveMethod, Params, backbone_of, trained
from dsd.store import digest, file_digest
from flows.stores import MLFLOW, alone, artifacts, refusal, served, told, uri

logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what fails there is told in one line

EXPERIMENT = "dsd"
FLUSH_SECONDS = 1.0
BATCH = 1000  # metrics that MLflow takes in one call
Intervals = Mapping[str, Mapping[str, float]]  # of one method on one dataset, by metric: value, low, high, n


@contextmanager
def locked() -> Iterator[None]:
    """Alone in this workspace, and at a PostgreSQL database also among all machines."""
    with told(MLFLOW, uri()):
        artifacts().mkdir(exist_ok=True)
    with FileLock(artifacts() / ".lock"), alone(MLFLOW, uri()), _reaching():
        yield


@contextmanager
def _reaching() -> Iterator[None]:
    """What MLflow raises where its store fails it, as one line; what it says of our use of it is a defect of ours."""
    try:
        yield
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(INVALID_PARAMETER_VALUE):
            raise
        raise refusal(MLFLOW, uri(), error.__cause__ or error) from error
    except SQLAlchemyError as error:
        raise refusal(MLFLOW, uri(), error) from error


class Runs:
    """The runs of this project's experiment."""

    def __init__(self) -> None:
        # Processes that open a fresh database together all try to create its tables, and all but one crash.
        with locked():
            self.client = MlflowClient(tracking_uri=uri())
            self.experiment = self._experiment()

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return str(found.experiment_id)
        location = None if served(uri()) else artifacts().as_uri()  # a server knows where its artifacts go
        return str(self.client.create_experiment(EXPERIMENT, artifact_location=location))

    def find(self, kind: str, key: str) -> list[Run]:
        """The runs of a kind and key, the newest first."""
        where = f"tags.`dsd.kind` = '{kind}' and tags.`dsd.key` = '{key}'"
        newest = ["attributes.start_time DESC"]
        return list(self.client.search_runs([self.experiment], where, order_by=newest))

    def every(self, kind: str) -> list[Run]:
        """All runs of a kind, the newest first."""
        where, newest = f"tags.`dsd.kind` = '{kind}'", ["attributes.start_time DESC"]
        found: list[Run] = []
        token: str | None = None
        while token is None or token:
            page = self.client.search_runs([self.experiment], where, order_by=newest, page_token=token)
            found, token = [*found, *page], page.token or ""
        return found

    def finished(self, kind: str, key: str) -> Run | None:
        """The finished run of a kind and key, if there is one; what a killed publication left is removed."""
        done = None
        for run in self.find(kind, key):
            if run.info.status == "FINISHED":
                done = run
            else:
                self.client.delete_run(run.info.run_id)
        return done

    def start(self, name: str, kind: str, key: str, tags: Mapping[str, str]) -> str:
        """A new run; returns its id."""
        tags = {"dsd.kind": kind, "dsd.key": key, **tags}
        return str(self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id)


def publish(params: Params, data: Path) -> int:
    """Enters every result, curve and report of `data` that MLflow does not have yet; returns how many."""
    runs = Runs()
    metrics = json.loads((data / "evaluate" / "metrics.json").read_text())
    with locked():
        new = [
            _publish_result(runs, params, data, dataset, method, intervals)
            for dataset, methods in metrics.items()
            for method, intervals in methods.items()
        ]
        new += [
            _publish_curve(runs, params, data, dataset, method) for dataset in metrics for method in trained(params)
        ]
        new += [_publish_report(runs, data)]
    return sum(new)


def _publish_result(runs: Runs, params: Params, data: Path, dataset: str, method: str, intervals: Intervals) -> bool:
    row = params.methods[method]
    backbone = params.backbones[backbone_of(params, method)]
    table = data / "evaluate" / "scores" / f"{dataset}.parquet"
    scores = pq.read_table(table, filters=[("method", "=", method)]).to_pylist()
    key = digest(dataset, method, intervals, row, backbone, scores)
    if runs.finished("result", key):
        return False
    tags = {"dsd.dataset": dataset, "dsd.method": method, "dsd.backbone": backbone.source}
    tags["dsd.backbone.digest"] = _identity(backbone)
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
    metrics = [Metric(name, value, now, 0) for name, value in values.items()]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run, metrics=metrics[start : start + BATCH])


def _identity(backbone: BackboneParams) -> str:
    """The digest of a local checkpoint, the revision of one on the hub."""
    if not Path(backbone.source).exists():
        return str(backbone.revision)
    from dsd.models.checkpoint import locate  # it loads torch, which only a new entry is worth

    return locate(backbone)[1]


def bars(title: str, intervals: Intervals) -> Any:
    """A matplotlib figure of one method's metrics on one dataset, with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.9 * len(intervals), 3), layout="constrained")
    axes = figure.subplots()
    rows = list(intervals.values())
    values = [row["value"] for row in rows]
    errors = [[row["value"] - row["low"] for row in rows], [row["high"] - row["value"] for row in rows]]
    axes.bar(list(intervals), values, yerr=errors, capsize=4, color="#4c72b0")
    axes.set(ylim=(0, 1), title=title)
    return figure


def _publish_curve(runs: Runs, params: Params, data: Path, dataset: str, method: str) -> bool:
    """Replays the curve of a training: nothing is new in it unless it came out of DVC's cache."""
    folder = data / "train" / dataset / method
    summary = folder / "summary.json"
    if not summary.exists():
        return False
    key = json.loads(summary.read_text())["key"]
    with (folder / "curve.csv").open(newline="") as file, Live(dataset, method, key, params, runs) as live:
        for row in csv.DictReader(file):
            live.log({name: float(value) for name, value in row.items()})
    return live.new


def _publish_report(runs: Runs, data: Path) -> bool:
    """One run for a set of results: a page that shows the same results in another way replaces the first."""
    page = data / "report" / "index.html"
    if not page.exists():
        return False
    key, content = digest(file_digest(data / "evaluate" / "metrics.json")), file_digest(page)
    found = runs.finished("report", key)
    if found is not None and found.data.tags.get("dsd.page") == content:
        return False
    run = found.info.run_id if found is not None else runs.start("report", "report", key, {})
    runs.client.log_artifact(run, str(page))
    runs.client.set_tag(run, "dsd.page", content)
    runs.client.set_terminated(run)
    return found is None


class Live:
    """The curve of one training, while it goes on.

    `key` is the digest of what the training starts from. A training that was killed goes on in its own run,
    and a row that the run has already is not entered again. Rows that differ from the run's (from the same
    start, but by other code) begin a new run.
    """

    def __init__(self, dataset: str, method: str, key: str, params: Params, runs: Runs | None = None) -> None:
        self._runs = runs or Runs()
        self._dataset, self._method, self._key = dataset, method, key
        row = params.methods[method]
        sections: dict[str, Any] = {"training": params.training[method]}
        if not isinstance(row, ContrastiveMethod):
            sections["prompt"] = params.prompt
        elif row.tuned == "context":
            sections["context"] = params.context
        settings = {"dataset": dataset, "method": method, "seed": params.seed}
        settings |= {
            f"{name}.{key}": value for name, section in sections.items() for key, value in section.model_dump().items()
        }
        self._params = [Param(name, str(value)) for name, value in settings.items()]
        self.new = False
        self._rows: list[Mapping[str, float]] = []
        self._pending: list[Mapping[str, float]] = []
        self._flushed = time.monotonic()

    @_reaching()
    def __enter__(self) -> Self:
        found = self._runs.find("training", self._key)
        self._known: dict[int, float] = {}
        if not found:
            self._start()
            return self
        self._run = found[0].info.run_id
        self._status = found[0].info.status
        history = self._runs.client.get_metric_history(self._run, "loss")
        self._known = {metric.step: metric.value for metric in history}
        return self

    def _start(self) -> None:
        tags = {"dsd.dataset": self._dataset, "dsd.method": self._method}
        self._run = self._runs.start(f"train {self._method} on {self._dataset}", "training", self._key, tags)
        self._runs.client.log_batch(self._run, params=self._params)
        self._known, self._status, self.new = {}, "RUNNING", True
        self._pending = list(self._rows)

    @_reaching()
    def log(self, row: Mapping[str, float]) -> None:
        """Enters a row of the curve, soon: rows go in batches, at most one a second."""
        self._rows.append(row)
        known = self._known.get(int(row["step"]))
        if known is None:
            self._pending.append(row)
        elif known != row["loss"]:
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
        for start in range(0, len(metrics), BATCH):
            self._runs.client.log_batch(self._run, metrics=metrics[start : start + BATCH])
        self._pending, self._flushed = [], time.monotonic()

    @_reaching()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        status = "FINISHED" if kind is None else "FAILED"
        if self._status != status:
            self._runs.client.set_terminated(self._run, status)
