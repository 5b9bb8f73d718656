"""`make performance`: write docs/performance.md from the results of `make gpu`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.records import read
from benchmarks.gpu.timeline import KINDS, OTHER
from dsd.errors import DataError
from dsd.store import write_atomic

Cases = Mapping[str, Mapping[str, Any]]  # entries of a measurement by name of the case
PEAK = "peak"
HEAD = """# Performance on a GPU

`make performance` writes this page from the results of `make gpu`, `benchmarks/gpu/results/<device>/*.json`.
[CONTRIBUTING.md](../CONTRIBUTING.md#on-a-gpu) says how to run it.
"""
NOTHING = "No results yet: run `make gpu` on a machine with a CUDA device, then `make performance`."
LEGEND = (
    "Random weights of the published configurations, U-Net in bfloat16, VAE and text encoders in float32, one device. "
    "Values are medians; brackets have the 5th and 95th percentile, n is the number of repeats unless stated otherwise."
)


def page(folder: Path) -> str:
    """Return the page of all results in a folder; raise DataError if a file is damaged."""
    devices = [sub for sub in sorted(folder.glob("*")) if list(sub.glob("*.json"))]
    sections = ["\n".join(device(sub)) for sub in devices] or [NOTHING]
    return "\n".join([HEAD, *sections]).rstrip() + "\n"


def device(folder: Path) -> list[str]:
    """Return the lines of a device's section."""
    contents = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    cases = {name: content["cases"] for name, content in contents.items()}
    about = next(iter(contents.values()))["device"]
    entries = [entry for own in cases.values() for entry in own.values()]
    tiny = " (at tiny size: no measurement)" if any(entry["setting"].get("tiny") for entry in entries) else ""
    lines = [f"## {about['name']}{tiny}", "", made_with(about, entries), "", LEGEND, ""]
    parts = {
        "correctness": correctness, "passes": denoiser, "engine": engine, "profile": profile, "memory": memory,
        "encoders": encoders,
    }  # fmt: skip
    for name, part in parts.items():
        if name in cases:
            lines += part(cases)
    return lines + absent(cases)


def made_with(about: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    libraries = distinct(" ".join(pair) for entry in entries for pair in entry["libraries"].items())
    code = distinct(entry["code"][:8] for entry in entries)
    days = sorted({entry["finished"][:10] for entry in entries})
    cuda = f"CUDA {about['cuda']}, " if about.get("cuda") else ""
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{', '.join(libraries)}; {cuda}{about['cores']} cores; {when}; code {', '.join(code)}."


def distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def results(cases: Cases) -> dict[str, Any]:
    return {name: entry["result"] for name, entry in cases.items() if "result" in entry}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> list[str]:
    """Return a section with a table, nothing without rows."""
    if not rows:
        return []
    lines = [f"### {title}", "", *([note, ""] if note else [])]
    lines += [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]
    return [*lines, ""]


def number(value: float) -> str:
    """Three significant digits, without an exponent between 0.0001 and a million."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(value: Mapping[str, float], unit: float = 1.0) -> str:
    low, middle, high = (number(value[key] / unit) for key in ("low", "value", "high"))
    return f"{middle} [{low}, {high}], n {value['n']:.0f}"


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def gigabytes(value: float) -> str:
    return number(value / 1e9)


def correctness(cases: Mapping[str, Cases]) -> list[str]:
    """Tables of scores, of encodings and heat maps, and of the training step."""
    compared = results(cases["correctness"])
    scores, values, steps = [], [], []
    for name, result in compared.items():
        if name.startswith("scores, "):
            for method, row in result.items():
                changed = row["changed"]
                interval = f"{share(changed['value'])} [{share(changed['low'])}, {share(changed['high'])}]"
                moved = [spread(row["drift"]), number(row["largest"])]
                scores.append([name.removeprefix("scores, "), method, *moved, interval, f"{changed['n']:,}"])
        elif name.startswith("heat maps"):
            values.append([name, spread(result["difference"]), number(result["largest"])])
        elif name.startswith("training step"):
            difference, cosine = number(result["gradient_difference"]), f"{result['gradient_cosine']:.6f}"
            steps.append([name, f"{result['loss']:.6f}", f"{result['reference_loss']:.6f}", difference, cosine])
        else:
            values += [[key, spread(row["drift"]), number(row["largest"])] for key, row in result.items()]
    return [
        *table(
            "Correctness: scores of the embedded checkpoint",
            ["compared", "method", "difference", "largest", "other answers", "examples"],
            scores,
            "Differences are relative to the mean difference between an example's best and worst candidate; n counts "
            "scores. Answers: share of examples with another best candidate, with its 95 % interval.",
        ),
        *table(
            "Correctness: against the CPU in float32",
            ["values", "difference", "largest"],
            values,
            "Latents and hidden states: relative to their standard deviation; n counts values. Heat maps, of values in "
            "0…1: mean over a word's map; n counts words.",
        ),
        *table(
            "Correctness: first step of training",
            ["", "loss", "loss on the CPU, float32", "relative difference of the gradient", "its cosine"],
            steps,
        ),
    ]


def denoiser(cases: Mapping[str, Cases]) -> list[str]:
    """The table of bare passes and passes with capture."""
    bare, captured = results(cases["passes"]), results(cases.get("capture", {}))
    peak = bare.pop(PEAK, None)
    rows = []
    for name in dict.fromkeys([*bare, *captured]):
        plain, capture = bare.get(name), captured.get(name)
        operations = (
            [number(plain["operations_per_pass"] / 1e12), spread(plain["passes_per_second"])] if plain else ["", ""]
        )
        of_peak = ""
        if plain and peak:
            rate = plain["passes_per_second"]["value"] * plain["operations_per_pass"]
            of_peak = share(rate / peak["operations_per_second"]["value"])
        with_capture = [spread(capture["passes_per_second"]), spread(capture["over_bare"])] if capture else ["", ""]
        rows.append([name, *operations, of_peak, *with_capture])
    note = "Passes of the U-Net per second, for one image and text each."
    if peak:
        rate = spread(peak["operations_per_second"], 1e12)
        note += f" Peak of the device, a product of bfloat16 matrices of side {peak['matrix']:,}, in TFLOP/s: {rate}."
    columns = ["", "TFLOP per pass", "bare passes/s", "of the peak", "passes/s with capture", "time over bare"]
    return table("Denoiser", columns, rows, note)


def engine(cases: Mapping[str, Cases]) -> list[str]:
    """The table of the whole engine."""
    captured, rows = results(cases.get("capture", {})), []
    for name, result in results(cases["engine"]).items():
        alone = captured.get(f"{name}, batch {result['batch']}")
        of_alone = ""
        if alone:
            of_alone = share(result["passes_per_second"]["value"] / alone["passes_per_second"]["value"])
        encoding = f"{number(result['encoding_seconds'])} ({result['images']} images, {result['texts']} texts)"
        done = f"{result['rows']:,} of {result['planned_rows']:,}"
        rows.append(
            [name, str(result["batch"]), spread(result["passes_per_second"]), of_alone, number(result["seconds"]), done,
             encoding]
        )  # fmt: skip
    note = (
        "The stages `cache` and `score` on a synthetic ComVG: two images, one sentence, and the unconditional pass of "
        "each image; n counts shards."
    )
    columns = ["", "batch", "passes/s", "of the denoiser with capture", "seconds to score", "rows", "seconds to encode"]
    return table("Engine", columns, rows, note)


def profile(cases: Mapping[str, Cases]) -> list[str]:
    """Tables of where a step's time goes, and of the longest kernels."""
    profiled = results(cases["profile"])
    steps, kinds, longest = [], [], []
    for name, result in profiled.items():
        seconds = [number(result["seconds_per_step"]), number(result["seconds_per_step_unprofiled"])]
        shares = [share(result[key]) for key in ("busy", "idle_in_inputs", "idle_elsewhere", "inputs")]
        thread = "its own" if result["inputs_own_thread"] else "the pass's"
        steps.append([name, str(result["batch"]), *seconds, *shares, thread, number(result["kernels_per_step"])])
        kinds.append([name, *(share(result["kinds"][kind]) for kind in (*KINDS, OTHER))])
        longest += [[name, f"`{top['name']}`", share(top["share"]), number(top["per_step"])] for top in result["top"]]
    columns = ["", "batch", "s/step", "s/step without profiler", "busy", "idle: inputs", "idle: other", "inputs",
               "thread of inputs", "kernels per step"]  # fmt: skip
    note = (
        "A step is a batch of the engine. Busy: a kernel or a copy runs on the device. Inputs: the host assembles a "
        "batch of latents, texts and noise. Shares of the steps' time."
    )
    return [
        *table("Where a step's time goes", columns, steps, note),
        *table("Kernels by kind", ["", *KINDS, OTHER], kinds, "Shares of the steps' time."),
        *table("Longest kernels", ["", "kernel", "share", "calls per step"], longest),
    ]


def memory(cases: Mapping[str, Cases]) -> list[str]:
    """The table of peak memory."""
    rows = []
    for name, result in results(cases["memory"]).items():
        if "bytes" in result:
            seconds = f"{gigabytes(result['bytes'])} ({spread(result['seconds_per_step'])} s per step)"
            rows.append([name, "", "", "", seconds])
        else:
            rows.append([name, *(gigabytes(result[key]) for key in ("weights", "bare", "captured")), ""])
    note = (
        "GB. Peaks are in addition to weights and inputs; training: a step of one example of two images and two texts, "
        "four rows."
    )
    columns = ["", "weights of the U-Net", "bare pass", "pass with capture", "training"]
    return table("Peak memory", columns, rows, note)


def encoders(cases: Mapping[str, Cases]) -> list[str]:
    """The table of the rates of VAE and text encoders."""
    keys = ("images_encoded_per_second", "images_decoded_per_second", "texts_encoded_per_second")
    rows = [
        [name, str(result["resolution"]), *(spread(result[key]) for key in keys)]
        for name, result in results(cases["encoders"]).items()
    ]
    columns = ["", "pixels", "images encoded/s", "images decoded/s", "texts encoded/s"]
    return table("VAE and text encoders", columns, rows)


def absent(cases: Mapping[str, Cases]) -> list[str]:
    """The table of what has no result, and why."""
    rows = [
        [measurement, name, f"{outcome}: {entry[outcome]}".replace("|", "\\|")]
        for measurement, entries in cases.items()
        for name, entry in entries.items()
        for outcome in ("skipped", "failed")
        if outcome in entry
    ]
    return table("Not measured", ["measurement", "case", "reason"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="performance", description="Write the page of the results of `make gpu`.")
    parser.add_argument("--results", type=Path, required=True, help="the folder that benchmarks.gpu wrote")
    parser.add_argument("--out", type=Path, required=True, help="the page")
    options = parser.parse_args(arguments)
    try:
        write_atomic(options.out, page(options.results).encode())
    except DataError as error:
        print(f"performance: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
