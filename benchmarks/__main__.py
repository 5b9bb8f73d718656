"""`make bench`: measure speed and memory on this machine and write benchmarks/results.json.

Both sides of a ratio are measured in turns in one run, so that a noisy machine affects both.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks import executors, plain, serving, watching
from benchmarks.drift import drift
from benchmarks.setting import PREPARED, engine_over
from dsd.config import DenoisingMethod, load
from dsd.data.draws import draws
from dsd.data.examples import MatchingExample, read_examples
from dsd.data.image_table import ImageTable
from dsd.engine.batching import Filled
from dsd.engine.races import RaceRunner
from dsd.engine.session import Folders, Session
from dsd.errors import DataError
from dsd.experiments.scaling import read_scaling
from dsd.models.attention import Capture
from dsd.schedules import SCHEDULES
from dsd.schedules.base import Course
from dsd.schedules.exhaustive import exhaustive_course
from dsd.schedules.race import Floats
from dsd.schedules.racing import racing_name
from dsd.schedules.replay import matched_name, read_comparisons
from dsd.scorers.evidence import Requests, requests
from dsd.store import write_atomic

RESULTS = Path("benchmarks/results.json")
RACES, CLASSES = Path("data/races"), "scenes-cls"
DRIFTED = 100  # examples on which arithmetic is compared: half precision is slow on a CPU
CALIBRATED, PROPOSED = racing_name(0.05, None, None), racing_name(0.05, "clip-zero-shot", None)
Result = dict[str, float | str | bool]


def at_most(value: float, unit: str, target: float) -> Result:
    return {"value": round(value, 3), "unit": unit, "target": target, "ok": value <= target}


def at_least(value: float, unit: str, target: float) -> Result:
    return {"value": round(value, 3), "unit": unit, "target": target, "ok": value >= target}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def engine_vs_plain_loop() -> Result:
    """Examples per second of the engine, with encoding, over those of the plain loop; scores equal to 1e-5."""
    params = load()
    examples = read_examples(PREPARED / "examples.parquet", "test")
    few, many, same_draws = examples[:6], examples[:480], draws(params.noise, params.seed)
    pictures, ratios = ImageTable(PREPARED / "images.parquet"), []

    def requests_of(some: list[MatchingExample]) -> Requests:
        return requests(some, params.noise, params.seed, compares=False)  # the plain loop scores attention alone

    for _ in range(3):
        with TemporaryDirectory() as folder:
            engine = engine_over(params, Path(folder))
            loop = partial(plain.score, engine.backbone, params.evidence, pictures, params.images.resolution)
            loop(few[:1], same_draws)  # warm up
            start = time.perf_counter()
            expected = loop(few, same_draws)
            between = time.perf_counter()
            engine.compute(requests_of(many))
            ratios.append((between - start) / len(few) * len(many) / (time.perf_counter() - between))
            scores = engine.compute(requests_of(few))["attention"][:, 0].mean((-2, -1))
        np.testing.assert_allclose(scores, [expected[row] for row in requests_of(few)], atol=1e-5)
    return at_least(statistics.median(ratios), "times", 8)


def capture_overhead() -> Result:
    """Seconds of a U-Net pass with capture and pooling over those of a bare pass with fused attention."""
    params = load()
    with TemporaryDirectory() as folder:
        backbone = engine_over(params, Path(folder)).backbone
    batch, side = params.runtime.batch_size, backbone.resolution // backbone.scale
    latents = torch.randn(batch, backbone.latent_channels, side, side)
    text = backbone.encode_texts(["a red circle left of a blue star"])
    hidden, content = text.hidden.repeat(batch, 1, 1), text.content.repeat(batch, 1)
    timesteps = torch.full((batch,), 300)

    def bare() -> None:
        backbone.predict_noise(latents, timesteps, hidden)

    def captured() -> None:
        capture = Capture.of(params.evidence, content)
        backbone.predict_noise(latents, timesteps, hidden, capture=capture)
        capture.stacked()

    with torch.inference_mode():
        bare()
        captured()
        ratios = []
        for _ in range(60):
            first, second, third = seconds(bare), seconds(captured), seconds(bare)
            ratios.append(2 * second / (first + third))
    return at_most(statistics.median(ratios), "times", 1.10)


def score_memory_growth() -> Result:
    """Peak memory of scoring 1000 examples over that of scoring 100."""

    def peak(count: int) -> float:
        command = [sys.executable, "-m", "benchmarks.memory", str(count)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    return at_most(peak(1000) / peak(100), "times", 1.1)


def many_machines() -> dict[str, Result]:
    """The overhead of Ray: actors on the same cores as one process."""
    measured = executors.measure(Path("data"))
    return {
        "passes_per_second": at_least(measured.passes, "", 100),
        "ray_vs_local": at_least(measured.share, "times", 0.8),
        "ray_start_seconds": at_most(measured.start, "s", 60),
    }


def arithmetic() -> dict[str, Result]:
    """Answers and scores in half precision against float32, the worse of attention and denoising; score differences are
    relative to the spread of an example's candidates."""
    params, cache = load(), Path("data/cache/scenes-com")
    examples = read_examples(PREPARED / "examples.parquet", "test")[:DRIFTED]
    results: dict[str, Result] = {}
    full, row = engine_over(params, cache), params.backbones[params.backbone]
    for short, dtype in {"bf16": "bfloat16", "fp16": "float16"}.items():
        rows = {**params.backbones, params.backbone: row.model_copy(update={"dtype": dtype})}
        low = engine_over(params.model_copy(update={"backbones": rows}), cache)
        drifts = drift(full, low, params, examples).values()
        results[f"{short}_changed_answers"] = at_most(max(d.changed for d in drifts), "", 0.02)
        results[f"{short}_mean_drift"] = at_most(max(d.mean for d in drifts), "", 0.02)
        results[f"{short}_largest_drift"] = at_most(max(d.largest for d in drifts), "", 0.1)
    return results


