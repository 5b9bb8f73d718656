"""Seconds from a finished run to the verdict of the gate, and of a tick without new checkpoints, each as a process.

Both use a temporary MLflow store and the results of this workspace.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import yaml

from dsd.config import FolderSource, RegisteredSource, by_file, load
from dsd.errors import DataError
from flows import DATA

ROOT = Path(__file__).parent.parent


def seconds() -> tuple[float, float]:
    """Seconds of publishing, registering and gating the results of this workspace; and of a tick over that registry."""
    with TemporaryDirectory() as folder:
        store = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PYTHONPATH": str(ROOT)}

        def taken(*words: str, output: str, within: str = ".") -> float:
            start = time.perf_counter()
            command = [sys.executable, "-m", *words]
            done = subprocess.run(
                command, cwd=within, env={**os.environ, **store}, check=True, capture_output=True, text=True
            )
            passed = time.perf_counter() - start
            if done.stdout.strip() != output:  # a command that does nothing is fast
                raise DataError(f"{' '.join(words)}: printed {done.stdout!r}, not {output!r}")
            return passed

        taken("benchmarks.watching", "champion", output="promoted")
        published = taken("benchmarks.watching", "challenger", output="kept out")
        _watched(Path(folder))
        ticks = [taken("flows.cli", "watch", "--once", output="nothing new", within=folder) for _ in range(4)]
        return published, median(ticks[1:])  # the first reads the checkpoint's files


def _watched(folder: Path) -> None:
    """Make a workspace that watches the checkpoint of this one, as a folder and as a version of the registry."""
    params = load()
    sources = {
        "folder": FolderSource(kind="folder", path="checkpoints", config=None, revision=None),
        "registered": RegisteredSource(kind="registered"),
    }
    settings = params.model_copy(update={"watch": params.watch.model_copy(update={"sources": sources})})
    for file, content in by_file(settings.model_dump(mode="json"), folder / "params.yaml").items():
        file.write_text(yaml.safe_dump(content))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "own").symlink_to(Path(params.backbones[params.backbone].source).resolve())
    for name in {row.source for row in params.backbones.values() if Path(row.source).exists()}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(Path(name).resolve())


def main() -> None:
    """Register the results of this workspace; `champion`: under other params, as a champion to compare with."""
    from flows.registry.promote import register_and_judge
    from flows.registry.registry import KEPT_OUT, PROMOTED
    from flows.tracking import publish

    params = load()
    if sys.argv[1] == "champion":
        other = params.evaluate.model_copy(update={"resamples": params.evaluate.resamples + 1})
        params = params.model_copy(update={"evaluate": other})
    else:
        publish(params, DATA)
    with TemporaryDirectory() as folder:  # not over the page of this workspace
        _, verdict = register_and_judge(params, Path(folder) / "index.html")
    print(PROMOTED if verdict.promoted else KEPT_OUT)


if __name__ == "__main__":
    main()
