"""Golden numbers: some results of each kind on the tiny checkpoints, in Git with the version of the code.

After a change that moves results on purpose: raise the kind's constant in dsd/versions.py, then run
`python -m tests.golden`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from dsd.config import Params, StudyParams
from dsd.data.draws import Draw, draws
from dsd.datasets import benchmark
from dsd.datasets.preparation import prepare
from dsd.engine.encodings import encode
from dsd.engine.score import score
from dsd.evaluation.evaluate import evaluate
from dsd.experiments import scaling
from dsd.experiments.studies import run
from dsd.schedules.race import learn
from dsd.scorers.evidence import read_index
from dsd.store import Store
from dsd.training.loop import train
from dsd.versions import VERSIONS
from tests.raced import LEVELS, entrants, few
from tests.tiny import save_checkpoints, small

FILE = Path(__file__).with_name("golden.json")
DATASET = "scenes-com"
COMMAND = "python -m tests.golden"


def results(params: Params, folder: Path) -> Iterator[tuple[str, list[float]]]:
    """(kind, some numbers) of every kind, each computed from nothing in the folder."""
    raw, prepared, cached, trained, scored = (folder / name for name in ("raw", "prepared", "cached", "train", "score"))
    row = params.datasets[DATASET]
    benchmark(row.kind).download(row, seed=params.seed, folder=raw, workers=1)
    prepare(DATASET, params, raw, prepared)
    encode(DATASET, params, prepared, cached)
    store = Store(cached)
    for kind, prefix, array in (
        ("latents", "latents", "latents"),
        ("texts", "texts", "hidden"),
        ("features", "clip", "features"),
    ):
        yield kind, _some(store, sorted(key for key in _keys(store) if key.startswith(prefix)), array)
    quick: dict[str, object] = {"warmup": 1, "learning_rate": 0.01, "epochs": 5.0}  # so that ten steps show
    fast = {name: row.model_copy(update=quick) for name, row in params.training.items()}
    fast["dsd"] = fast["dsd"].model_copy(update={"temperature": 1e-3})  # random weights attend to every text alike
    params = params.model_copy(update={"training": fast})
    curves = {}
    for method in params.training:
        steps = list(train(DATASET, method, params, prepared, cached, trained / method))
        curves[method] = [step["loss"] for step in steps]
    yield "prompts", curves.pop("dsd")
    yield "heads", [loss for losses in curves.values() for loss in losses]
    score(DATASET, params, prepared, cached, trained, scored, split="test")
    store, index = Store(scored), read_index(scored)["shards"]
    evidence = (_some(store, index["none"], array) for array in ("attention", "attribution", "error"))
    noise = Draw(0.4, 7).noise((4,)).tolist() + [float(draw.seed % 1000) for draw in draws(params.noise, params.seed)]
    yield "evidence", [number for numbers in evidence for number in numbers] + noise
    yield "cosines", _some(store, index["clip-zero-shot"] + index["clip-prompt"], "cosine")
    evaluated = evaluate(DATASET, params, prepared, scored, folder / "evaluate").results
    yield "scores", [round(metric["micro"].low, 6) for metric in evaluated.values()]
    races = entrants(20)
    learned = learn(races.values, np.repeat(LEVELS, 2).tolist(), 3, races.proposals["clip-zero-shot"])
    yield "races", [*map(float, learned.order), *learned.spread, *learned.weights[-1]]
    raced = params.model_copy(update={"races": few(params.races)})
    yield "scaling", [scaling.row("normal", 10, raced)["share"]["value"]]
    study = StudyParams(split="test", datasets=(DATASET,), methods=("clip-finetune", "denoising"), variants={"v": {}})
    run("s", "v", DATASET, params.model_copy(update={"studies": {"s": study}}), folder, folder / "work")
    found = json.loads((folder / "s.json").read_text())["v"][DATASET]["ranks"]
    yield "studies", [float(np.mean([int(rank) for rank in ranks.split()])) for ranks in found.values()]


def _keys(store: Store) -> list[str]:
    return [path.stem for path in store.root.glob("*.safetensors")]


def _some(store: Store, keys: list[str], name: str) -> list[float]:
    """Mean, deviation and first numbers of an array over the shards."""
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
                f"{kind}: results moved. If that is meant, raise {kind.upper()} in dsd/versions.py and run "
                f"`{COMMAND}`; recorded {golden}, computed {numbers}"
            )
    return lines


def main() -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        save_checkpoints(folder / "models")
        torch.manual_seed(0)
        computed = dict(results(small(folder / "models"), folder))
    rows = {kind: {"version": VERSIONS[kind], "numbers": numbers} for kind, numbers in computed.items()}
    FILE.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
