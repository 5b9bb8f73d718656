"""Serving the champion: versions as models of MLflow, and answers over HTTP."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from queue import Queue
from socket import create_connection, socket
from threading import Event, Thread
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.pyfunc import PyFuncModel, scoring_server
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

from dsd.config import Params, load
from dsd.errors import CheckpointError, DataError, DsdError, ParamsError, RequestError
from dsd.matcher import Matcher
from dsd.models.prompts import PROMPT, AttentionPrompt
from flows import tracking
from flows.cli import app
from flows.registry.registry import BACKBONE, CHAMPION, FILES, Registry
from flows.serving import Service, server
from flows.serving.current import Current
from flows.serving.schema import ValueCount, parse_json
from flows.serving.server import application, serve
from flows.serving.service import Refused, save
from flows.serving.settings import Settings
from tests.conftest import read_settings, write_settings
from tests.tiny import small

ROOT = Path(__file__).parent.parent
TEXTS = ["a red circle", "a blue star", "a green ring left of a pink bolt"]
MODEL = f"models:/{BACKBONE}@{CHAMPION}"


def image(seed: int, side: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side + 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def coded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def row(seed: int = 0, texts: list[str] = TEXTS, **more: Any) -> dict[str, Any]:
    return {"image": coded(image(seed)), "texts": texts, **more}


def enter(params: Params, root: Path) -> None:
    """Registers what was measured there, which is nothing, and names it champion."""
    (root / "data" / "evaluate").mkdir(parents=True, exist_ok=True)
    (root / "data" / "evaluate" / "metrics.json").write_text("{}")
    (root / "dvc.lock").touch()
    version = Registry().register(params, root)
    MlflowClient(tracking.uri()).set_registered_model_alias(BACKBONE, CHAMPION, str(version.number))


@pytest.fixture(scope="module")
def registered(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace with a champion, on its own copy of the tiny checkpoint."""
    root = tmp_path_factory.mktemp("registered")
    shutil.copytree(models / "embedded", root / "models" / "embedded")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        enter(small(root / "models"), root)
        mlflow.set_tracking_uri(tracking.uri())
        yield root


@pytest.fixture(scope="module")
def model(registered: Path) -> PyFuncModel:
    return mlflow.pyfunc.load_model(MODEL)


@pytest.fixture(scope="module")
def service(model: PyFuncModel) -> Service:
    return model.unwrap_python_model()


@pytest.fixture(scope="module")
def matcher(registered: Path) -> Matcher:
    """The public API with the settings of the champion."""
    place = registered / "models" / "embedded"
    return Matcher.from_pretrained(place, method="denoising", device="cpu", levels=(0.2, 0.6), parity=24)


