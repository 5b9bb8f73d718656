"""The device that is measured: its properties, its clock and its memory."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

WARM = 2  # calls before those that are timed: libraries choose kernels and allocate in the first
LEAST = 3  # timed calls, however long they take


class Machine:
    """A device of this machine; a CPU stands in for a GPU in runs at tiny size."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def describe(self) -> dict[str, Any]:
        """Return what speed depends on, other than the libraries."""
        shared: dict[str, Any] = {"cores": os.cpu_count()}
        if not self.cuda:
            return {"name": "CPU", "memory": None, **shared}
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "name": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            **shared,
        }

    def synchronize(self) -> None:
        """Wait until the device has computed everything."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Return cached memory to the device."""
        if self.cuda:
            torch.cuda.empty_cache()

    def peak(self, work: Callable[[], object]) -> int:
        """Return the bytes that a call needs in addition to those in use before it.

        On a CPU: the growth of the largest size that this process has had.
        """
        self.synchronize()
        before = self._used()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) if self.cuda else self._used()) - before

    def _used(self) -> int:
        if self.cuda:
            return int(torch.cuda.memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def timed(self, seconds: float, *works: Callable[[], object]) -> list[list[float]]:
        """Return the seconds of each call of each function, called in turns until the given time is over."""
        for work in [work for work in works for _ in range(WARM)]:
            work()
        self.synchronize()
        taken: list[list[float]] = [[] for _ in works]
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(taken[0]) < LEAST:
            for work, own in zip(works, taken, strict=True):
                start = time.perf_counter()
                work()
                self.synchronize()
                own.append(time.perf_counter() - start)
        return taken


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float | int]:
    """Return the median, the 5th and the 95th percentile, and the number of values."""
    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), (0.05, 0.5, 0.95))
    return {"value": float(median), "low": float(low), "high": float(high), "n": len(values)}


def rates(count: int, seconds: Sequence[float]) -> dict[str, float | int]:
    """Return the `spread` of items per second, of calls of `count` items each."""
    return spread([count / taken for taken in seconds])


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32, with its 10 bits of mantissa, in float32 convolutions; PyTorch allows it by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
