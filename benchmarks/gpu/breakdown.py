"""A profile of the engine: kernels, copies, gaps, and the host's assembly of batches (the producer)."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu.bench import Bench, Sizes
from benchmarks.gpu.engine import METHODS
from benchmarks.gpu.records import Case, Result
from benchmarks.gpu.timeline import Span, breakdown
from dsd.engine.encodings import Arrays
from dsd.engine.engine import Engine
from dsd.engine.forward import Batch
from dsd.scorers.evidence import Request, requests

ANCHOR = "dsd anchor"  # an event that relates the profiler's clock to the host's


class Traced(Engine):
    """An engine that records when it assembles and computes each batch, in whichever thread."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.inputs: list[Span] = []
        self.passes: list[Span] = []

    def _inputs(self, rows: Sequence[Request]) -> Batch:
        start = time.perf_counter()
        batch = super()._inputs(rows)
        self.inputs.append(Span("inputs", start, time.perf_counter(), threading.get_ident()))
        return batch

    def _batch(self, batch: Batch) -> Arrays:
        start = time.perf_counter()
        arrays = super()._batch(batch)  # ends with copies to the host, so the device has finished
        self.passes.append(Span("pass", start, time.perf_counter(), threading.get_ident()))
        return arrays


def cases(sizes: Sizes) -> list[Case]:
    """Return a case per checkpoint."""
    return [
        Case(
            model,
            {"model": model, "batch": batches[0], "dtype": "bfloat16", "steps": sizes.profiled, "tiny": sizes.tiny},
            20,
            partial(measure, model),
            model,
        )
        for model, batches in sizes.batches.items()
    ]


def measure(model: str, bench: Bench) -> Result:
    """Return the breakdown of some steps, and the seconds of a step without the profiler."""
    session = bench.comvg(model, *METHODS)
    params, size = session.params, session.params.runtime.batch_size
    rows = requests(session.examples("test"), params.noise, params.seed, compares=True)[: bench.sizes.profiled * size]
    engine = Traced(session.backbone, None, params.evidence, *session.diffusion_encodings, size, 1)
    engine.compute(rows)  # warm up, and encode what is missing
    start = time.perf_counter()
    engine.compute(rows)
    plain = (time.perf_counter() - start) / (len(rows) / size)
    engine.inputs, engine.passes = [], []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.machine.cuda else [])]
    with profile(activities=activities) as profiler:
        anchor = time.perf_counter()
        with record_function(ANCHOR):
            pass
        engine.compute(rows)
        bench.machine.synchronize()
    kind = torch.autograd.DeviceType.CUDA if bench.machine.cuda else torch.autograd.DeviceType.CPU
    device = device_spans(profiler.events(), kind, anchor)
    return {**breakdown(device, engine.inputs, engine.passes), "batch": size, "seconds_per_step_unprofiled": plain}


def device_spans(events: Sequence[Any], kind: Any, anchor: float) -> list[Span]:
    """Return what ran on devices of a kind, by the host's clock, in seconds; on a CPU, operators that no other calls.

    Args:
        events: of the profiler, whose times are in microseconds.
        anchor: when the event ANCHOR began, by the host's clock.
    """
    zero = min(event.time_range.start for event in events if event.name == ANCHOR)
    return [
        Span(
            event.name,
            anchor + (event.time_range.start - zero) / 1e6,
            anchor + (event.time_range.end - zero) / 1e6,
            event.thread,
        )
        for event in events
        if event.device_type == kind and event.name != ANCHOR and event.cpu_parent is None
    ]
