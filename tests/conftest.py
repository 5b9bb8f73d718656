"""What tests of several files share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from dsd.config import Params, by_file, files, read
from dsd.store import Store

if TYPE_CHECKING:
    from tests.postgres import Postgres

ROOT = Path(__file__).parent.parent
# Before anything imports prefect: no test reads or writes what the user's own runs have left.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="prefect-")


def read_settings(folder: Path = Path()) -> dict[str, Any]:
    """The content of params.yaml and the files beside it."""
    return read(folder / "params.yaml")


def write_settings(settings: dict[str, Any], folder: Path = Path()) -> None:
    """Write params.yaml and the files beside it."""
    for file, content in by_file(settings, folder / "params.yaml").items():
        file.write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace as the current folder, with the project's params files and dvc.yaml."""
    for file in (*files(ROOT / "params.yaml"), ROOT / "dvc.yaml"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's empty database: creating its tables takes longer than most tests."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=600):
        yield


@pytest.fixture(scope="session", autouse=True)
def _clean_prefect_home() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["PREFECT_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny checkpoints `embedded` and `embedded-clip`."""
    from tests.tiny import save_checkpoints  # it loads torch, which most tests do without

    folder = tmp_path_factory.mktemp("models")
    save_checkpoints(folder)
    return folder


@pytest.fixture(scope="session")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Stable Diffusion XL."""
    from tests.tiny import save_xl

    folder = tmp_path_factory.mktemp("xl")
    save_xl(folder)
    return folder


@pytest.fixture(scope="session")
def params(models: Path) -> Params:
    from tests.tiny import small

    return small(models)


@pytest.fixture(scope="session")
def prepared(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small scenes-com, prepared."""
    from dsd.datasets import benchmark
    from dsd.datasets.preparation import prepare

    raw, folder = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared")
    row = params.datasets["scenes-com"]
    benchmark(row.kind).download(row, seed=params.seed, folder=raw, workers=1)
    prepare("scenes-com", row, raw, folder, images=params.images, seed=params.seed, workers=1)
    return folder


@pytest.fixture(scope="session")
def cached(params: Params, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its latents and text embeddings."""
    from dsd.engine.cache import encode
    from dsd.engine.session import Folders, Session

    folder = tmp_path_factory.mktemp("cached")
    encode(Session("scenes-com", params, Folders(prepared, folder, folder)))
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the components with weights that are opened from here on; that of a CLIP is ""."""
    from dsd.models import clip, stable_diffusion

    names: list[str] = []
    for module in (stable_diffusion, clip):

        def counted(folder: Path, kind: Any, name: str, dtype: Any, whole: Any = module.component) -> Any:
            names.append(name)
            return whole(folder, kind, name, dtype)

        monkeypatch.setattr(module, "component", counted)
    return names


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server; `postgres()` is the URL of a new database on it. Skips where none is installed."""
    from tests.postgres import serving

    with serving() as server:
        yield server


def shard_keys(store: Store) -> list[str]:
    """The keys of all complete shards, sorted."""
    return sorted(path.stem for path in store.root.glob("*.safetensors") if path.stem in store)