@pytest.fixture(scope="module")
def web(service: Service) -> Iterator[TestClient]:
    """`dsd serve`, without a socket."""
    with TestClient(application(Current(service)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def its_own(model: PyFuncModel) -> Iterator[TestClient]:
    """MLflow's server, without a socket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")  # which the server sets for good
        with TestClient(scoring_server.init(model), raise_server_exceptions=False) as client:
            yield client


def test_a_version_is_a_typed_reference_without_a_pickle_or_a_checkpoint(registered: Path, model: PyFuncModel) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(MODEL))
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in files if file.suffix in (".pkl", ".pickle", ".safetensors", ".bin")]
    assert sum(file.stat().st_size for file in files) < 20_000
    described = yaml.safe_load((folder / "MLmodel").read_text())
    assert described["flavors"]["python_function"]["config"]["backbone"]["source"] == str(
        registered / "models/embedded"
    )
    assert described["flavors"]["python_function"]["config"]["backbone"]["digest"]
    assert model.metadata.signature.inputs.input_names() == ["image", "texts", "heatmap"]
    assert model.metadata.signature.outputs.required_input_names() == ["scores"]


def test_a_table_is_answered_as_the_matcher_scores(model: PyFuncModel, matcher: Matcher) -> None:
    table = pd.DataFrame(
        {"image": [image(0), coded(image(1)), image(2)], "texts": [TEXTS, TEXTS[1:], np.array(TEXTS[:1])]}
    )
    found = model.predict(table)
    assert list(found.columns) == ["scores", "best"]
    for n, texts in enumerate(table["texts"]):
        scores = matcher.score(image(n), list(texts))[0]
        np.testing.assert_allclose(found["scores"][n], scores, atol=1e-5)
        assert found["best"][n] == texts[int(scores.argmax())]
        alone = model.predict(table[n : n + 1])
        np.testing.assert_allclose(alone["scores"][0], found["scores"][n], atol=1e-5)


def test_heat_maps_are_of_the_best_text_and_optional(model: PyFuncModel, matcher: Matcher, web: TestClient) -> None:
    table = pd.DataFrame({"image": [image(0), image(1)], "texts": [TEXTS, TEXTS], "heatmap": [True, False]})
    found = model.predict(table)
    assert found["heatmap"][1] is None
    heatmap = matcher.heatmap(image(0), found["best"][0])
    assert [word["word"] for word in found["heatmap"][0]] == heatmap.words
    maps = [Image.open(io.BytesIO(base64.b64decode(word["map"]))) for word in found["heatmap"][0]]
    np.testing.assert_allclose([np.asarray(drawn) / 255 for drawn in maps], heatmap.maps, atol=0.01)
    answers = web.post("/invocations", json={"inputs": [row(0, heatmap=True), row(1)]}).json()["predictions"]
    assert answers[0]["heatmap"] == found["heatmap"][0] and "heatmap" not in answers[1]


def test_a_tie_has_no_best_text_and_no_heat_map(web: TestClient) -> None:
    texts = ["a red circle", "A RED CIRCLE", "a red circle"]
    [answer] = web.post("/invocations", json={"inputs": [row(0, texts, heatmap=True)]}).json()["predictions"]
    assert answer["best"] is None and "heatmap" not in answer
    assert answer["remarks"] == ["to the model these are one text, a tie: 'a red circle' = 'A RED CIRCLE'"]


@pytest.mark.parametrize("form", ["inputs", "dataframe_records"])
def test_both_servers_return_the_same_answers(
    form: str, web: TestClient, its_own: TestClient, model: PyFuncModel
) -> None:
    body = {form: [row(0), row(1, TEXTS[:2])]}
    ours, theirs = (client.post("/invocations", json=body) for client in (web, its_own))
    assert ours.status_code == theirs.status_code == 200
    for one, other in zip(ours.json()["predictions"], theirs.json()["predictions"], strict=True):
        assert one["best"] == other["best"]
        np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-5)


def test_sixteen_clients_get_what_one_gets(service: Service) -> None:
    bodies = [json.dumps({"inputs": [row(n % 5, TEXTS[: 1 + n % 3])]}).encode() for n in range(48)]
    asked = [parse_json(body) for body in bodies]
    alone = [service.submit(rows)[0].result()["scores"] for rows in asked[:15]]
    with ThreadPoolExecutor(16) as clients:
        together = list(clients.map(lambda rows: service.submit(rows)[0].result()["scores"], asked))
    for n, scores in enumerate(together):
        np.testing.assert_allclose(scores, alone[n % 15], atol=1e-5)


def bomb() -> str:
    """An image of 20 megapixels in some 20 kB."""
    file = io.BytesIO()
    Image.new("1", (5000, 4000)).save(file, "PNG")
    return coded(file.getvalue())


BAD = {
    "no image": ([row(image=coded(b"no picture"))], "row 1: image of 10 bytes: not an image"),
    "half an image": ([row(), row(image=coded(image(0)[:900]))], "row 2: image of 900 bytes: "),
    "an empty image": ([row(image="")], "row 1: image of 0 bytes: not an image"),
    "a huge image": ([row(image=bomb())], "5000 x 4000 pixels, more than max_pixels = 16000000"),
    "an address": ([row(image="http://127.0.0.1/a.png")], "not base64; send the file's content"),
    "a data address": ([row(image="data:image/png;base64,AAAA")], "not base64; send the file's content"),
    "a path": ([row(image="/etc/passwd")], "not base64; send the file's content"),
    "a path in the letters of base64": ([row(image="/etc/passwd+")], "row 1: image of 9 bytes: not an image"),
    "no text": ([row(texts=[])], "texts"),
    "an empty text": ([row(texts=["a red circle", " "])], "row 1: text 2 of 2 is empty"),
    "a long text": ([row(texts=["a red circle " * 20])], "longer than the model's 24 tokens"),
    "a very long text": ([row(texts=["a" * 1_000_000])], "longer than the model's 24 tokens"),
    "too many texts": ([row(texts=["a"] * 65)], "row 1: 65 texts; send 64 at most"),
    "too many images": ([row(texts=["a"])] * 33, "33 images; send 1 to 32 per request"),
    "a number for a text": ([row(texts=[1])], "texts"),
    "a text for texts": ([row(texts="a red circle")], "texts"),
    "a number for an image": ([row(image=1)], "image"),
    "no texts": ([{"image": coded(image(0))}], "texts"),
    "a word for heatmap": ([row(heatmap="very")], "heatmap"),
    "nothing": ([], "0 images; send 1 to 32 per request"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_one_line(name: str, web: TestClient, its_own: TestClient) -> None:
    rows, expected = BAD[name]
    response = web.post("/invocations", json={"inputs": rows})
    assert response.status_code == 400
    line = response.json()["message"]
    assert expected in line and "\n" not in line and len(line) < 200


@pytest.mark.parametrize("name", sorted(set(BAD) - {"a word for heatmap"}))  # which MLflow takes for true
def test_the_server_of_mlflow_refuses_them_too(name: str, its_own: TestClient) -> None:
    response = its_own.post("/invocations", json={"dataframe_records": BAD[name][0]})
    assert response.status_code == 400 and "stack_trace" not in response.json()


def test_refusals_in_the_server_of_mlflow_are_one_line_too(its_own: TestClient) -> None:
    response = its_own.post("/invocations", json={"dataframe_records": [row(image="/etc/passwd")]})
    assert response.json() == {
        "error_code": "BAD_REQUEST",
        "message": "row 1: image '/etc/passwd': not base64; send the file's content (URLs and paths are never opened)",
    }


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "Invalid JSON: EOF while parsing"),
        (b"[]", "Input should be an object"),
        (b"{}", "0 images"),
        (b'{"inputs": [{"image": "a", "texts": ["x"], "texts": ["y"]}]}', "the key 'texts' is given twice"),
        (b'{"instances": []}', "instances: Extra inputs are not permitted"),
        (json.dumps({"inputs": [row()], "dataframe_records": [row()]}).encode(), "both inputs and dataframe_records"),
        (json.dumps({"inputs": [row(size=3)]}).encode(), "inputs.0.size: Extra inputs are not permitted"),
        (json.dumps({"inputs": [row(texts=["\ud800"])]}).encode(), "Invalid JSON"),
        (json.dumps({"k" * 5_000: 1}).encode(), "k" * 40 + ": Extra inputs are not permitted"),
    ],
)
def test_invalid_bodies(body: bytes, expected: str, web: TestClient) -> None:
    response = web.post("/invocations", content=body)
    assert response.status_code == 400 and expected in response.json()["message"]


MANY = {
    "keys": b"{" + b",".join(b'"key%d":1' % n for n in range(9000)) + b"}",
    "keys in escapes": b"{" + b",".join(b'"\\u0061%d\\\\":1' % n for n in range(9000)) + b"}",
    "numbers": b'{"inputs": [' + b"1," * 9000 + b"1]}",
    "lists": b'{"inputs": ' + b"[" * 9000,
    "rows": b'{"inputs": [' + b"{}," * 9000 + b"{}]}",
    "texts": b'{"inputs": [{"texts": [' + b'"",' * 9000 + b'""]}]}',
}


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("name", MANY)
def test_too_many_values_are_refused_while_they_arrive(name: str, size: int, service: Service) -> None:
    with pytest.raises(RequestError, match="too many values; send up to 32 images with up to 64 texts each"):
        count(MANY[name], size, service)
    count(MANY[name][:1000], size, service)


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_the_largest_request_has_not_too_many_values(size: int, service: Service) -> None:
    texts = [f'{n}, "{{[a \\ red]}}", circle\\' for n in range(service.settings.max_texts)]
    rows = [{"image": "A" * 99, "texts": texts, "heatmap": True}] * service.settings.max_images
    count(json.dumps({"inputs": rows}).encode(), size, service)
    with pytest.raises(RequestError, match="too many values"):
        count(json.dumps({"inputs": [*rows, *rows[:1]]}).encode(), size, service)


def count(body: bytes, size: int, service: Service) -> None:
    """Count the values of a body that arrives in chunks of a size."""
    values = ValueCount(service.settings)
    for start in range(0, len(body), size):
        values.add(body[start : start + size])


def peak_during(work: Callable[[], object]) -> int:
    """The bytes by which the memory of this process has grown at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = memory("VmHWM")
    work()
    return memory("VmHWM") - before


def memory(field: str, process: int | str = "self") -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


@contextmanager
def listening(service: Service) -> Iterator[int]:
    """`dsd serve` in a thread, on a free port."""
    with socket() as heard:
        heard.bind(("127.0.0.1", 0))
        running = server.http_server(Current(service), "127.0.0.1", 0)
        thread = Thread(target=running.run, kwargs={"sockets": [heard]}, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        try:
            yield heard.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture
def port(service: Service) -> Iterator[int]:
    with listening(service) as number:
        yield number


def ping(port: int) -> float:
    """The seconds until /ping has answered."""
    start = time.monotonic()
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/ping")
    assert connection.getresponse().status == 200
    return time.monotonic() - start


def pings_during(port: int, work: Callable[[], object]) -> float:
    """The slowest answer of /ping while the work is done."""
    with ThreadPoolExecutor(1) as pool:
        done, slowest = pool.submit(work), 0.0
        while not done.done():
            slowest = max(slowest, ping(port))
            time.sleep(0.02)
        done.result()
    return slowest


HEAD = b"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"


@contextmanager
def sockets(port: int, number: int, content: bytes) -> Iterator[list[socket]]:
    """Open connections on which nothing but the content is sent."""
    with ExitStack() as opened:
        connected = [opened.enter_context(create_connection(("127.0.0.1", port))) for _ in range(number)]
        for one in connected:
            one.sendall(content)
        yield connected


@pytest.mark.parametrize("content", [b"", b"POST /invoc", HEAD, HEAD + b"{"], ids=["idle", "head", "body", "byte"])
def test_connections_that_send_no_request_occupy_nothing(content: bytes, service: Service, port: int) -> None:
    with sockets(port, service.settings.max_waiting + 6, content):
        assert post(port, json.dumps({"inputs": [row()]}).encode())[0] == 200
        assert ping(port) < 5


def test_connections_without_a_request_are_closed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(service, "settings", service.settings.model_copy(update={"wait_seconds": 0.5}))
    answered = HEAD.replace(b"/invocations", b"/nothing")
    with listening(service) as port, ExitStack() as opened:
        kinds = {
            content: opened.enter_context(sockets(port, 3, content)) for content in (b"", HEAD[:9], HEAD, answered)
        }
        for content, connected in kinds.items():
            for one in connected:
                one.settimeout(30)
                received = b""
                with suppress(ConnectionError):
                    while part := one.recv(1000):  # until the server closes it
                        received += part
                        one.send(b"x")  # what drips in changes nothing
                assert (b" 408 " in received) == (content == HEAD) and (b" 404 " in received) == (content == answered)


def test_work_is_bounded_and_ping_is_not(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = Queue[Future[Any]]()

    def submit(rows: Any) -> list[Future[Any]]:
        submitted.put(answer := Future())
        return [answer]

    body = json.dumps({"inputs": [row()]}).encode()
    monkeypatch.setattr(service, "settings", service.settings.model_copy(update={"max_waiting": 2}))
    with listening(service) as port, ThreadPoolExecutor(2) as clients:
        with monkeypatch.context() as patch:
            patch.setattr(service, "submit", submit)
            waiting = [clients.submit(post, port, body) for _ in range(2)]
            answers = [submitted.get(timeout=60) for _ in waiting]
            assert post(port, body) == (503, {"message": "too many requests at once; try again later"})
            assert ping(port) < 5
            for answer in answers:
                answer.set_result({})
            assert [request.result() for request in waiting] == [(200, {"predictions": [{}]})] * 2
        assert post(port, body)[0] == 200


def test_the_bytes_of_all_bodies_are_bounded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"inputs": [row()]}).encode()
    monkeypatch.setattr(service, "settings", service.settings.model_copy(update={"max_bytes": len(body)}))
    monkeypatch.setattr(server, "BODIES", 2)
    unfinished = HEAD.replace(b"1000", str(len(body)).encode()) + body[:-1]
    with listening(service) as port:
        with sockets(port, 2, unfinished):
            while post(port, body)[0] != 503:
                time.sleep(0.01)
            assert ping(port) < 5
        while post(port, body)[0] != 200:  # the server sees that they are closed
            time.sleep(0.01)


def test_operators_see_requests_and_no_content(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dsd.requests")
    with TestClient(application(Current(service)), raise_server_exceptions=False) as web:
        assert web.post("/invocations", json={"inputs": [row()]}).status_code == 200
        assert web.post("/invocations", json={"inputs": []}).status_code == 400
        assert (web.get("/healthz").status_code, web.get("/readyz").status_code) == (200, 200)
        metrics = web.get("/metrics").text
    lines = [json.loads(record.message) for record in caplog.records if record.name == "dsd.requests"]
    assert [line["status"] for line in lines] == [200, 400]
    assert lines[0].keys() == {"time", "client", "status", "seconds"}  # neither images nor texts
    for line in (
        'dsd_requests_total{status="200"} 1.0', 'dsd_requests_total{status="400"} 1.0', "dsd_request_seconds_count 2.0",
        "dsd_requests_open 0.0", "dsd_rows_waiting 0.0", f'digest="{service.settings.backbone.digest}"',
    ):  # fmt: skip
        assert line in metrics
    assert "dsd_round_fill_count 0.0" not in metrics


def test_a_model_that_ended_is_not_ready(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = Thread(target=lambda: None)
    monkeypatch.setattr(service.rounds, "_running", [ended])
    with TestClient(application(Current(service))) as web:
        assert (web.get("/healthz").status_code, web.get("/readyz").status_code) == (200, 503)


def test_another_version_takes_over_without_a_lost_request(registered: Path, tmp_path: Path) -> None:
    model = Registry().model(MODEL, tmp_path)
    current = Current.open(lambda known: ("1", model))
    old = current.service
    with TestClient(application(current)) as web, ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(web.post, "/invocations", json={"inputs": [row()]}) for _ in range(12)]
        current.refresh(lambda known: None if known == "2" else ("2", model))
        asked += [clients.submit(web.post, "/invocations", json={"inputs": [row()]}) for _ in range(4)]
        assert [future.result().status_code for future in asked] == [200] * 16
        assert 'version="2"' in web.get("/metrics").text
    assert current.number == "2" and current.service is not old
    old.rounds.close()
    for thread in old.rounds._running:
        thread.join(10)
    assert not old.rounds.alive


def test_a_version_that_does_not_open_changes_nothing(service: Service) -> None:
    tried = Event()

    def newer(known: str | None) -> tuple[str, Path]:
        tried.set()
        raise DataError("its files have changed")

    current = Current(service, "1")
    stop = current.follow(newer, 0.01)
    assert tried.wait(10)
    stop.set()
    assert (current.number, current.service) == ("1", service)


def test_the_registry_names_another_version_once(registered: Path, tmp_path: Path) -> None:
    found = Registry().newer(MODEL, None, tmp_path)
    assert found is not None
    number, folder = found
    assert (folder / "MLmodel").exists()
    assert Registry().newer(MODEL, number, tmp_path) is None
    with pytest.raises(DsdError, match="no such registered version"):
        Registry().newer("models:/dsd-backbone/99", number, tmp_path)


ATTACK = b"{" + b",".join(b'"k%06d":1' % n for n in range(1_000_000)) + b"}"  # 12 MB


def attack(port: int) -> None:
    """Six bodies of a million unknown keys at once, next to 64 idle connections."""
    with ThreadPoolExecutor(6) as clients, sockets(port, 64, b""):
        for status, answer in clients.map(lambda _: post(port, ATTACK), range(6)):
            assert status == 400 and answer["message"].startswith("too many values; send")


def test_an_attack_costs_little(service: Service, port: int) -> None:
    resident, slowest = memory("VmRSS"), [0.0]
    grown = peak_during(lambda: slowest.append(pings_during(port, lambda: attack(port))))
    assert grown < 0.3 * resident
    assert max(slowest) < 5  # 1 s on an idle machine


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=20) | st.just(coded(b"\x89PNG\r\n\x1a\n")),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["inputs", "dataframe_records", "image", "texts"]), inner, max_size=3)
        ),
        max_leaves=8,
    ).map(lambda found: json.dumps(found).encode())
)
def test_garbage_is_refused_in_one_line(body: bytes, web: TestClient) -> None:
    response = web.post("/invocations", content=body)
    assert response.status_code == 400
    line = response.json()["message"]
    assert line and "\n" not in line and "Traceback" not in line


