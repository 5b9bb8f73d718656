"""Golden numbers: some results of each kind on the tiny checkpoints, in Git with the version of the code.

After a change that moves results on purpose: raise the kind's constant in dsd/versions.py, then run
`python -m tests.golden`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from dsd.config import Params, StudyParams
from dsd.data.draws import Draw, draws
from dsd.datasets import benchmark
from dsd.datasets.preparation import prepare
from dsd.engine.score import score
from dsd.engine.session import Folders, Session
from dsd.evaluation.evaluate import ScoredSplit, evaluate
from dsd.experiments.scaling import measure
from dsd.experiments.studies import run_piece
from dsd.experiments.study_results import read_study
from dsd.experiments.variants import Study
from dsd.schedules.racing import fit_forecast
from dsd.scorers.evidence import read_index
from dsd.store import Store
from dsd.training.loop import Training, train, trainings
from dsd.versions import VERSIONS
from tests.raced import LEVELS, few, synthetic_races
from tests.tiny import save_checkpoints, small

FILE = Path(__file__).with_name("golden.json")
DATASET = "scenes-com"
COMMAND = "python -m tests.golden"


class Run:
    """A run on the tiny checkpoints in an empty folder; each step is computed once, when a kind of results needs it."""

    def __init__(self, params: Params, folder: Path) -> None:
        quick: dict[str, object] = {"warmup": 1, "learning_rate": 0.01, "epochs": 5.0}  # so that ten steps show
        fast = {name: row.model_copy(update=quick) for name, row in params.training.items()}
        fast["dsd"] = fast["dsd"].model_copy(update={"temperature": 1e-3})  # random weights attend to all texts alike
        self.params, self.folder = params.model_copy(update={"training": fast}), folder
        self.folders, self.scored = Folders.of(folder, DATASET), folder / "score"
        self.losses: Callable[[str], list[float]] = cache(self._losses)

    @cached_property
    def session(self) -> Session:
        """The session of the prepared dataset."""
        row, seed, raw = self.params.datasets[DATASET], self.params.seed, self.folder / "raw"
        benchmark(row.kind).download(row, seed=seed, folder=raw, workers=1)
        prepare(DATASET, row, raw, self.folders.prepared, images=self.params.images, seed=seed, workers=1)
        return Session(DATASET, self.params, self.folders)

    def _losses(self, method: str) -> list[float]:
        """Train a method; the loss of each step."""
        return [step["loss"] for step in train(self.session, Training(method))]

    @cached_property
    def untrained(self) -> dict[str, list[str]]:
        """Score the diffusion methods that use nothing learned; the shards of each entry of the index."""
        rows = {name: row for name, row in self.params.methods.items() if row.zero_shot and not row.contrastive}
        params = self.params.model_copy(update={"methods": rows})
        _ = self.session  # prepared
        return self._score(Session(DATASET, params, self.folders))

    @cached_property
    def complete(self) -> dict[str, list[str]]:
        """Score all methods; the shards of each entry of the index."""
        for training in trainings(self.params):
            list(train(self.session, training))
        return self._score(self.session)

    def _score(self, session: Session) -> dict[str, list[str]]:
        score(session, self.scored, split="test")
        shards: dict[str, list[str]] = read_index(self.scored)["shards"]
        return shards


def latents(run: Run) -> list[float]:
    images, _ = run.session.diffusion_encodings
    images.fill()
    return _some(run.session.cache, images.keys, "latents")


def texts(run: Run) -> list[float]:
    _, encodings = run.session.diffusion_encodings
    encodings.fill()
    return _some(run.session.cache, encodings.keys, "hidden")


def features(run: Run) -> list[float]:
    tables = [table for clip in run.session.clip_names for table in run.session.features(clip)]
    for table in tables:
        table.fill()
    return _some(run.session.cache, sorted(key for table in tables for key in table.keys), "features")


def prompts(run: Run) -> list[float]:
    return run.losses("dsd")


def heads(run: Run) -> list[float]:
    return [loss for method in run.params.training if method != "dsd" for loss in run.losses(method)]


def evidence(run: Run) -> list[float]:
    shards, store, params = run.untrained["none"], Store(run.scored), run.params
    arrays = [_some(store, shards, array) for array in ("attention", "attribution", "error")]
    noise = Draw(0.4, 7).noise((4,)).tolist() + [float(draw.seed % 1000) for draw in draws(params.noise, params.seed)]
    return [number for numbers in arrays for number in numbers] + noise


def cosines(run: Run) -> list[float]:
    return _some(Store(run.scored), run.complete["clip-zero-shot"] + run.complete["clip-prompt"], "cosine")


def scores(run: Run) -> list[float]:
    _ = run.complete
    split = ScoredSplit.of(DATASET, run.params, run.folders.prepared, run.scored)
    evaluated = evaluate(DATASET, split, run.params.evaluate, run.params.seed, run.folder / "evaluate").results
    return [round(metric["micro"].low, 6) for metric in evaluated.values()]


def races(run: Run) -> list[float]:
    recorded = synthetic_races(20)
    forecast = fit_forecast(recorded.values, np.repeat(LEVELS, 2).tolist(), 3, recorded.proposals["clip-zero-shot"])
    return [*map(float, forecast.order), *forecast.spread, *forecast.weights[-1]]


def scaling(run: Run) -> list[float]:
    row = measure("normal", 10, few(run.params.races), run.params.evaluate, run.params.seed)
    return [row["share"]["value"]]


def studies(run: Run) -> list[float]:
    row = StudyParams(split="test", datasets=(DATASET,), methods=("clip-finetune", "denoising"), variants={"v": {}})
    study = Study("s", run.params.model_copy(update={"studies": {"s": row}}))
    run_piece(study, "v", DATASET, row.methods, run.folder, run.folder / "work", run.folder / "train")
    stored = read_study(run.folder / "s.json")["v"][DATASET]
    return [float(np.mean([int(rank) for rank in stored[method]["ranks"].split()])) for method in row.methods]


KINDS: dict[str, Callable[[Run], list[float]]] = {
    function.__name__: function
    for function in (latents, texts, features, prompts, heads, evidence, cosines, scores, races, scaling, studies)
}


def results(params: Params, folder: Path, kinds: Iterable[str] = tuple(KINDS)) -> dict[str, list[float]]:
    """Some numbers of each of these kinds, computed from an empty folder, and nothing that they do not need."""
    run = Run(params, folder)
    return {kind: KINDS[kind](run) for kind in kinds}


def _some(store: Store, keys: Sequence[str], name: str) -> list[float]:
    """Mean, standard deviation and first numbers of an array over the shards."""
    shards = (store.read(key) for key in keys)
    values = np.concatenate([shard[name].ravel() for shard in shards if shard is not None]).astype(np.float64)
    return [float(values.mean()), float(values.std()), *map(float, values[:4])]


def moved(recorded: Mapping[str, Any], computed: Mapping[str, list[float]]) -> list[str]:
    """One line for each kind whose numbers or version are not the recorded ones."""
    lines = []
    for kind, numbers in computed.items():
        version, golden = recorded[kind]["version"], recorded[kind]["numbers"]
        # Another processor's kernels differ in the last bits; training amplifies them.
        same = len(numbers) == len(golden) and np.allclose(numbers, golden, rtol=5e-3, atol=1e-5)
        if version != VERSIONS[kind]:
            lines.append(f"{kind}: recorded for version {version}, the code is {VERSIONS[kind]}: run `{COMMAND}`")
        elif not same:
            lines.append(
                f"{kind}: results moved. If that is meant, raise {kind!r} in dsd/versions.py and run "
                f"`{COMMAND}`; recorded {golden}, computed {numbers}"
            )
    return lines


def main() -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        save_checkpoints(folder / "models")
        torch.manual_seed(0)
        computed = results(small(folder / "models"), folder)
    rows = {kind: {"version": VERSIONS[kind], "numbers": numbers} for kind, numbers in computed.items()}
    FILE.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
