"""Tracks: what the races of one method on one dataset are run with.

Shapes: C candidates, K draws; E pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsd.config import ContrastiveMethod, DenoisingMethod, NoiseParams, Params, prompted
from dsd.data.draws import Draw, draws
from dsd.data.examples import MatchingExample, Pair, pairs, read_examples
from dsd.data.image_table import ImageTable
from dsd.engine.batching import Entry
from dsd.engine.encodings import all_texts, contrastive_encodings, diffusion_encodings, read_all
from dsd.engine.engine import Engine, RacedMethod, Values, cosines, row_values, source_digest
from dsd.errors import DataError, ParamsError, unknown
from dsd.models import clip_heads as contrastive
from dsd.models import device_of, load_clip, load_diffusion
from dsd.models.prompts import PROMPT, AttentionPrompt
from dsd.schedules.race import Floats, Race
from dsd.schedules.replay import Course
from dsd.scorers.evidence import UNCONDITIONAL, plan, requests, wanted
from dsd.store import Store, digest


class Folders(NamedTuple):
    """What the stages have left of a dataset."""

    prepared: Path
    cached: Path
    trained: Path

    def examples(self, split: str) -> list[MatchingExample]:
        """Those of a split, a square as a choice among its images for each of its texts.

        Raises:
            DataError: nothing was prepared.
        """
        file = self.prepared / "examples.parquet"
        if not file.exists():
            raise DataError(f"{file}: no such file; run `make reproduce` first")
        whole = read_examples(file, split)
        return [choice for example in whole for choice in choices(example)]

    def inputs(self) -> tuple[ImageTable, list[str]]:
        return ImageTable(self.prepared / "images.parquet"), all_texts(read_all(self.prepared))


def choices(example: MatchingExample) -> list[MatchingExample]:
    """The example itself where it has one right pair or none, else one for each right pair: the images of its text."""
    if len(example.answer) <= 1:
        return [example]
    return [
        replace(example, id=f"{example.id}/{t}", texts=(example.texts[t],), answer=((i, 0),)) for i, t in example.answer
    ]


def right(example: MatchingExample) -> int:
    """Which of the example's pairs is right; −1 where none is, or a wrong candidate is the same, a tie: never right."""
    if not example.answer:
        return -1
    ((image, text),) = example.answer
    candidates = [Pair(i, t) for i in example.images for t in example.texts]
    answer = Pair(example.images[image], example.texts[text])
    return pairs([example]).index(answer) if candidates.count(answer) == 1 else -1


def proposals(proposer: str, examples: Sequence[MatchingExample], params: Params, folders: Folders) -> list[Floats]:
    """What a contrastive method says of the candidates [C] of each example.

    Raises:
        ParamsError: params.yaml has no such method, or it sees its pairs with the U-Net itself.
    """
    method = params.methods.get(proposer)
    if not isinstance(method, ContrastiveMethod):
        fitting = [name for name, other in params.methods.items() if isinstance(other, ContrastiveMethod)]
        raise ParamsError(f"races.racing.proposer: {unknown('contrastive method', proposer, fitting)}")
    clip = load_clip(params.backbones[method.backbone], device_of(params.runtime.device))
    tables = contrastive_encodings(clip, *folders.inputs(), Store(folders.cached), params.runtime.kept_texts)
    head = contrastive.learned(method, clip, *tables, folders.trained / proposer)
    asked = pairs(examples)
    found = dict(zip(asked, cosines(head, asked, params.runtime.batch_size).astype(float).tolist(), strict=True))
    return [np.array([found[pair] for pair in pairs([example])]) for example in examples]


@dataclass(frozen=True)
class Track:
    """What the races of one method on one dataset are run with."""

    method: RacedMethod
    engine: Engine
    source: str  # digest of all but the rows that evidence depends on
    key: str  # digest of the models and params, which is the same wherever they are: a training's last bits are not
    noise: NoiseParams
    params: Params

    @classmethod
    def of(cls, name: str, method: RacedMethod, params: Params, folders: Folders) -> Track:
        runtime = params.runtime
        backbone = load_diffusion(params.backbones[params.backbone], device_of(runtime.device), runtime.attention)
        store, most = Store(folders.cached), runtime.kept_texts
        tables = diffusion_encodings(backbone, *folders.inputs(), params.images.resolution, store, most)
        training = prompted(params) if method.prompt == "few-shot" else None
        file = folders.trained / training / PROMPT if training else None
        learned = AttentionPrompt.load(file, backbone.digest) if file else None
        engine = Engine(backbone, learned, params.evidence, *tables, params.runtime.batch_size)
        reduced = method.model_dump(exclude={"levels", "schedule"})
        source = digest(source_digest(params, backbone.digest, file), reduced)
        noise = NoiseParams(levels=params.races.levels, draws_per_level=params.races.draws_per_level)
        learning = params.training[training].model_dump() if training else None
        settings = [params.datasets[name], params.images, params.evidence, params.prompt, noise]
        key = digest(backbone.digest, reduced, learning, [row.model_dump() for row in settings], params.seed)
        return cls(method, engine, source, key, noise, params)

    @property
    def draws(self) -> list[Draw]:
        return draws(self.noise, self.params.seed)

    def set_off(self, example: MatchingExample) -> bool:
        """Whether a pair's value is set off against that of its image without a text: where images are compared."""
        return isinstance(self.method, DenoisingMethod) and len(example.images) > 1

    def collect(self, examples: Sequence[MatchingExample], store: Store, title: str) -> list[Values]:
        """The values [C, K] of every example; goes on where it was stopped.

        Candidates are the pairs of an example, draws those of `dsd.data.draws`, level by level.
        """
        normalised, poolings = isinstance(self.method, DenoisingMethod), self.params.evidence.poolings
        rows = requests(examples, self.noise, self.params.seed, normalised)
        shards = plan(rows, self.source, self.params.evidence.shard)
        self.engine.fill(shards, store, title, lambda arrays: {"values": row_values(arrays, self.method, poolings)})
        parts = [part["values"] for part in (store.read(shard.key) for shard in shards) if part is not None]
        asked = wanted(examples, normalised)
        values_EK, place = np.concatenate(parts).reshape(len(asked), -1), {pair: n for n, pair in enumerate(asked)}
        found = []
        for example in examples:
            candidates = pairs([example])
            values_CK = values_EK[[place[pair] for pair in candidates]]
            if self.set_off(example):
                values_CK = values_CK - values_EK[[place[Pair(pair.image, UNCONDITIONAL)] for pair in candidates]]
            found.append(values_CK)
        return found

    def entries(
        self,
        course: Course,
        examples: Sequence[MatchingExample],
        proposals: Sequence[Floats] | None,
        budget: float | None = None,
    ) -> Iterator[Entry]:
        """The examples as races of a schedule; `proposals` are those of its proposer, None without one; `budget` is of
        evaluations a candidate."""
        ordered = [self.draws[k] for k in course.order]
        for number, example in enumerate(examples):
            candidates = pairs([example])
            most = None if budget is None else int(budget * len(candidates))
            race = Race(len(candidates), course.schedule, proposals[number] if proposals else None, most)
            yield Entry(example.id, race, candidates, ordered, self.set_off(example))
