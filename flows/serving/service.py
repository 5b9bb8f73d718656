"""A registered version as a model of MLflow, which scores the rows of concurrent requests together."""

from __future__ import annotations

import ctypes
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, INTERNAL_ERROR, TEMPORARILY_UNAVAILABLE
from mlflow.pyfunc import PythonModel

from dsd.errors import BusyError, DsdError, RequestError
from flows.serving.schema import SIGNATURE, Answer, Row, answers_table, decode_image, encode_heatmap, parse_table
from flows.serving.settings import Settings

if TYPE_CHECKING:
    from dsd.matcher import Matcher, Picture

log = logging.getLogger(__name__)
logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # it logs that it validates the example

PIXEL = "R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="  # a white image of one pixel, for the example
MAX_LETTERS = 32  # per token: longer texts are refused without tokenizing
FAILED = "internal error; see the server's log"


def save(settings: Settings, prompt: Path | None, folder: Path) -> None:
    """Write the model of a version: its settings and its prompt, and no checkpoint."""
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=str(Path(__file__).with_name("model.py")),
        model_config=settings.model_dump(mode="json"),
        artifacts=None if prompt is None else {"prompt": str(prompt)},
        signature=SIGNATURE,
        input_example=pd.DataFrame([{"image": PIXEL, "texts": ["a red circle", "a blue square"], "heatmap": False}]),
        pip_requirements=[f"mlflow=={mlflow.__version__}"],  # a version runs in this project's environment
    )


@dataclass(frozen=True)
class Job:
    """A validated row of a request, and its future answer."""

    image: Picture
    texts: list[str]
    heatmap: bool
    answer: Future[Answer] = field(default_factory=Future)


