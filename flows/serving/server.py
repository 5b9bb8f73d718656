"""The champion as a service: a version of the registry as a model of MLflow, requests in full batches, `dsd serve`.

A row of a request is an image and its texts. MLflow's own server and `dsd serve` answer the same requests with the same
scores; `dsd serve` bounds a request before it reads it, and knows no tables.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import io
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import BAD_REQUEST, INTERNAL_ERROR, TEMPORARILY_UNAVAILABLE
from mlflow.pyfunc import PythonModel
from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dsd.config import (
    BackboneParams,
    Bounds,
    CrossAttentionMethod,
    DenoisingMethod,
    EvidenceParams,
    ImageParams,
    NoiseParams,
    Params,
    RuntimeParams,
    noise_of,
)
from dsd.errors import BusyError, DsdError, RequestError
from flows.stores import uri

if TYPE_CHECKING:
    from dsd.matcher import Heatmap, Matcher, Picture

log = logging.getLogger(__name__)
logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # that it looks at our example is no news

# A white picture of one pixel, for the example of a request that MLflow keeps beside the signature.
PIXEL = "R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="
LETTERS = 32  # of a token, at most: a text that has more of them than the model has tokens is not even split
SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            ColSpec(DataType.string, "image"),  # base64, or the file's bytes
            ColSpec(Array(DataType.string), "texts"),
            ColSpec(DataType.boolean, "heatmap", required=False),
        ]
    ),
    outputs=Schema(
        [
            ColSpec(Array(DataType.double), "scores"),
            ColSpec(DataType.string, "best"),
            ColSpec(
                Array(Object([Property("word", DataType.string), Property("map", DataType.string)])),
                "heatmap",
                required=False,
            ),
        ]
    ),
)
Answer = dict[str, Any]  # scores, in the order of the texts; best, one of these; heatmap, where it was asked for


class Settings(Bounds):
    """All that a version is served by, but for its prompt: the settings that it was measured with, and the bounds."""

    seed: int
    runtime: RuntimeParams
    backbone: BackboneParams
    images: ImageParams
    noise: NoiseParams
    evidence: EvidenceParams
    method: Annotated[CrossAttentionMethod | DenoisingMethod, Field(discriminator="scorer")]

    @classmethod
    def of(cls, params: Params, identity: str) -> Settings:
        """`identity` is the digest of the checkpoint: another one in its place is refused when it is opened."""
        serving, row = params.serving, params.backbones[params.backbone]
        method = params.methods[serving.method]
        assert isinstance(method, CrossAttentionMethod | DenoisingMethod)  # see Params
        places = {key: _absolute(getattr(row, key)) for key in ("source", "config", "lora")}
        noise = params.noise if serving.prompt is None else noise_of(params, serving.prompt)
        pooling = method.pooling if isinstance(method, CrossAttentionMethod) else "logsumexp"
        return cls(
            seed=params.seed,
            runtime=params.runtime,
            backbone=row.model_copy(update={**places, "digest": identity}),
            images=params.images,
            noise=noise.model_copy(update={"levels": method.levels}),
            evidence=params.evidence.model_copy(update={"poolings": (pooling,)}),
            method=method,
            **serving.model_dump(include=set(Bounds.model_fields)),
        )

    def matcher(self, prompt: Path | None) -> Matcher:
        """Raises CheckpointError where the checkpoint or the prompt is not the one that was registered."""
        from dsd.matcher import Matcher
        from dsd.models import device_of, load_diffusion  # they load torch
        from dsd.models.prompts import AttentionPrompt

        backbone = load_diffusion(self.backbone, device_of(self.runtime.device), self.runtime.attention)
        return Matcher(
            backbone,
            AttentionPrompt.load(prompt, backbone.digest).to(backbone.device) if prompt is not None else None,
            self.method,
            self.noise,
            self.evidence,
            parity=self.images.parity,
            resolution=self.images.resolution,
            batch_size=self.runtime.batch_size,
            seed=self.seed,
        )


def save(settings: Settings, prompt: Path | None, folder: Path) -> None:
    """Writes a version's model: what its settings say, its prompt, and no checkpoint."""
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=str(Path(__file__).with_name("model.py")),
        model_config=settings.model_dump(mode="json"),
        artifacts=None if prompt is None else {"prompt": str(prompt)},
        signature=SIGNATURE,
        input_example=pd.DataFrame([{"image": PIXEL, "texts": ["a red circle", "a blue square"], "heatmap": False}]),
        pip_requirements=[f"mlflow=={mlflow.__version__}"],  # what a version runs in is this project's environment
    )


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    image: str | bytes
    texts: Annotated[list[str], Field(min_length=1)]
    heatmap: bool = False