def races() -> dict[str, Result]:
    """The evaluations that racing saves on classes, by the replays of `make races`, and the speed of the engine in it.

    Raises:
        DataError: `make races`, or a stage that it needs, was not run.
    """
    comparison = read_comparisons(RACES / f"{CLASSES}.json").get("denoising")
    if comparison is None:
        raise DataError(f"{RACES / CLASSES}.json: no races of denoising; run `make races` first")
    chosen, draws_ = comparison["chosen"], comparison["draws"]
    share = {name: row["share"]["value"] for name, row in chosen.items()}
    own = share[CALIBRATED]
    params = load()
    session = Session(CLASSES, params, Folders.of(Path("data"), CLASSES))
    examples = session.examples("test")
    method = params.methods["denoising"]
    assert isinstance(method, DenoisingMethod)
    runner = RaceRunner(session, method)
    runner.open()
    proposed = session.proposals("clip-zero-shot", examples)

    def course_of(name: str) -> Course:
        return SCHEDULES["racing"].course(chosen[name]["setting"], params.races, comparison)

    course = course_of(CALIBRATED)
    engine, fill = race_engine(runner, course, examples, None)
    proposed_engine, proposed_fill = race_engine(runner, course_of(PROPOSED), examples, proposed)
    return {
        "racing_vs_exhaustive_evaluations": at_least(1 / own, "times", 20),
        "racing_vs_staged_evaluations": at_least(share[matched_name("staged", 0.05)] / own, "times", 1.5),
        "racing_vs_hierarchical_evaluations": at_least(share[matched_name("hierarchical", 0.05)] / own, "times", 1.5),
        "proposer_evaluations_per_candidate": at_most(draws_ * share[PROPOSED], "", 0.3),
        "racing_disagreement": at_most(
            chosen[CALIBRATED]["disagreement"]["value"], "", chosen[CALIBRATED]["setting"]["delta"]
        ),
        "racing_seconds_vs_evaluations": speedup_share(runner, course, exhaustive_course(params.races), examples),
        "evaluations_per_candidate_of_3129": at_most(evaluations_per_candidate(3129), "", 1.3),
        "engine_vs_single_image": engine,
        "batch_fill": fill,
        "engine_vs_single_image_proposed": proposed_engine,
        "batch_fill_proposed": proposed_fill,
    }