class Rounds:
    """Threads that run the model, one per core, or one for a GPU.

    In a round a thread takes waiting jobs up to a full batch. Each thread computes on one core, so that no core waits
    for another: this has a higher throughput than sharing each batch among the cores.
    """

    def __init__(self, matcher: Matcher) -> None:
        from dsd.engine.engine import cores  # it imports torch

        if matcher.backbone.device.type == "cpu":
            keep_memory()
        self.matcher, self.waiting = matcher, SimpleQueue[Job | None]()
        self.filled: Callable[[float], object] = lambda share: None  # told the fill of each round, 1 is a full batch
        self._threads = cores(matcher.backbone.device)
        self._running = [Thread(target=self._run, name="round", daemon=True) for _ in range(self._threads)]
        for thread in self._running:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether every thread is there to answer."""
        return all(thread.is_alive() for thread in self._running)

    def close(self) -> None:
        """End the threads after the jobs that wait."""
        for _ in self._running:
            self.waiting.put(None)

    def _run(self) -> None:
        import torch

        if self._threads > 1:
            torch.set_num_threads(1)
        while (first := self.waiting.get()) is not None:
            jobs = [first]
            share = self.waiting.qsize() // self._threads  # leave jobs to threads that are idle
            while len(jobs) <= share and sum(self.matcher.rows(1, len(job.texts)) for job in jobs) < self.matcher.full:
                try:
                    job = self.waiting.get_nowait()
                except Empty:
                    break
                if job is None:
                    self.waiting.put(None)
                    break
                jobs.append(job)
            self.filled(sum(self.matcher.rows(1, len(job.texts)) for job in jobs) / self.matcher.full)
            self._answer([job for job in jobs if job.answer.set_running_or_notify_cancel()])

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Answer the jobs of a round; if the round fails, run each job alone, so that only the faulty one fails."""
        try:
            scores = self.matcher.score_many([([job.image], job.texts) for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
            else:
                for job in jobs:
                    self._answer([job])
            return
        for job, scores_1T in zip(jobs, scores, strict=True):
            try:
                job.answer.set_result(self._answer_of(job, scores_1T[0].tolist()))
            except Exception as error:
                job.answer.set_exception(error)

    def _answer_of(self, job: Job, scores: list[float]) -> Answer:
        if cut := self.matcher.cut(job.texts):
            raise too_long(cut[0], self.matcher.backbone.max_tokens)
        best = [text for text, score in zip(job.texts, scores, strict=True) if score == max(scores)]
        answer: Answer = {"scores": scores, "best": best[0] if len(best) == 1 else None}
        if remarks := self.matcher.remarks(job.texts):
            answer["remarks"] = remarks
        if job.heatmap and answer["best"] is not None:
            answer["heatmap"] = encode_heatmap(self.matcher.heatmap_of(job.image, answer["best"]))
        return answer


def too_long(text: str, tokens: int) -> RequestError:
    return RequestError(f"text {text[:40]!a}: longer than the model's {tokens} tokens")


def keep_memory() -> None:
    """Keep freed memory in this process, if the C library is glibc.

    By default the memory of each thread returns to the system after a round; allocating it again takes a sixth of the
    time of a round.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for setting, value in ((-1, 2**31 - 1), (-4, 0)):  # M_TRIM_THRESHOLD, M_MMAP_MAX
            library.mallopt(setting, value)


class Service(PythonModel):
    """A version as MLflow loads it; SIGNATURE has the columns of its inputs and outputs."""

    settings: Settings
    rounds: Rounds

    def load_context(self, context: Any) -> None:
        self.settings = Settings.model_validate(context.model_config)
        prompt = context.artifacts.get("prompt")
        self.rounds = Rounds(self.settings.matcher(None if prompt is None else Path(prompt)))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        try:
            answers = self.submit(parse_table(model_input))
            if wait(answers, self.settings.wait_seconds).not_done:
                raise self.cancel(answers)
            return answers_table([answer.result() for answer in answers])
        except BusyError as error:
            raise Refused(str(error), TEMPORARILY_UNAVAILABLE) from None
        except DsdError as error:
            raise Refused(str(error), BAD_REQUEST) from None
        except Exception:
            log.exception("a request failed")
            raise Refused(FAILED, INTERNAL_ERROR) from None

    def submit(self, rows: Sequence[Row]) -> list[Future[Answer]]:
        """Validate the rows of a request, then enqueue all of them.

        Raises:
            RequestError, ImageError, TextError: the first invalid row and its error, in one line.
        """
        if not 1 <= len(rows) <= self.settings.max_images:
            raise RequestError(f"{len(rows)} images; send 1 to {self.settings.max_images} per request")
        if (size := sum(len(row.image) for row in rows)) > self.settings.max_bytes:
            raise RequestError(f"{size} bytes of images; send {self.settings.max_bytes} at most")
        jobs = []
        for number, row in enumerate(rows, 1):
            try:
                jobs.append(self._job(row))
            except DsdError as error:
                raise type(error)(f"row {number}: {error}") from None
        for job in jobs:
            self.rounds.waiting.put(job)
        return [job.answer for job in jobs]

    def cancel(self, answers: Sequence[Future[Answer]]) -> BusyError:
        """Cancel the answers that are still enqueued; return the error for the client."""
        for answer in answers:
            answer.cancel()
        return BusyError(f"no answer within {self.settings.wait_seconds:g} seconds; try again later")

    def _job(self, row: Row) -> Job:
        from dsd.arguments import check_texts  # it imports torch

        matcher, settings = self.rounds.matcher, self.settings
        if len(row.texts) > settings.max_texts:
            raise RequestError(f"{len(row.texts)} texts; send {settings.max_texts} at most")
        tokens = matcher.backbone.max_tokens
        for text in row.texts:
            if len(text) > MAX_LETTERS * tokens:
                raise too_long(text, tokens)
        check_texts(row.texts)
        return Job(matcher.picture(decode_image(row.image), settings.max_pixels), row.texts, row.heatmap)


class Refused(MlflowException):
    """An error that the client receives as one line; MLflow's server would include the whole request."""

    def serialize_as_json(self) -> str:
        return json.dumps({"error_code": self.error_code, "message": self.args[0]})
