"""The page to try the matcher: the same numbers as `Matcher`, bounds, one line per wrong input."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from dsd import demo
from dsd.data.images import image_id
from dsd.live import Standing, standings
from dsd.matcher import Matcher
from dsd.schedules.staged import staged
from tests.conftest import ROOT

TEXTS = ["a red circle", "a blue square", "a green star", "a pink heart"]


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8) for n in range(3)]


def opened(models: Path, method: str = "denoising") -> Matcher:
    return Matcher.from_pretrained(
        models / "embedded", method=method, device="cpu", levels=(0.2, 0.6), draws_per_level=2
    )


@pytest.mark.parametrize("method", ["denoising", "cross-attention"])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]], ids=["texts", "images"])
def test_the_last_scores_of_all_draws_are_those_of_the_matcher(
    method: str, texts: list[str], models: Path, pictures: list[np.ndarray]
) -> None:
    matcher = opened(models, method)
    every = list(standings(matcher, pictures, texts, demo.exhaustive(2, 2)))
    np.testing.assert_allclose(every[-1].scores_IT, matcher.score(pictures, texts).numpy(), rtol=1e-4, atol=1e-6)
    assert [s.evaluations for s in every] == [round(every[-1].most * n / 4) for n in (1, 2, 3, 4)]
    assert every[-1].kept_IT.all()


def test_a_schedule_drops_candidates_and_spends_less(models: Path, pictures: list[np.ndarray]) -> None:
    *_, last = standings(opened(models), pictures, TEXTS, staged((2, 1), (1, 3)))
    assert last.kept_IT.sum(1).tolist() == [1, 1, 1]
    assert last.evaluations < last.most


def test_repeated_images_and_texts_are_computed_once(models: Path, pictures: list[np.ndarray]) -> None:
    matcher = opened(models)
    *_, once = standings(matcher, pictures[:1], TEXTS[:2], demo.exhaustive(2, 2))
    *_, twice = standings(matcher, pictures[:1] * 2, TEXTS[:2], demo.exhaustive(2, 2))
    assert twice.evaluations == once.evaluations
    np.testing.assert_array_equal(twice.scores_IT, np.concatenate([once.scores_IT] * 2))


def choices(models: Path) -> demo.Models:
    return demo.Models.of([str(models / "embedded")], [])


def asked(models: Path, folder: Path, texts: str = "\n".join(TEXTS), **changes: Any) -> list[Any]:
    """All that the page shows, one after the other."""
    path = folder / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    given = dict(
        files=[(str(path), None)], texts=texts, checkpoint=str(models / "embedded"), method="denoising", prompt="none",
        schedule="exhaustive", per_level=1,
    )  # fmt: skip
    return list(demo.match(choices(models), **{**given, **changes}))


def test_scores_grow_and_heat_maps_come_last(models: Path, tmp_path: Path) -> None:
    shown = asked(models, tmp_path)
    assert [("20 of 20" in table, len(maps)) for table, maps, _ in shown[-2:]] == [(True, 0), (True, 3)]
    assert "5 of 20" in shown[0][0] and len(shown) == len(demo.LEVELS) + 1
    assert [word for _, word in shown[-1][1]] in [text.split() for text in TEXTS]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"files": []}, "an image is missing"),
        ({"texts": " \n "}, "a text is missing"),
        ({"texts": "\n".join(map(str, range(65)))}, "at most 8 images and 64 texts, found 1 and 65"),
        ({"checkpoint": "/etc"}, "not among the choices"),
        ({"prompt": "../prompt"}, "not among the choices"),
        ({"schedule": "none"}, "not among the choices"),
        ({"per_level": 10**9}, "not among the choices"),
        ({"texts": "a\0b\na"}, "has a NUL character"),
    ],
)
def test_a_wrong_request_is_one_line(changes: dict[str, Any], line: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(gr.Error) as error:
        asked(models, tmp_path, **changes)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_image_is_one_line(models: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(gr.Error, match=r"text\.png"):
        asked(models, tmp_path, files=[(str(tmp_path / "text.png"), None)])


def test_texts_are_no_markup() -> None:
    standing = Standing(np.array([[1.0, 0.0]]), np.array([[True, True]]), 2, 2)
    shown = demo.table(["<script>alert(1)</script>", "b"], ["image 1"], standing, np.array([[0.7, 0.3]]))
    assert "<script>" not in shown and "&lt;script&gt;" in shown


def test_a_tie_has_no_best() -> None:
    standing = Standing(np.array([[1.0, 1.0]]), np.array([[True, True]]), 2, 2)
    assert "best" not in demo.table(["a", "b"], ["image 1"], standing, np.array([[0.5, 0.5]]))


def test_examples_are_equal_for_equal_numbers() -> None:
    (one, texts), (same, again) = demo.example(3), demo.example(3)
    assert image_id(np.asarray(one)) == image_id(np.asarray(same)) and texts == again
    assert len(set(texts)) == 4


@pytest.fixture
def page_address(tmp_path: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dsd.cli", "demo", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as running:
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            running.terminate()


@pytest.mark.browser
def test_the_page_end_to_end(page_address: str, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        asked_of: set[str] = set()
        page.on("request", lambda request: asked_of.add(request.url.split("/")[2]))
        page.goto(page_address)
        page.get_by_role("button", name="Match").click()
        page.get_by_text("20 of 20 passes of the denoiser").wait_for(timeout=120_000)
        page.locator(".dsd tr.best").wait_for()
        page.locator("button.thumbnail-item").nth(4).wait_for()  # a heat map: the answer is complete
        page.get_by_role("button", name="Another drawn example").click()
        texts = page.get_by_label("Texts, one in each line")
        page.wait_for_function("text => document.querySelector('textarea').value !== text", arg=texts.input_value())
        texts.fill("")
        page.get_by_role("button", name="Match").click()
        page.get_by_text("a text is missing").wait_for(timeout=60_000)
        page.get_by_role("button", name="Draw it").click()
        texts.fill("a red circle")
        page.get_by_role("button", name="Draw the first text").click()
        page.locator("img[alt='']").last.wait_for(timeout=120_000)
        browser.close()
    assert asked_of == {page_address.removeprefix("http://")}  # nothing is fetched from elsewhere
    assert not problems