def served() -> dict[str, Result]:
    """The served model under many clients, against the engine."""
    share, waited = serving.throughput()
    return {
        "serving_throughput_share": at_least(share, "", 0.9),
        "serving_p99_seconds": at_most(waited, "s", load().serving.wait_seconds),
    }


def speedup_share(runner: RaceRunner, course: Course, whole: Course, examples: Sequence[MatchingExample]) -> Result:
    """How many times faster a course is than all draws, over how many times fewer evaluations it takes."""

    def per_image(course: Course, some: Sequence[MatchingExample]) -> tuple[float, float]:
        filled = Filled()
        taken = seconds(lambda: list(runner.run(course, some, None, filled)))
        return taken / len(some), filled.rows / len(some)

    per_image(course, examples[:4])  # warm up
    shares = []
    for turn in range(3):
        slow, many = per_image(whole, examples[2 * turn : 2 * turn + 2])
        fast, few = per_image(course, examples[60 * turn : 60 * turn + 60])
        shares.append(slow / fast * few / many)
    return at_least(statistics.median(shares), "", 0.8)


def race_engine(
    runner: RaceRunner, course: Course, examples: Sequence[MatchingExample], proposed: Sequence[Floats] | None
) -> tuple[Result, Result]:
    """Images per second over those of the same races one by one, and how full the batches of many races are."""
    filled = Filled()

    def together() -> None:
        list(runner.run(course, examples, proposed, filled))

    def one_by_one(some: Sequence[MatchingExample]) -> None:
        """As public code does it: a batch is the next round of one image."""
        engine = runner.session.engine(runner.method.prompt)
        for entry in runner.entries(course, some, proposed):
            while rows := entry.requests():
                entry.record(dict(zip(rows, -engine.compute(rows)["error"], strict=True)))

    one_by_one(examples[:2])  # warm up
    few = examples[: len(examples) // 4]
    ratio = (seconds(lambda: one_by_one(few)) / len(few)) / (seconds(together) / len(examples))
    return at_least(ratio, "times", 3), at_least(filled.share, "", 0.9)


def evaluations_per_candidate(candidates: int) -> float:
    """The cost of racing on synthetic evidence, for the worse kind of noise."""
    rows = [row for row in read_scaling(RACES)["rows"] if row["candidates"] == candidates]
    return max(row["draws"] * float(row["share"]["value"]) for row in rows)


def reproduction() -> dict[str, Result]:
    """Seconds of the last whole reproduction of this workspace, and of another one with nothing changed."""
    path = Path("data/reproduction.json")
    if not path.exists():
        raise DataError(f"{path}: no whole reproduction was recorded; run `make reproduce` in a fresh clone first")
    record = json.loads(path.read_text())
    again = seconds(lambda: subprocess.run([sys.executable, "-m", "flows.reproduce"], check=True, capture_output=True))
    return {
        "reproduce_minutes": at_most(record["seconds"] / 60, "min", 10),
        "orchestration_seconds": at_most(record["orchestration"], "s", 60),
        "noop_seconds": at_most(again, "s", 10),
    }


def watch() -> dict[str, Result]:
    """Seconds from a finished run to the verdict of the gate, and of a tick without new checkpoints."""
    published, tick = watching.seconds()
    return {"publish_seconds": at_most(published, "s", 15), "watch_tick_seconds": at_most(tick, "s", 5)}


def main() -> None:
    if not PREPARED.exists():
        sys.exit(f"bench: {PREPARED}: no such folder; run `make reproduce` first")
    results: dict[str, Result] = {}
    for measure in (engine_vs_plain_loop, capture_overhead, score_memory_growth):
        results[measure.__name__] = measure()
        sys.stdout.write(f"{measure.__name__}: {results[measure.__name__]}\n")
    results |= many_machines()
    results |= arithmetic()
    results |= served()
    try:
        results |= races()
        results |= reproduction()
        results |= watch()
    except DataError as error:
        sys.exit(f"bench: {error}")
    finally:
        write_atomic(RESULTS, (json.dumps(results, indent=2) + "\n").encode())
    for name, result in results.items():
        verdict = "ok" if result["ok"] else "MISSED"
        sys.stdout.write(f"{name:34} {result['value']:>9} {result['unit']:6} target {result['target']:>6} {verdict}\n")


if __name__ == "__main__":
    main()