class Body(BaseModel):
    """Of a request in JSON, one of the two."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: list[Row] = []
    dataframe_records: list[Row] = []


@dataclass(frozen=True)
class Asked:
    picture: Picture
    texts: list[str]
    heatmap: bool
    answer: Future[Answer] = field(default_factory=Future)


class Rounds:
    """Threads that run the model, one a core (one for a GPU): each takes what is waiting, up to a batch, in one round.

    A thread has one thread of arithmetic, so that no core waits for another: that serves more than to share a batch.
    """

    def __init__(self, matcher: Matcher) -> None:
        from dsd.engine.engine import cores  # it loads torch

        if matcher.backbone.device.type == "cpu":
            keep_memory()
        self.matcher, self._waiting = matcher, SimpleQueue[Asked]()
        self._threads = cores(matcher.backbone.device)
        for _ in range(self._threads):
            Thread(target=self._run, name="round", daemon=True).start()

    def put(self, asked: Asked) -> None:
        self._waiting.put(asked)

    def _run(self) -> None:
        import torch

        if self._threads > 1:
            torch.set_num_threads(1)
        while True:
            taken = [self._waiting.get()]
            share = self._waiting.qsize() // self._threads  # the other threads may be idle
            while len(taken) <= share and sum(map(self._rows, taken)) < self.matcher.full:
                try:
                    taken.append(self._waiting.get_nowait())
                except Empty:
                    break
            self._answer([asked for asked in taken if asked.answer.set_running_or_notify_cancel()])

    def _rows(self, asked: Asked) -> int:
        return self.matcher.rows(1, len(asked.texts))

    def _answer(self, taken: Sequence[Asked]) -> None:
        """Where a round fails, each of it is tried alone: what is wrong with one is not the others' fault."""
        try:
            found = self.matcher.score_many([([asked.picture], asked.texts) for asked in taken])
        except Exception as error:
            if len(taken) == 1:
                taken[0].answer.set_exception(error)
            else:
                for asked in taken:
                    self._answer([asked])
            return
        for asked, scores in zip(taken, found, strict=True):
            try:
                asked.answer.set_result(self._told(asked, scores[0].tolist()))
            except Exception as error:
                asked.answer.set_exception(error)

    def _told(self, asked: Asked, scores: list[float]) -> Answer:
        if cut := self.matcher.cut(asked.texts):
            raise _too_long(cut[0], self.matcher)
        answer: Answer = {"scores": scores, "best": asked.texts[int(np.argmax(scores))]}
        if asked.heatmap:
            answer["heatmap"] = _words(self.matcher.heatmap_of(asked.picture, answer["best"]))
        return answer


def keep_memory() -> None:
    """What is freed stays with this process, where the C library is glibc.

    Else each thread's memory goes back to the system after a round, and to get it again takes a sixth of the time.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for setting, value in ((-1, 2**31 - 1), (-4, 0)):  # M_TRIM_THRESHOLD, M_MMAP_MAX
            library.mallopt(setting, value)


class Service(PythonModel):
    """A version as MLflow loads it; see SIGNATURE for what goes in and out."""

    settings: Settings
    rounds: Rounds

    def load_context(self, context: Any) -> None:
        self.settings = Settings.model_validate(context.model_config)
        prompt = context.artifacts.get("prompt")
        self.rounds = Rounds(self.settings.matcher(None if prompt is None else Path(prompt)))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        try:
            answers = self.ask(read_table(model_input))
            late = wait(answers, self.settings.wait_seconds).not_done
            if late:
                raise self.busy(answers)
            return write_table([answer.result() for answer in answers])
        except BusyError as error:
            raise Refused(str(error), TEMPORARILY_UNAVAILABLE) from None
        except DsdError as error:
            raise Refused(str(error), BAD_REQUEST) from None
        except Exception:
            log.exception("a request failed")
            raise Refused(FAILED, INTERNAL_ERROR) from None

    def ask(self, rows: Sequence[Row]) -> list[Future[Answer]]:
        """Hands the rows of a request to the model; all of them, or none.

        Raises:
            RequestError, ImageError, TextError: what is wrong with which row, in one line.
        """
        if not 1 <= len(rows) <= self.settings.max_images:
            raise RequestError(f"{len(rows)} images; ask for 1 to {self.settings.max_images} at once")
        if (size := sum(len(row.image) for row in rows)) > self.settings.max_bytes:
            raise RequestError(f"{size} bytes of images; send {self.settings.max_bytes} at most")
        asked = []
        for number, row in enumerate(rows, 1):
            try:
                asked.append(self._asked(row))
            except DsdError as error:
                raise type(error)(f"row {number}: {error}") from None
        for one in asked:
            self.rounds.put(one)
        return [one.answer for one in asked]

    def busy(self, answers: Sequence[Future[Answer]]) -> BusyError:
        """Takes back what has not begun."""
        for answer in answers:
            answer.cancel()
        return BusyError(f"no answer within {self.settings.wait_seconds:g} seconds; try again later")

    def _asked(self, row: Row) -> Asked:
        from dsd.matcher import check_texts  # it loads torch

        matcher, settings = self.rounds.matcher, self.settings
        if len(row.texts) > settings.max_texts:
            raise RequestError(f"{len(row.texts)} texts; give {settings.max_texts} at most")
        check_texts(row.texts)
        for text in row.texts:
            if len(text) > LETTERS * matcher.backbone.max_tokens:
                raise _too_long(text, matcher)
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise RequestError(f"text {text[:40]!a}: half a character (a lone surrogate)")
        return Asked(matcher.picture(_bytes(row.image), settings.max_pixels), row.texts, row.heatmap)


FAILED = "internal error; the log of the server says more"


class Refused(MlflowException):
    """One line for the client. MLflow's server would put all of the request before it."""

    def serialize_as_json(self) -> str:
        return json.dumps({"error_code": self.error_code, "message": self.args[0]})


