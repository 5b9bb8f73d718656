"""Files that the page offers, as data URIs: they are in the page and need no network."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dsd.config import Params
from dsd.report.inputs import DatasetResults
from dsd.report.matrix import Differences


class Download(NamedTuple):
    name: str
    content: str  # in words
    uri: str


def downloads(
    params: Params,
    datasets: Sequence[DatasetResults],
    models: Mapping[str, str],
    differences: Differences,
    stored: Mapping[str, Any],
) -> list[Download]:
    """Results and differences as CSV; `stored`, the content of JSON files by name, and the params as JSON."""
    results = [
        (d.name, method, models[method], metric, v.value, v.low, v.high, v.n, d.chance[metric])
        for d in datasets
        for method, row in d.results.items()
        for metric, v in row.items()
    ]
    gaps = [
        (dataset, metric, a, b, d.value, d.low, d.high, d.p, d.n)
        for dataset, by_reference in differences.items()
        for b, by_method in by_reference.items()
        for a, row in by_method.items()
        for metric, d in row.items()
    ]
    span = ("value", "low", "high")
    head = ("dataset", "method", "backbone", "metric", *span, "n", "chance")
    files = [
        Download("results.csv", "every metric of every method, with intervals and chance", _csv(head, results)),
        Download(
            "differences.csv",
            "every method a minus every method b, paired",
            _csv(("dataset", "metric", "a", "b", *span, "p", "n"), gaps),
        ),
    ]
    files += [Download(f"{name}.json", f"{name} as stored", _json(content)) for name, content in stored.items()]
    return [*files, Download("params.json", "all params of the run", _json(params.model_dump(mode="json")))]


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    return _uri("text/csv", text.getvalue())


def _json(content: Any) -> str:
    return _uri("application/json", json.dumps(content, ensure_ascii=False, separators=(",", ":")))


def _uri(kind: str, text: str) -> str:
    return f"data:{kind};base64," + base64.b64encode(text.encode()).decode()