def test_a_long_request_is_refused_before_it_is_read(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "settings", service.settings.model_copy(update={"max_bytes": 1000}))
    monkeypatch.setattr(server, "parse_json", lambda *_: pytest.fail("was read"))
    with TestClient(application(Current(service))) as client:
        for content in (b"x" * 1001, iter([b"x" * 600, b"x" * 600])):
            response = client.post("/invocations", content=content)
            assert response.status_code == 413 and "Content Too Large" in response.text


def test_images_of_a_table_are_bounded_too(service: Service, model: PyFuncModel, monkeypatch: Any) -> None:
    monkeypatch.setattr(service, "settings", service.settings.model_copy(update={"max_bytes": 1000}))
    with pytest.raises(Refused, match="bytes of images; send 1000 at most"):
        model.predict(pd.DataFrame([row()]))


def test_a_timeout_is_reported(service: Service, web: TestClient, its_own: TestClient, monkeypatch: Any) -> None:
    score = service.rounds.matcher.score_many
    monkeypatch.setattr(service, "settings", service.settings.model_copy(update={"wait_seconds": 0.05}))
    monkeypatch.setattr(service.rounds.matcher, "score_many", lambda asked: time.sleep(0.3) or score(asked))
    for client in (web, its_own):
        response = client.post("/invocations", json={"inputs": [row()]})
        assert response.status_code == 503
        assert response.json()["message"] == "no answer within 0.05 seconds; try again later"


