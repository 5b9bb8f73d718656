"""Arithmetic of a profile: how a device's time divides into kernels, copies and gaps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Interval = tuple[float, float]

# Parts of the names of kernels: the first kind that matches counts, and without a match OTHER.
KINDS = {
    "copies": ("memcpy", "memset"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "convolutions": ("conv2d", "convol", "fprop", "implicit_gemm", "winograd", "nchwtonhwc", "nhwctonchw"),
    "matrix products": ("gemm", "gemv", "nvjet", "cutlass", "cublas", "matmul", "linear"),
    "norms and softmax": ("norm", "softmax", "moments", "welford"),
}
OTHER = "other kernels"
TOP = 12  # kernels by time


class Span(NamedTuple):
    """Something that took time; seconds."""

    name: str
    start: float
    end: float
    thread: int = 0


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals, disjoint and in order."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def overlap(a: Sequence[Interval], b: Sequence[Interval]) -> float:
    """Return the time that two unions of intervals, as `merged` returns them, have in common."""
    return length(a) + length(b) - length(merged([*a, *b]))


def intervals(spans: Iterable[Span]) -> list[Interval]:
    return merged((span.start, span.end) for span in spans)


def kind_of(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lowered for part in parts)), OTHER)


def breakdown(device: Sequence[Span], inputs: Sequence[Span], passes: Sequence[Span]) -> dict[str, Any]:
    """Return where the time of the steps goes.

    A step is a batch: its inputs are assembled on the host, then it is computed. The window is from the first of these
    to the last; all shares are of it, and busy + idle_in_inputs + idle_elsewhere = 1.

    Args:
        device: kernels and copies. inputs, passes: the host's spans of each batch.

    Raises:
        ValueError: nothing ran on the device.
    """
    if not device:
        raise ValueError("the profiler has seen no kernel: the device's events are not available here")
    start, end = min(span.start for span in (*inputs, *passes)), max(span.end for span in (*inputs, *passes))
    window, steps = end - start, len(passes)
    inside = [span for span in device if span.end > start and span.start < end]
    spans = [span._replace(start=max(span.start, start), end=min(span.end, end)) for span in inside]
    busy, assembling = intervals(spans), intervals(inputs)
    idle_in_inputs = length(assembling) - overlap(busy, assembling)
    by_kind: dict[str, list[Span]] = {kind: [] for kind in (*KINDS, OTHER)}
    by_name: dict[str, list[Span]] = {}
    for span in spans:
        by_kind[kind_of(span.name)].append(span)
        by_name.setdefault(span.name, []).append(span)
    shares = {name: length(intervals(own)) / window for name, own in by_name.items()}
    top = sorted(shares, key=shares.__getitem__, reverse=True)[:TOP]
    return {
        "steps": steps,
        "seconds_per_step": window / steps,
        "busy": length(busy) / window,
        "idle_in_inputs": idle_in_inputs / window,
        "idle_elsewhere": (window - length(busy) - idle_in_inputs) / window,
        "inputs": length(assembling) / window,
        "inputs_own_thread": not {span.thread for span in inputs} & {span.thread for span in passes},
        "kernels_per_step": len(spans) / steps,
        "kinds": {kind: length(intervals(own)) / window for kind, own in by_kind.items()},
        "top": [{"name": name[:100], "share": shares[name], "per_step": len(by_name[name]) / steps} for name in top],
    }
