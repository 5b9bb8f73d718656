"""`python -m benchmarks.gpu --out DIR --minutes 7`: measure what has no result yet, the most important first."""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench, Sizes
    from benchmarks.gpu.records import Case, Records

# Measurement, where its cases are, and which of them: those of the first checkpoint come before more of the others.
PLAN: tuple[tuple[str, str, slice], ...] = (
    ("correctness", "correctness.cases", slice(None)),
    ("passes", "denoiser.passes", slice(None)),
    ("capture", "denoiser.capture", slice(None)),
    ("engine", "engine.cases", slice(1)),
    ("profile", "breakdown.cases", slice(1)),
    ("memory", "memory.cases", slice(None)),
    ("encoders", "encoders.cases", slice(None)),
    ("engine", "engine.cases", slice(1, None)),
    ("profile", "breakdown.cases", slice(1, None)),
)
OPENING = {"sd2-base": 15.0, "sd2.1-v": 15.0, "sdxl": 40.0}  # seconds to write and open a checkpoint, on an H100
MARGIN = 5.0  # seconds that are left when the last case has ended


class Clock:
    """The time of the run."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


def planned(sizes: Sizes, records: Records) -> Iterator[tuple[str, Case]]:
    """Yield (measurement, case) in order; a measurement whose libraries are missing is recorded as skipped."""
    from benchmarks.gpu.records import WHOLE, Case

    for measurement, place, part in PLAN:
        module, function = place.split(".")
        try:
            cases = getattr(import_module(f"benchmarks.gpu.{module}"), function)(sizes)
        except ImportError as error:
            record(measurement, Case(WHOLE, {}, 0, lambda bench: {}), records, "skipped", missing(error), 0.0)
        else:
            yield from ((measurement, case) for case in cases[part])


def missing(error: ImportError) -> str:
    return f"{error.name or error} is not installed"


def run(sizes: Sizes, bench: Bench, records: Records, clock: Clock) -> int:
    """Measure every case without a result, as far as the time allows; return how many have failed."""
    failed = 0
    for measurement, case in planned(sizes, records):
        if records.has(measurement, case):
            say(f"{measurement}: {case.name}: has a result")
            continue
        opening = 0.0 if case.model is None or case.model in bench.checkpoints else OPENING[case.model]
        needed, start = case.seconds + opening + MARGIN, time.monotonic()
        if clock.left < needed and not sizes.tiny:
            outcome, content = "skipped", f"{clock.left:.0f} s are left, it takes about {needed:.0f}; run again"
        else:
            outcome, content = attempt(case, bench)
        record(measurement, case, records, outcome, content, time.monotonic() - start)
        failed += outcome == "failed"
    return failed


def attempt(case: Case, bench: Bench) -> tuple[str, Any]:
    """Measure a case; return the outcome and its content, see `Records.add`."""
    from benchmarks.gpu.records import Skipped

    try:
        bench.machine.release()  # in here: after some errors every call of a GPU fails
        return "result", case.measure(bench)
    except Skipped as reason:
        return "skipped", str(reason)
    except ImportError as error:
        return "skipped", missing(error)
    except Exception as error:  # the other cases are measured all the same
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def record(measurement: str, case: Case, records: Records, outcome: str, content: Any, seconds: float) -> None:
    records.add(measurement, case, outcome, content, seconds)
    say(f"{seconds:6.1f} s  {measurement}: {case.name}: {outcome}{'' if outcome == 'result' else f': {content}'}")


def say(line: str) -> None:
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu", description="Measure what a GPU computes, and how fast.")
    parser.add_argument("--out", type=Path, required=True, help="folder for <device>/<measurement>.json")
    parser.add_argument("--minutes", type=float, required=True, help="after which the run ends")
    parser.add_argument("--tiny", action="store_true", help="check the code at tiny size, also on a CPU")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes: must be above 0, found {options.minutes:g}")
    clock = Clock(options.minutes)
    faulthandler.dump_traceback_later(60 * options.minutes, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        return measure(options.out, clock, tiny=options.tiny)
    except KeyboardInterrupt:
        print("gpu: interrupted; run again to resume", file=sys.stderr)
        return 130
    finally:
        faulthandler.cancel_dump_traceback_later()


def measure(out: Path, clock: Clock, *, tiny: bool) -> int:
    """Open the device and measure; return the exit status."""
    try:
        import torch

        from benchmarks.gpu.bench import REAL, TINY, Bench
        from benchmarks.gpu.device import Machine
        from benchmarks.gpu.records import Records
        from dsd.errors import DsdError
    except ImportError as error:
        print(f"gpu: {missing(error)}; see `make gpu-bundle` in CONTRIBUTING.md", file=sys.stderr)
        return 2
    if not (torch.cuda.is_available() or tiny):
        print("gpu: no CUDA device; --tiny checks the code without one", file=sys.stderr)
        return 2
    machine, sizes = Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")), TINY if tiny else REAL
    try:
        with tempfile.TemporaryDirectory(prefix="dsd-gpu-") as folder:
            records = Records(out, machine.describe())
            say(f"{records.folder}: {clock.left:.0f} s")
            failed = run(sizes, Bench(sizes, machine, Path(folder)), records, clock)
    except DsdError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    say(f"{clock.left:.0f} s are left")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
