"""Render the templates of this package into self-contained HTML files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dsd.report.charts import THEME, Chart
from dsd.report.heatmaps import CIVIDIS
from dsd.report.tables import Table
from dsd.store import write_atomic


@dataclass(frozen=True)
class Section:
    title: str
    note: str
    table: Table
    charts: list[Chart]
    methods: Sequence[str] = ()


def render(template: str, target: Path, **values: Any) -> Path:
    """Write the rendered template to `target` and return `target`."""
    environment = Environment(
        loader=PackageLoader("dsd.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Macros see no variables of the page.
    environment.globals.update(theme=THEME, colours=CIVIDIS)
    write_atomic(target, environment.get_template(template).render(values).encode())
    return target
