"""Throughput of the served model against the engine: the same rows over HTTP from many clients, and offline.

The clients are threads of this process and the server is another process on the same machine; the engine has the
machine to itself.
"""

from __future__ import annotations

import base64
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from itertools import chain
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.setting import PREPARED
from dsd.config import load
from dsd.data.examples import read_examples
from dsd.data.image_table import ImageTable
from dsd.models.checkpoint import locate
from flows.serving.service import save
from flows.serving.settings import Settings

CLIENTS, REQUESTS, TEXTS = 16, 12, 10  # requests of each client, and texts of each request
Question = tuple[bytes, list[str]]  # an image file, texts


def throughput(rounds: int = 3) -> tuple[float, float]:
    """Rows per second of the server over those of the engine (median of rounds), and the 99th percentile of the seconds
    of a request.

    Both encode each image once, and each text once in all.
    """
    params, shares, waited = load(), [], list[float]()
    requests, settings = questions(), Settings.of(params, locate(params.backbones[params.backbone])[1])
    matcher = settings.matcher(None)
    problems = [([matcher.picture(file)], texts) for file, texts in requests]
    matcher.score_many(problems[:CLIENTS])  # warm up
    with server(settings) as port, ThreadPoolExecutor(CLIENTS) as clients:
        send, parts = partial(client, port), [requests[n::CLIENTS] for n in range(CLIENTS)]
        list(clients.map(send, [part[:2] for part in parts]))  # warm up
        for _ in range(rounds):
            start = time.perf_counter()
            waited += chain(*clients.map(send, parts))
            between = time.perf_counter()
            matcher.score_many(problems)
            shares.append((time.perf_counter() - between) / (between - start))
    return statistics.median(shares), float(np.quantile(waited, 0.99))


def questions() -> list[Question]:
    """The requests: each has an image of its own, and texts that some others have too."""
    images, examples = ImageTable(PREPARED / "images.parquet"), read_examples(PREPARED / "examples.parquet", "test")
    texts = list(dict.fromkeys(text for example in examples for text in example.texts))
    requests = []
    for n in range(CLIENTS * REQUESTS):
        file = io.BytesIO()
        images[images.ids[n]].save(file, "PNG")
        requests.append((file.getvalue(), [texts[(n // 4 * TEXTS + m) % len(texts)] for m in range(TEXTS)]))
    return requests


@contextmanager
def server(settings: Settings) -> Iterator[int]:
    """Run `dsd serve` on a free port of this machine; yields the port."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save(settings, None, model)
        dsd = [sys.executable, "-c", "from flows.cli import app; app()"]
        process = subprocess.Popen([*dsd, "serve", "--model", str(model), "--port", str(port)])
        try:
            while not answers(port):
                if process.poll() is not None:
                    raise RuntimeError(f"dsd serve ended with {process.returncode}")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait()


def answers(port: int) -> bool:
    try:
        connection = HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except OSError:
        return False


def client(port: int, requests: Sequence[Question]) -> list[float]:
    """Send the requests one after the other over one connection; returns the seconds of each."""
    bodies = [
        json.dumps({"inputs": [{"image": base64.b64encode(file).decode(), "texts": texts}]}) for file, texts in requests
    ]
    connection, waited = HTTPConnection("127.0.0.1", port), []
    for body in bodies:
        start = time.perf_counter()
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(answer.decode())
        waited.append(time.perf_counter() - start)
    connection.close()
    return waited
