"""The engine computes the evidence of (pair, draw) requests, in full batches, each once, resumable.

Shapes: R rows of a shard, P poolings, L layers, H heads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from dsd.config import EvidenceParams
from dsd.engine.encodings import Arrays
from dsd.engine.forward import Batch, Lookup, observe
from dsd.errors import CheckpointError
from dsd.models.prompts import AttentionPrompt
from dsd.scorers.evidence import Request

if TYPE_CHECKING:
    from dsd.models.stable_diffusion import StableDiffusion

log = logging.getLogger(__name__)

OWN_BATCH = 32  # from this size on, a batch per core is faster than a shared one


class Engine:
    """Evidence of one backbone under one prompt (or none)."""

    def __init__(
        self,
        backbone: StableDiffusion,
        prompt: AttentionPrompt | None,
        evidence: EvidenceParams,
        latents: Lookup,
        texts: Lookup,
        batch_size: int,
        cores: int | None = None,
    ) -> None:
        """latents [B, C, r, r] by image id; hidden [T, M, D] and content [T, M] by text.

        cores: divide batches as on a CPU with this many cores, so that processes with other numbers of threads compute
        equal bits; by default this process's threads.
        """
        self.backbone, self.evidence, self.batch_size = backbone, evidence, batch_size
        self._as_on = cores
        self.prompt = prompt.to(backbone.device) if prompt is not None else None
        self._latents, self._texts = latents, texts

    def compute(self, rows: Sequence[Request]) -> Arrays:
        """Return the evidence of the rows: attention [R, P, L, H], attribution [R, L, H], error [R]; float32.

        On a CPU each core computes its own batch, which is faster except for the last few rows. If memory is too small,
        the batch size is halved permanently.
        """
        while True:
            try:
                return self._compute(rows)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                log.warning("out of memory: batches of %d from now on (runtime.batch_size)", self.batch_size)

    def _compute(self, rows: Sequence[Request]) -> Arrays:
        count = math.ceil(len(rows) / self.batch_size)
        if apart := self._cores > 1 and len(rows) >= self._cores * min(OWN_BATCH, self.batch_size):
            count = self._cores * math.ceil(count / self._cores)
        chunks = (rows[len(rows) * n // count : len(rows) * (n + 1) // count] for n in range(count))
        inputs = map(self._inputs, chunks)  # in this thread: reading may compute missing encodings
        if apart:
            with ThreadPoolExecutor(torch.get_num_threads(), "batch", torch.set_num_threads, (1,)) as pool:
                batches = list(pool.map(self._batch, inputs))
        else:
            batches = list(map(self._batch, inputs))
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    @property
    def _cores(self) -> int:
        """The number of concurrent batches that determines their sizes."""
        return self._as_on if self._as_on and self.backbone.device.type == "cpu" else cores(self.backbone.device)

    @property
    def rows_at_once(self) -> int:
        """The rows that fill all batches that are computed at once."""
        return self.batch_size * self._cores

    def _inputs(self, rows: Sequence[Request]) -> Batch:
        return Batch.of(rows, self.backbone.schedule_length, self._latents, self._texts)

    @torch.inference_mode()
    def _batch(self, batch: Batch) -> Arrays:
        evidence = observe(self.backbone, self.prompt, self.evidence, batch.to(self.backbone.device))
        arrays = [tensor.float().cpu().contiguous().numpy() for tensor in evidence]
        if not all(np.isfinite(array).all() for array in arrays):
            dtype = str(self.backbone.dtype).removeprefix("torch.")
            remedy = "use bfloat16 or float32" if dtype == "float16" else "the checkpoint or the prompt is damaged"
            raise CheckpointError(f"{self.backbone.source}: evidence in {dtype} is NaN or infinite; {remedy}")
        return dict(zip(("attention", "attribution", "error"), arrays, strict=True))


def cores(device: torch.device) -> int:
    """Return the number of concurrent batches."""
    return torch.get_num_threads() if device.type == "cpu" else 1
