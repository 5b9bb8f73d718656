"""What the site adds to docs/*.md: files of the repository that pages link to, and the results.

Links are written as a Git host resolves them, relative to the file; they are rewritten where a file has another place
on the site.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from dsd.config import load
from dsd.report.readme import columns, table
from dsd.report.tables import NONE, bounds, interval, p_value, percent, points
from dsd.statistics import Interval

ROOT = Path(__file__).parents[1]
EVALUATED = ROOT / "data/evaluate"
RESULTS, PERFORMANCE = "results.md", "performance.md"
NOT_MEASURED = "# Performance on a GPU\n\nNo results yet: run `make gpu` on a CUDA device, then `make performance`.\n"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)")
SECTION = re.compile(r"<!-- results: (\w+) -->")


def moved(root: Path = ROOT) -> dict[str, str]:
    """Return the place on the site of each file of the repository that is not in docs/."""
    presets = [f"presets/{path.name}" for path in sorted((root / "presets").glob("*.yaml"))]
    kept = {path: path for path in ["params.yaml", *presets]}
    return {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", **kept}


def relinked(markdown: str, source: str, places: Mapping[str, str]) -> str:
    """Rewrite the relative links of a page of the site that is the file `source` of the repository."""
    here = dirname(places.get(source) or source.removeprefix("docs/"))

    def target(link: re.Match[str]) -> str:
        path = normpath(join(dirname(source), link[1]))
        if path in places or path.startswith("docs/"):
            return relpath(places.get(path) or path.removeprefix("docs/"), here or ".")
        return link[1]

    return LINK.sub(target, markdown)


def rows(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def measured(value: Mapping[str, Any]) -> str:
    shown = Interval(**value)
    return f"{percent(shown.value)} <small>{interval(shown)}</small>"


def claims(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the claims, their verdicts and the comparison that binds; effects in points of accuracy."""
    lines = []
    for number, claim in results.items():
        if not number.isdigit():
            continue
        effect = claim.get("effect")
        shown = [NONE, NONE] if effect is None else [_effect(claim), p_value(claim["p"])]
        lines.append([number, claim["claim"], claim["verdict"], *shown])
    return rows(["no.", "claim", "verdict", "effect, points", "p"], lines)


def _effect(claim: Mapping[str, Any]) -> str:
    return f"{points(claim['effect'])} <small>{bounds(claim['low'], claim['high'])}</small>"


def every(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]], blind: Mapping[str, Any]) -> str:
    """A table per dataset: methods × metrics, and the texts alone."""
    parts = []
    for dataset, methods in metrics.items():
        names = list(next(iter(methods.values())))
        lines = [[method, *(measured(values[name]) for name in names)] for method, values in methods.items()]
        alone = blind[dataset]["metrics"]
        lines.append(["*texts alone*", *(measured(alone[name]) if name in alone else NONE for name in names)])
        parts.append(f"### {dataset}\n\n{rows(['accuracy, %', *names], lines)}")
    return "\n\n".join(parts)


def sections() -> dict[str, str]:
    """The parts of the results page that are computed from data/evaluate."""
    read = {path.stem: json.loads(path.read_text()) for path in EVALUATED.glob("*.json")}
    code = read["code"]["libraries"]
    return {
        "headline": table(columns(read["metrics"], load(ROOT / "params.yaml").datasets)),
        "claims": claims(read["claims"]),
        "every": every(read["metrics"], read["blind"]),
        "libraries": ", ".join(f"{name} {version}" for name, version in code.items()),
    }


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, place in moved().items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    if files.get_file_from_path(PERFORMANCE) is None:  # `make performance` writes it
        files.append(File.generated(config, PERFORMANCE, content=NOT_MEASURED))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    places = moved()
    source = {place: path for path, place in places.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    if page.file.src_uri == RESULTS:
        computed = sections()
        markdown = SECTION.sub(lambda marker: computed[marker[1]], markdown)
    return relinked(markdown, source, places)