def read_table(table: pd.DataFrame) -> list[Row]:
    """Raises RequestError, in one line, where a row is none."""
    try:
        return Body.model_validate({"inputs": list(map(_record, table.to_dict("records")))}).inputs
    except ValidationError as error:
        raise _mistake(error) from None


def write_table(answers: Sequence[Answer]) -> pd.DataFrame:
    """The answers, with a column of heat maps where one has any."""
    columns = [name for name in SIGNATURE.outputs.input_names() if any(name in answer for answer in answers)]
    return pd.DataFrame({n: pd.Series([answer.get(n) for answer in answers], dtype=object) for n in columns})


def application(service: Service) -> Starlette:
    """POST /invocations, in JSON, as MLflow's server takes and answers it; GET /ping."""

    async def invocations(request: Request) -> Response:
        settings = service.settings
        try:
            async with asyncio.timeout(settings.wait_seconds):
                body = await request.body()
        except TimeoutError:
            raise HTTPException(408, f"the request was not here within {settings.wait_seconds:g} seconds") from None
        answers = await asyncio.to_thread(lambda: service.ask(read(body)))
        waiting = [asyncio.wrap_future(answer) for answer in answers]
        _, late = await asyncio.wait(waiting, timeout=settings.wait_seconds)
        if late:
            raise service.busy(answers)
        return JSONResponse({"predictions": [answer.result() for answer in waiting]})

    async def ping(_: Request) -> Response:
        return Response("\n")

    async def refused(_: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 503 if isinstance(error, BusyError) else 400
        message = error.detail if isinstance(error, HTTPException) else str(error)
        return JSONResponse({"message": message}, status)

    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse({"message": FAILED}, 500)

    return Starlette(
        routes=[Route("/invocations", invocations, methods=["POST"]), Route("/ping", ping)],
        exception_handlers={HTTPException: refused, DsdError: refused, Exception: failed},
        max_body_size=service.settings.max_bytes,
    )


def read(body: bytes) -> list[Row]:
    """The rows of a request in JSON. Raises RequestError, in one line, where it is none."""
    try:
        found = Body.model_validate_json(body)
    except ValidationError as error:
        raise _mistake(error) from None
    if found.inputs and found.dataframe_records:
        raise RequestError("both inputs and dataframe_records; give one")
    return found.inputs or found.dataframe_records


def serve(model: str, host: str, port: int) -> None:
    """Serves a version, such as models:/dsd-backbone@champion, until it is stopped.

    Raises:
        DsdError: there is no such version.
        CheckpointError: its checkpoint is not there any more, or is another one.
    """
    import uvicorn

    mlflow.set_tracking_uri(uri())
    try:
        service = mlflow.pyfunc.load_model(model).unwrap_python_model()
    except MlflowException as error:
        raise DsdError(f"--model {model}: {str(error).splitlines()[0]}; `dsd promote` enters versions") from None
    uvicorn.run(
        application(service),
        host=host,
        port=port,
        limit_concurrency=service.settings.max_waiting,
        log_level="warning",
        access_log=False,
    )


def _absolute(place: str | None) -> str | None:
    return place if place is None or not Path(place).exists() else str(Path(place).resolve())


def _record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table without its empty cells, with lists for arrays."""
    there = {name: value for name, value in record.items() if not (pd.api.types.is_scalar(value) and pd.isna(value))}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in there.items()}


def _mistake(error: ValidationError) -> RequestError:
    """The first thing that is wrong, with its place."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = [str(part) for part in first["loc"] if part not in ("str", "bytes")]
    return RequestError(": ".join([*([".".join(where)] if where else []), " ".join(first["msg"].split())]))


def _bytes(image: str | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return base64.b64decode(image, validate=True)
    except ValueError:
        raise RequestError(
            f"image {image[:40]!a}: not base64; send the file's content (URLs and paths are never opened)"
        ) from None


def _too_long(text: str, matcher: Matcher) -> RequestError:
    return RequestError(f"text {text[:40]!a}: longer than the model's {matcher.backbone.max_tokens} tokens")


def _words(heatmap: Heatmap) -> list[dict[str, str]]:
    """Of each word, where it looks: a grey PNG of the picture's size in base64, white is most."""
    found = []
    for word, map_RR in zip(heatmap.words, heatmap.maps, strict=True):
        file = io.BytesIO()
        Image.fromarray((map_RR * 255).round().astype(np.uint8)).save(file, "PNG")
        found.append({"word": word, "map": base64.b64encode(file.getvalue()).decode()})
    return found