def test_a_defect_reveals_nothing_and_affects_no_other_request(
    service: Service, web: TestClient, its_own: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = service.rounds.matcher.score_many

    def failing(asked: Any) -> Any:
        if any("a blue star" in texts for _, texts in asked):
            raise RuntimeError("a secret")
        return score(asked)

    monkeypatch.setattr(service.rounds.matcher, "score_many", failing)
    rows = [row(), *[row(n, ["a red circle"]) for n in range(9)]]
    with ThreadPoolExecutor(10) as clients:
        found = list(clients.map(lambda one: web.post("/invocations", json={"inputs": [one]}), rows))
    assert [response.status_code for response in found] == [500, *[200] * 9]
    for response in (found[0], its_own.post("/invocations", json={"inputs": [row()]})):
        assert response.status_code == 500 and "secret" not in response.text and "Traceback" not in response.text


def test_the_bounds_can_be_others_where_a_version_is_loaded(registered: Path) -> None:
    table = pd.DataFrame([row(n % 3, TEXTS[:1]) for n in range(40)])
    wide = mlflow.pyfunc.load_model(MODEL, model_config={"max_images": 40})
    assert len(wide.predict(table)) == 40


def with_prompt(params: Params, root: Path) -> Params:
    """The champion of method `dsd` under a prompt that is no zero."""
    matcher = Matcher.from_pretrained(params.backbones["embedded"].source, device="cpu")
    backbone = matcher.backbone
    prompt = AttentionPrompt(
        backbone.text_encoders[0].config.hidden_size, backbone.layer_widths, backbone.vae.config.latent_channels,
        rank=2, conditional=True, seed=0,
    )  # fmt: skip
    for up in prompt.up:
        up.data.normal_(std=0.1)
    prompt.save(root / "data" / "train" / "scenes-com" / "dsd" / PROMPT, backbone.digest)
    return params.model_copy(
        update={"serving": params.serving.model_copy(update={"method": "dsd", "prompt": "scenes-com"})}
    )


def test_a_prompt_travels_with_its_version(models: Path, registered: Path, tmp_path: Path) -> None:
    params = with_prompt(small(models), tmp_path)
    trained = tmp_path / "data" / "train" / "scenes-com" / "dsd" / PROMPT
    identity = Registry().alias(CHAMPION).digest
    save(Settings.of(params, identity), trained, tmp_path / "model")
    expected = Matcher.from_pretrained(
        models / "embedded", prompt=trained, device="cpu", levels=(0.2, 0.6), draws_per_level=2, parity=24
    ).score(image(0), TEXTS)
    trained.unlink()
    found = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(pd.DataFrame([row()]))
    np.testing.assert_allclose(found["scores"][0], expected[0], atol=1e-5)
    with pytest.raises(DataError, match=r"scenes-com: no attention prompt \(serving.prompt\)"):
        enter(params, tmp_path)


@pytest.mark.parametrize("command", [None, "serve"])
def test_a_checkpoint_that_has_changed_is_refused(command: str | None, models: Path, tmp_path: Path) -> None:
    place = tmp_path / "embedded"
    shutil.copytree(models / "embedded", place)
    params = small(tmp_path)
    identity = Matcher.from_pretrained(place).backbone.digest
    save(Settings.of(params, identity), None, tmp_path / "model")
    config = place / "unet" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(CheckpointError, match=f"embedded: is not the checkpoint of digest {identity}, but"):
        if command:
            serve(lambda _: ("1", tmp_path / "model"), "127.0.0.1", 1, 30)
        mlflow.pyfunc.load_model(str(tmp_path / "model"))


@pytest.mark.parametrize("name", [f"models:/{BACKBONE}@loser", f"models:/{BACKBONE}/99", "models:/x/y/z", "model", ""])
def test_a_missing_version_is_one_line(name: str, registered: Path) -> None:
    run = CliRunner().invoke(app, ["serve", "--model", name])
    assert run.exit_code == 1
    assert run.output == f"dsd: --model {name}: no such registered version; `dsd promote` registers versions\n"


def test_code_that_has_changed_since_the_registration_never_runs(registered: Path, tmp_path: Path) -> None:
    version = Registry().alias(CHAMPION)
    assert version is not None
    [code] = Path("mlartifacts", version.run).rglob("model.py")
    whole = code.read_text()
    try:
        for place, content in ((code, f"open({str(tmp_path / 'ran')!r}, 'w')\n"), (code.with_name("new.py"), "")):
            place.write_text(content)
            run = CliRunner().invoke(app, ["serve"])
            assert run.exit_code == 1 and len(run.output.splitlines()) == 1
            assert "they were changed after the registration" in run.output and not (tmp_path / "ran").exists()
            code.write_text(whole)
    finally:
        code.write_text(whole)
        code.with_name("new.py").unlink(missing_ok=True)
    (code.parent / "__pycache__").mkdir(exist_ok=True)
    (code.parent / "__pycache__" / "model.cpython-311.pyc").touch()
    assert not (Registry().model(MODEL, tmp_path) / "__pycache__").exists()


def test_a_version_without_a_digest_gets_one(registered: Path, tmp_path: Path) -> None:
    registry, version = Registry(), Registry().alias(CHAMPION)
    assert version is not None
    registry.client.delete_model_version_tag(BACKBONE, str(version.number), FILES)
    registry.client.delete_tag(version.run, FILES)
    with pytest.raises(DataError, match="registered without a digest of its files; run `dsd promote` again"):
        registry.model(MODEL, tmp_path)
    assert registry.register(small(registered / "models"), registered).number == version.number
    assert registry.model(MODEL, tmp_path).is_dir()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "denoisin"}, "serving.method: unknown method 'denoisin': did you mean 'denoising'?"),
        (
            {"method": "clip-prompt"},
            "serving.method: the scorer of clip-prompt is neither cross-attention nor denoising",
        ),
        ({"prompt": "scenes-com"}, "serving.prompt: denoising has none; set it to null"),
        ({"method": "dsd", "prompt": "scenes-con"}, "serving.prompt: unknown dataset 'scenes-con': did you mean"),
        ({"max_texts": 0}, "serving.max_texts: "),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    content = read_settings(ROOT)
    content["serving"] |= changes
    write_settings(content, tmp_path)
    with pytest.raises(ParamsError) as error:
        load(tmp_path / "params.yaml")
    assert expected in str(error.value)


