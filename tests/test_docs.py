"""The site of the docs builds with every link checked, and the code of tutorials and notebooks runs.

In docs/tutorials a page runs from top to bottom in one folder with scene.png: blocks ```python in one namespace; in
blocks ```console, lines that start with `$ dsd`; a block with a title is written to the file of this name. All other
blocks are shown only.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dsd.config import files
from flows.cli import app
from tests.conftest import ROOT

TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
PIPELINE = ("accelerate", "datasets", "dvc", "flows", "mlflow", "prefect", "ray", "gradio")
WIDTHS = (390, 1280)


def module(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"docs/{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does, where nothing of the pipeline can be imported."""
    assert "mkdocs build -q --strict" in (ROOT / "Makefile").read_text()
    folder = tmp_path_factory.mktemp("site")
    blocked = f"import sys; sys.modules.update(dict.fromkeys({PIPELINE!r})); from mkdocs.__main__ import cli; cli()"
    command = [sys.executable, "-c", blocked, "build", "-q", "--strict", "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_the_results_and_the_api(site: Path) -> None:
    results, api, params = ((site / f"{page}.html").read_text() for page in ("results", "api", "params"))
    assert "results: " not in results
    for text in ("scenes-com", "clip-finetune", "texts alone", "few-shot DSD is ahead of zero-shot DSD"):
        assert text in results
    for name in ("matcher.Matcher.from_pretrained", "matcher.Matcher.score", "live.standings", "own.evaluate"):
        assert f'id="dsd.{name}"' in api
    assert 'id="dsd.config.methods.CrossAttentionMethod"' in params
    assert {"changelog.html", "contributing.html", "performance.html"} <= {path.name for path in site.iterdir()}
    assert (site / "presets/paper-comvg-sd2.yaml").exists() and not list(site.glob("*.py"))


def test_the_site_requests_nothing_from_other_hosts(site: Path) -> None:
    """Links to follow are allowed; what a browser loads by itself is not."""
    loaded = re.compile(
        r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//|<link[^>]+href=["']?(?:https?:)?//"""
    )
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text()), page
        assert "mermaid" not in page.read_text(), page  # the theme would fetch its library


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.browser
def test_every_page_in_a_browser(address: str, site: Path) -> None:
    """No request leaves this machine, no error in the console, nothing wider than the page, and the search answers."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or pytest.skip("no Chromium here")
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    problems: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        for width in WIDTHS:
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or problems.append(r.url))
            page.on("console", lambda m: m.type == "error" and problems.append(m.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            for name in pages:
                page.goto(f"{address}/{name}", wait_until="load")
                wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
                if wide > 0:
                    problems.append(f"{name} at {width}: {wide} pixels too wide")
            page.goto(f"{address}/index.html?q=racing", wait_until="load")
            page.wait_for_selector(".md-search-result__item", state="attached", timeout=60_000)
        browser.close()
    assert problems == []


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a clone that the tutorials use, as the current folder, with scene.png."""
    for file in (*files(ROOT / "params.yaml"), ROOT / "dvc.yaml", ROOT / "docs/scene.png"):
        shutil.copy(file, tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(page: Path, clone: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "tutorial"}
    for language, title, code in BLOCK.findall(page.read_text()):
        if title:
            (clone / title).write_text(code)
        elif language == "python":
            exec(compile(code, page.name, "exec"), namespace)
        elif language == "console":
            for line in code.splitlines():
                program, command, *arguments = shlex.split(line.removeprefix("$ "))
                assert line.startswith("$ ") and program == "dsd", line
                done = CliRunner().invoke(app, [command, *arguments])
                assert done.exit_code == 0, f"{line}: {done.output}"
    if page.stem == "score":
        new, shown = (
            np.asarray(Image.open(path), float) for path in (clone / "heatmap.png", ROOT / "docs/heatmap.png")
        )
        assert new.shape == shown.shape and np.abs(new - shown).mean() < 3, "docs/heatmap.png is of another model"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()


def test_links_are_those_of_a_git_host() -> None:
    relinked, places = (getattr(module("hooks"), name) for name in ("relinked", "moved"))
    moved = places()
    assert relinked("[a](docs/extending.md#x)", "CHANGELOG.md", moved) == "[a](extending.md#x)"
    assert relinked("[a](../CONTRIBUTING.md#on-a-gpu)", "docs/performance.md", moved) == "[a](contributing.md#on-a-gpu)"
    assert relinked("[a](../presets/x.yaml)", "docs/benchmarks.md", {"presets/x.yaml": "presets/x.yaml"}) == (
        "[a](presets/x.yaml)"
    )
    assert relinked("[a](../method.md)", "docs/tutorials/score.md", moved) == "[a](../method.md)"
    for same in ("[a](https://arxiv.org/abs/2305.10722)", "[a](#x)"):
        assert relinked(same, "docs/index.md", moved) == same


def test_every_relative_link_is_a_file() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        for link in module("hooks").LINK.findall(page.read_text()):
            assert (page.parent / link).resolve().exists(), f"{page.name}: {link}"


def test_a_site_without_performance_says_how_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(list):
        def get_file_from_path(self, path: str) -> None:
            return None

    hooks = module("hooks")
    monkeypatch.setattr(hooks.File, "generated", lambda _, place, content=None, **__: (place, content))
    assert "make performance" in dict(hooks.on_files(Absent(), None))["performance.md"]


def test_lines_of_a_docstring_become_a_list() -> None:
    listed = module("fields").listed
    assert listed("A row.\n\nlow, high: bounds\nof it.\np: a value") == (
        "A row.\n\n\n- `low`, `high`: bounds\n    of it.\n- `p`: a value"
    )
    assert listed("Return it.\n\nArgs:\n    x: one.") == "Return it.\n\nArgs:\n    x: one."
