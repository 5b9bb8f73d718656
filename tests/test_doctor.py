"""`dsd doctor`: its findings and remedies, and that one check does not affect or delay another."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dvc.repo import Repo
from huggingface_hub import constants
from typer.testing import CliRunner

from dsd.config import BackboneParams, Params
from dsd.errors import DsdError
from flows import cli, doctor
from flows.doctor import Check, Finding, examine
from flows.stores import DATABASE, MLFLOW, PREFECT
from tests.conftest import ROOT
from tests.hubserver import COMMIT, TOKEN, Hub, connected, files_of
from tests.tiny import row


def fail(error: Exception) -> Callable[[], str]:
    def look() -> str:
        raise error

    return look


def test_one_check_neither_spoils_nor_delays_another() -> None:
    start = time.monotonic()
    found = examine(
        [
            Check("hangs", lambda: str(time.sleep(5)), "wait"),
            Check("problem", fail(DsdError("too small")), "make it larger"),
            Check("defect", fail(ZeroDivisionError("division\nby zero")), "never shown"),
            Check("import", fail(ModuleNotFoundError("No module named 'x'")), "never shown"),
            Check("fine", lambda: "there", "never shown"),
        ],
        seconds=0.3,
    )
    assert time.monotonic() - start < 4
    assert found == [
        Finding("hangs", "no answer within 0.3 s", "wait"),
        Finding("problem", "too small", "make it larger"),
        Finding("defect", "the check itself failed: ZeroDivisionError: division by zero", found[2].remedy),
        Finding("import", "cannot be checked: No module named 'x'", doctor.INSTALL),
        Finding("fine", "there"),
    ]
    assert found[2].remedy is not None and "defect of dsd" in found[2].remedy


def look(checks: Any, name: str) -> Finding:
    (finding,) = examine([check for check in checks if check.name == name], seconds=60)
    return finding


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """The versions that importlib.metadata reports."""
    found = {"prefect": "3.8.8", "fastapi": "0.150.0", "torch": "2.13.0+cu130", "diffusers": "0.42.0"}

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda _: ["diffusers<0.43,>=0.42", "torch>=2.10", "dvc>=3; extra == 'x'"]
    )
    monkeypatch.chdir(tmp_path)
    Path("constraints.txt").write_text("diffusers==0.42.1\ntorch==2.13.0\nfastapi==0.150.0\n")
    return found


def test_versions(versions: dict[str, str]) -> None:
    assert doctor.package("torch") == "2.13.0+cu130"
    assert doctor.package("diffusers") == "0.42.0 (tested with 0.42.1)"
    assert doctor.package("xformers", "gpu") == "not installed (extra `gpu`)"
    with pytest.raises(DsdError, match=r"^not installed$"):
        doctor.package("mlflow")
    versions["diffusers"] = "0.43.0"
    with pytest.raises(DsdError, match=r"^0\.43\.0, but dsd needs <0\.43,>=0\.42$"):
        doctor.package("diffusers")


def with_row(params: Params, row: BackboneParams, **runtime: str) -> Params:
    backbones = {**params.backbones, params.backbone: row}
    return params.model_copy(
        update={"backbones": backbones, "runtime": params.runtime.model_copy(update=dict(runtime))}
    )


def test_the_device_and_the_checkpoints(params: Params) -> None:
    assert "cores" in look(doctor._machine(params), "device").found
    assert look(doctor._machine(params), "attention") == Finding("attention", "sdpa runs in float32")
    checkpoint = look(doctor._machine(params), "checkpoint embedded")
    assert checkpoint.found.endswith("embedded, predicts v_prediction, 7 layers of cross-attention")
    assert look(doctor._machine(params), "checkpoint embedded-clip").remedy is None


@pytest.mark.parametrize(
    ("check", "changes", "line"),
    [
        ("device", {"device": "cuda"}, "device cuda: torch has no CUDA device"),
        ("attention", {"attention": "sdp"}, "did you mean 'sdpa'?"),
        ("attention", {"attention": "xformers"}, "runtime.attention: xformers"),
    ],
)
def test_what_cannot_run(
    params: Params, monkeypatch: pytest.MonkeyPatch, check: str, changes: dict[str, str], line: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = look(doctor._machine(with_row(params, params.backbones["embedded"], **changes)), check)
    assert line in found.found and found.remedy


@pytest.mark.parametrize(
    ("lost", "line"),
    [
        ("vae", "lacks the component vae/"),
        ("unet/diffusion_pytorch_model.safetensors", "no weights"),
        ("scheduler/scheduler_config.json", "scheduler_config.json: does not load"),
        ("unet/config.json", "unet/config.json: does not load"),
        ("", "no such checkpoint folder"),
    ],
)
def test_a_checkpoint_that_would_not_open(params: Params, models: Path, tmp_path: Path, lost: str, line: str) -> None:
    folder = shutil.copytree(models / "embedded", tmp_path / "copy")
    gone = folder / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    found = look(doctor._machine(with_row(params, row(folder))), "checkpoint embedded")
    assert line in found.found and "\n" not in found.found and found.remedy


def test_a_folder_that_is_no_clip(params: Params, tmp_path: Path) -> None:
    clip = params.model_copy(update={"backbones": {**params.backbones, "embedded-clip": row(tmp_path, "clip")}})
    assert "no checkpoint of family clip" in look(doctor._machine(clip), "checkpoint embedded-clip").found


def outside(params: Params) -> list[Check]:
    return list(doctor._outside(params.backbones, params.datasets))


def on_hub(params: Params, name: str) -> Params:
    changed = params.backbones["embedded"].model_copy(update={"source": f"owner/{name}", "revision": COMMIT})
    return with_row(params, changed)


def test_rows_of_the_hub(params: Params, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_of(models / "embedded")
    hub = Hub({"owner/there": files, "owner/gated": files}, gated={"owner/gated"})
    with connected(hub, tmp_path, monkeypatch):
        found = look(doctor._machine(on_hub(params, "there")), "checkpoint embedded")
        assert found.remedy is None and "GB on the hub, 7 layers of cross-attention" in found.found
        assert hub.fetched() == ["unet/config.json"]  # and no weights
        for name, line in (("vanished", "neither a folder here nor at"), ("gated", "is gated: accept its terms")):
            found = look(doctor._machine(on_hub(params, name)), "checkpoint embedded")
            assert line in found.found and found.remedy == doctor.ACCESS
        assert "without a token" in look(outside(on_hub(params, "there")), "hub").found
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert "with a token" in look(outside(on_hub(params, "there")), "hub").found


def test_offline_is_no_failure_where_nothing_is_on_the_hub(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("checkpoint embedded", "checkpoint embedded-clip"):
        assert look(doctor._machine(params), name).remedy is None
    assert look(outside(params), "hub") == Finding("hub", "not used by params.yaml")
    assert "HF_HUB_OFFLINE is set" in look(outside(on_hub(params, "there")), "hub").found
    there = on_hub(params, "there")
    assert look(doctor._machine(there), "checkpoint embedded").remedy == doctor.ACCESS
    for name in ("attention", "disk"):  # one problem is reported once
        found = look(doctor._machine(there), name)
        assert found.remedy is None and "does not open" in found.found


def test_disk(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a run needs up to" in look(doctor._machine(params), "disk").found
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    found = look(doctor._machine(params), "disk")
    assert "GB more than is free" in found.found and found.remedy


def test_stores(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in (MLFLOW, PREFECT, DATABASE):
        monkeypatch.delenv(setting, raising=False)
    assert look(doctor._stores(), "MLflow").found == f"sqlite:///{workspace}/mlflow.db"
    assert look(doctor._stores(), "Prefect").remedy is None
    assert list(workspace.glob("mlflow.db*")) == []
    monkeypatch.setenv(MLFLOW, "postgresql://dsd:s3cret@127.0.0.1:1/x")
    monkeypatch.setenv(DATABASE, "postgresql+asyncpg://dsd:s3cret@127.0.0.1:1/x")
    for name, setting in (("MLflow", MLFLOW), ("Prefect", DATABASE)):
        found = look(doctor._stores(), name)
        assert found.found.startswith(f"{setting}: ") and "s3cret" not in found.found
        assert found.remedy is not None and "docs/operations.md" in found.remedy
    assert (ROOT / "docs" / "operations.md").is_file()


@pytest.fixture
def repository(workspace: Path) -> Path:
    """A DVC project of one stage that has not run."""
    Path("dvc.yaml").write_text("stages:\n  one:\n    cmd: touch out\n    outs: [out]\n")
    Repo.init(no_scm=True).close()
    return workspace


def test_the_project(repository: Path, tmp_path: Path) -> None:
    assert look(doctor._project(), "DVC").found == "to run: one"
    assert look(doctor._project(), "DVC cache").found.startswith(str(repository / ".dvc"))
    assert look(doctor._project(), "DVC remote").found.startswith("none")
    for url, line, stands in (
        ("store", f"store {repository / 'store'}", False),
        ("/nosuch/folder/store", "store /nosuch/folder/store: no such folder", True),
        ("s3://bucket/store", "store s3://bucket/store: ", True),  # its package is not installed
    ):
        where = repository / url if "/" not in url else url
        (repository / ".dvc" / "config").write_text(
            f"[core]\n    no_scm = true\n    remote = store\n['remote \"store\"']\n    url = {where}\n"
        )
        found = look(doctor._project(), "DVC remote")
        assert found.found.startswith(line) and (found.remedy is not None) == stands


def test_where_there_is_no_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = {finding.check: finding for finding in examine(doctor.checks(), seconds=60)}
    assert {name for name in ("params.yaml", "Git", "DVC", "DVC cache", "DVC remote") if found[name].remedy} == {
        "params.yaml", "Git", "DVC", "DVC cache", "DVC remote",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_project_has_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = {finding.check: finding for finding in examine(doctor.checks(), seconds=60)}
    assert not [finding for finding in found.values() if "itself failed" in finding.found]
    names = ("params.yaml", "device", "attention", "checkpoint embedded", "checkpoint embedded-clip", "hub")
    assert not [found[name] for name in names if found[name].remedy]


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    fine, bad = Check("one", lambda: "there", ""), Check("two", fail(DsdError("a long line " * 9)), "mend it")
    monkeypatch.setattr(doctor, "checks", lambda: [fine])
    done = CliRunner().invoke(cli.app, ["doctor"])
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "no problems")
    monkeypatch.setattr(doctor, "checks", lambda: [fine, bad])
    done = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "80"})
    lines = done.output.splitlines()
    assert (done.exit_code, lines[-1]) == (1, "problems: 1")
    assert "→ mend it" in done.output and max(map(len, lines)) <= 80
    assert [line.split()[:2] for line in lines[1:3]] == [["one", "ok"], ["two", "problem"]]
    done = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.output)[0] == {"check": "one", "found": "there", "remedy": None}
    assert json.loads(done.output)[1]["remedy"] == "mend it"