@contextmanager
def process(command: list[str]) -> Iterator[tuple[int, psutil.Process]]:
    """A server on a free port, from the time that it answers."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking.uri(), "PYTHONPATH": str(ROOT)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    running = subprocess.Popen(
        [*command, "--port", str(port)], env={**environment, "PATH": path}, start_new_session=True
    )
    try:
        for _ in range(1200):
            assert running.poll() is None, "the server has ended"
            try:
                connection = HTTPConnection("127.0.0.1", port)
                connection.request("GET", "/ping")
                assert connection.getresponse().status == 200
                break
            except OSError:
                time.sleep(0.1)
        yield port, psutil.Process(running.pid)
    finally:
        os.killpg(running.pid, signal.SIGTERM)
        running.wait()


def post(port: int, body: bytes) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


DSD = [sys.executable, "-c", "from flows.cli import app; app()", "serve"]
MLFLOW = [sys.executable, "-m", "mlflow", "models", "serve", "-m", MODEL, "--env-manager", "local"]


@pytest.mark.slow
def test_an_attack_on_a_real_server_costs_little(registered: Path) -> None:
    with process(DSD) as (port, running):
        assert post(port, json.dumps({"inputs": [row()]}).encode())[0] == 200
        idle = memory("VmRSS", running.pid)
        Path(f"/proc/{running.pid}/clear_refs").write_text("5")
        slowest = pings_during(port, lambda: attack(port))
        peak = memory("VmHWM", running.pid)
        assert peak <= 1.3 * idle and slowest < 5


@pytest.mark.slow
@pytest.mark.parametrize("command", [DSD, MLFLOW], ids=["dsd", "mlflow"])
def test_a_real_server_answers_on_loopback_alone(command: list[str], registered: Path, matcher: Matcher) -> None:
    with process(command) as (port, running):
        expected = [matcher.score(image(n), TEXTS)[0].numpy() for n in range(4)]
        with ThreadPoolExecutor(16) as clients:
            bodies = [json.dumps({"inputs": [row(n % 4)]}).encode() for n in range(64)]
            found = list(clients.map(lambda body: post(port, body), bodies))
        for n, (status, answer) in enumerate(found):
            assert status == 200
            np.testing.assert_allclose(answer["predictions"][0]["scores"], expected[n % 4], atol=1e-5)
        for rows in (BAD["an address"][0], BAD["no image"][0], BAD["an empty text"][0], BAD["too many texts"][0]):
            status, answer = post(port, json.dumps({"inputs": rows}).encode())
            assert status == 400 and "\n" not in answer["message"]
        assert post(port, b"{")[0] == 400
        servers = [running, *running.children(recursive=True)]
        heard = {c.laddr.ip for one in servers for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert heard == {"127.0.0.1"}
