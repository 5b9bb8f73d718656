"""Every result is in MLflow exactly once, however often and from however many processes it is published."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from dsd.config import Params, load
from dsd.models.checkpoint import locate
from flows import tracking
from flows.tracking import TrainingRun, publish, training_settings, training_tags

CURVE = [{"step": step, "loss": 1 / step, "accuracy": 0.5} for step in range(1, 8)]
METHODS = ("dsd", "clip-finetune")


@pytest.fixture
def data(workspace: Path, database: Path) -> Path:
    """The data folder of a finished reproduction of two methods on two datasets, a row each."""
    shutil.copy(database, workspace)
    folder = workspace / "data"
    interval = {"value": 0.75, "low": 0.7, "high": 0.8, "n": 4}
    metrics = {name: {method: {"top1": interval} for method in METHODS} for name in ("scenes-com", "scenes-ref")}
    for name in metrics:
        write_scores(folder, name, 0.1)
        for method in METHODS:
            write_curve(folder, name, method)
    (folder / "evaluate" / "metrics.json").write_text(json.dumps(metrics))
    (folder / "report").mkdir()
    (folder / "report" / "index.html").write_text("<p>first</p>")
    return folder


def write_scores(folder: Path, name: str, score: float) -> None:
    rows = [{"id": "e", "category": "c", "method": method, "scores": [score, 0.0], "rank": 1} for method in METHODS]
    path = folder / "evaluate" / "scores" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_curve(folder: Path, name: str, method: str) -> None:
    trained = folder / "train" / name / method
    trained.mkdir(parents=True)
    lines = ["step,loss,accuracy", *(f"{row['step']},{row['loss']},{row['accuracy']}" for row in CURVE)]
    (trained / "curve.csv").write_text("\n".join(lines))
    (trained / "summary.json").write_text(json.dumps({"key": f"key of {method} on {name}"}))


def client() -> MlflowClient:
    return MlflowClient(tracking_uri=tracking.uri())


def entries(kind: str) -> list[Run]:
    experiment = client().get_experiment_by_name(tracking.EXPERIMENT)
    return list(client().search_runs([experiment.experiment_id], f"tags.`dsd.kind` = '{kind}'"))


def curve(run: Run) -> list[tuple[int, float]]:
    history = client().get_metric_history(run.info.run_id, "loss")
    return sorted((point.step, point.value) for point in history)


def test_publishing_again_changes_nothing(data: Path) -> None:
    params = load()
    assert publish(params, data) == 2 * 2 + 2 * 2 + 1
    assert publish(params, data) == 0
    results = entries("result")
    assert sorted((run.data.tags["dsd.dataset"], run.data.tags["dsd.method"]) for run in results) == [
        (name, method) for name in ("scenes-com", "scenes-ref") for method in sorted(METHODS)
    ]
    assert all(run.info.status == "FINISHED" for run in results)
    assert results[0].data.metrics == {"top1": 0.75, "top1_low": 0.7, "top1_high": 0.8, "top1_n": 4}
    assert {"scorer", "dataset"} <= set(results[0].data.params)
    assert [file.path for file in client().list_artifacts(results[0].info.run_id)] == ["metrics.png"]
    [page] = entries("report")
    assert [file.path for file in client().list_artifacts(page.info.run_id)] == ["index.html"]
    assert Path(page.info.artifact_uri.removeprefix("file://")).is_relative_to(Path("mlartifacts").resolve())


def test_another_result_is_another_entry(data: Path) -> None:
    publish(load(), data)
    path = data / "evaluate" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["scenes-com"]["dsd"]["top1"]["value"] = 0.76
    path.write_text(json.dumps(metrics))
    assert publish(load(), data) == 2  # the result, and the page of another set of results
    write_scores(data, "scenes-ref", 0.2)
    assert publish(load(), data) == 2  # the same metrics of both methods, from other scores
    assert len(entries("result")) == 7


def test_a_page_of_the_same_results_replaces_the_first(data: Path) -> None:
    publish(load(), data)
    (data / "report" / "index.html").write_text("<p>second</p>")
    assert publish(load(), data) == 0
    [run] = entries("report")
    assert Path(client().download_artifacts(run.info.run_id, "index.html")).read_text() == "<p>second</p>"


def test_the_runs_of_a_killed_publication_are_replaced(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_figure", full)
        with pytest.raises(OSError, match="No space"):
            publish(load(), data)
    publish(load(), data)
    assert len(entries("result")) == 4
    assert {run.info.status for run in entries("result")} == {"FINISHED"}


def _publish(data: Path) -> None:
    publish(load(), data)


def test_processes_that_publish_at_once(data: Path) -> None:
    """With a new database, whose tables both processes create."""
    Path("mlflow.db").unlink()
    path = data / "evaluate" / "metrics.json"
    path.write_text(json.dumps({"scenes-com": {"dsd": json.loads(path.read_text())["scenes-com"]["dsd"]}}))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_publish, args=(data,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [len(entries(kind)) for kind in ("result", "training", "report")] == [1, 2, 1]


def training(method: str, key: str, params: Params) -> TrainingRun:
    settings = training_settings(params, "scenes-com", method)
    return TrainingRun("scenes-com", method, key, settings, training_tags(params, method))


def train(params: Params, rows: list[dict[str, float]], fail_at: int | None = None) -> None:
    with training("dsd", "key", params) as run:
        for row in rows:
            if row["step"] == fail_at:
                raise KeyboardInterrupt
            run.log(row)


def test_a_resumed_training_is_one_run(data: Path) -> None:
    params = load()
    with pytest.raises(KeyboardInterrupt):
        train(params, CURVE, fail_at=5)
    [run] = entries("training")
    assert run.info.status == "FAILED"
    assert len(curve(run)) == 4
    train(params, CURVE)
    [run] = entries("training")
    assert run.info.status == "FINISHED"
    assert curve(run) == [(row["step"], row["loss"]) for row in CURVE]
    assert run.data.params["training.epochs"] == str(params.training["dsd"].epochs)
    assert {"prompt.rank", "training.levels"} <= set(run.data.params)
    assert (run.info.run_name, run.data.tags["dsd.method"]) == ("train dsd on scenes-com", "dsd")


def test_trainings_of_different_checkpoints_can_be_told_apart(
    data: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models / "embedded", "models/embedded", dirs_exist_ok=True)
    shutil.copytree(models / "embedded", "models/other")
    Path("models/other/unet/config.json").write_text("{}\n")
    params = load()
    own = params.backbones["embedded"]
    rows = {**params.backbones, "other": own.model_copy(update={"source": "models/other"})}
    other = params.model_copy(update={"backbones": rows, "backbone": "other"})
    monkeypatch.setattr(tracking, "commit", lambda folder: f"commit of {folder.resolve()}")
    runs = {}
    for parent, each in (("", params), ("attempt", other)):
        if parent:
            monkeypatch.setenv("DSD_PARENT_RUN", parent)
        with training("dsd", f"key {parent}", each):
            pass
        runs[parent] = next(run for run in entries("training") if run.data.tags["dsd.key"] == f"key {parent}")
    assert [run.data.tags["dsd.backbone"] for run in runs.values()] == ["models/embedded", "models/other"]
    assert [run.data.params["backbone"] for run in runs.values()] == ["embedded", "other"]
    digests = {run.data.tags["dsd.backbone.digest"] for run in runs.values()}
    assert len(digests) == 2 and locate(own)[1] in digests
    assert {run.data.tags["dsd.commit"] for run in runs.values()} == {f"commit of {Path().resolve()}"}
    assert runs["attempt"].data.tags["mlflow.parentRunId"] == "attempt"
    assert "mlflow.parentRunId" not in runs[""].data.tags


def test_rows_appear_during_training(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.0)
    with training("clip-prompt", "key", load()) as live:
        live.log(CURVE[0])
        [run] = entries("training")
        assert (run.info.status, len(curve(run))) == ("RUNNING", 1)
        assert "context.tokens" in run.data.params and "prompt.rank" not in run.data.params


def test_a_training_that_mlflow_followed_is_not_published_again(data: Path) -> None:
    params = load()
    with training("dsd", "key of dsd on scenes-com", params) as live:
        for row in CURVE:
            live.log(row)
    publish(params, data)
    assert sorted(run.data.tags["dsd.key"] for run in entries("training")) == [
        f"key of {method} on {name}" for method in sorted(METHODS) for name in ("scenes-com", "scenes-ref")
    ]


def test_other_code_from_the_same_start_is_another_training(data: Path) -> None:
    train(load(), CURVE)
    other = [row | {"loss": row["loss"] + (row["step"] > 3)} for row in CURVE]
    train(load(), other)
    train(load(), other)
    runs = sorted(entries("training"), key=lambda run: run.info.start_time)
    assert [curve(run)[-1][1] for run in runs] == [CURVE[-1]["loss"], other[-1]["loss"]]
    assert [len(curve(run)) for run in runs] == [7, 7]


def test_a_configured_tracking_server_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracking.uri() == "http://127.0.0.1:1"
