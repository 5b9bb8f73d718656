"""Charts of the report: Vega-Lite specifications, each with the SVG that a browser without JavaScript shows.

Colour names a method and nothing else; other series are grey, with symbols and line styles. Colours are CSS variables,
so a chart follows the theme of the page, before and after Vega draws it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import altair as alt
import numpy as np
import vl_convert
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

from dsd.report.inputs import DatasetResults
from dsd.report.tables import Column, names, percent
from dsd.statistics import Interval

# The hues of Okabe and Ito (2008), with a grey for their black. Lightness is spread so that any two differ under
# protanopia, deuteranopia and tritanopia too, each with a contrast of 3 : 1: tests/test_report.py measures both.
LIGHT = ("#3a8ccc", "#102a6e", "#a98040", "#7c7c7c", "#c24600", "#9b3d8f", "#006b4f", "#5a3d00")
DARK = ("#8fcff5", "#3f7fe0", "#f5b83d", "#a8a8a8", "#f0713a", "#e29bd8", "#12a37a", "#f2ee9a")
THEME = {  # CSS variable → its colour on a light and on a dark page
    "paper": ("#fcfcfa", "#131519"),
    "card": ("#ffffff", "#1b1e24"),
    "tint": ("#f0f0ec", "#262a31"),
    "ink": ("#1b1e24", "#e8e9eb"),
    "muted": ("#585e69", "#a9afb9"),
    "line": ("#dddcd6", "#353a43"),
    "grey": ("#7d838d", "#858c97"),
    "accent": ("#0a58a6", "#83bbf7"),
    **{f"m{number}": pair for number, pair in enumerate(zip(LIGHT, DARK, strict=True))},
}
SHAPES = ("circle", "diamond", "square", "triangle-up", "triangle-down", "cross", "triangle-left", "triangle-right")
SYMBOLS = ("●", "◆", "■", "▲", "▼", "✚", "◀", "▶")  # the shapes as characters
INK, MUTED, LINE = "var(--ink)", "var(--muted)", "var(--line)"
GREYS = (INK, "var(--grey)")
FONT = "Liberation Sans, Arial, sans-serif"  # the first one comes with vl-convert: every machine measures it alike
Rows = list[dict[str, Any]]
Series = Mapping[str, int]  # method → number of its colour and symbol, the same in every chart
PANEL = 300  # width of a chart's plot in pixels: the chart then fits a phone


@dataclass(frozen=True)
class Chart:
    """alt: what the chart shows in words. spec: of Vega-Lite, as JSON."""

    caption: str
    alt: str
    svg: Markup
    spec: Markup


CONFIG = {
    "background": "transparent",
    "font": FONT,
    "view": {"stroke": None},
    "point": {"size": 70, "filled": True, "opacity": 1, "strokeWidth": 0},
    "axis": {
        "labelColor": INK, "titleColor": MUTED, "gridColor": LINE, "domainColor": MUTED, "tickColor": MUTED,
        "labelFontSize": 11.5, "titleFontSize": 11.5, "titleFontWeight": "normal", "labelLimit": 220,
    },
    "header": {"labelColor": INK, "labelFontSize": 12, "labelFontWeight": "bold", "labelAnchor": "start"},
    "legend": {"labelColor": INK, "labelFontSize": 11.5, "orient": "top", "columns": 2, "labelLimit": 0},
    "title": {"color": INK, "fontSize": 12, "anchor": "start"},
}  # fmt: skip


def draw(chart: Any, caption: str, alt_text: str, **data: Rows) -> Chart:
    """The chart in the colours of the page; `data`: the rows of its named data."""
    # The specification is checked by the tests, not in every run: that takes longer than all drawing.
    spec = chart.to_dict(validate=False) | {"config": CONFIG}
    spec["datasets"] = {**data, "one": [{}]}
    svg = vl_convert.vegalite_to_svg(spec)
    size = re.search(r'width="([\d.]+)" height="([\d.]+)"', svg)
    assert size is not None
    head = f'<svg role="img" aria-label="{escape(alt_text)}" width="{size[1]}" height="{size[2]}" '
    rest = re.sub(r' (aria-\w+|role|font-family)="[^"]*"', "", svg[svg.index("viewBox") :])  # of the parts
    # JSON in a script element: no text may end the element.
    text = json.dumps(spec, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Chart(caption, alt_text, Markup(head + rest), Markup(text))


@cache
def vega_bundle() -> Markup:
    """Vega, Vega-Lite and vega-embed as one JavaScript module, from vl-convert; nothing is fetched."""
    module: str = vl_convert.javascript_bundle("export default vegaEmbed;")
    assert "</script" not in module  # it is embedded in a page
    return Markup(module)


def document(chart: Chart) -> str:
    """The chart as an SVG file of its own, in the colours of a light page on white."""
    svg = str(chart.svg)
    for name, (light, _) in THEME.items():
        svg = svg.replace(f"var(--{name})", light)
    head, rest = svg.split(">", 1)
    head = head.replace("<svg", f'<svg xmlns="http://www.w3.org/2000/svg" font-family="{FONT}"', 1)
    return f'{head}><rect width="100%" height="100%" fill="#fff"/>{rest}\n'


def rounded(value: float) -> float:
    """A share in percent, to a hundredth."""
    return round(100 * value, 2)


def _row(value: Interval, **fields: Any) -> dict[str, Any]:
    span = {"value": rounded(value.value), "low": rounded(value.low), "high": rounded(value.high)}
    return {**fields, **span, "n": value.n}


def _by(
    field: str, domain: Iterable[str], numbers: Iterable[int], grey: bool = False, legend: Any = None
) -> dict[str, Any]:
    """Colour and shape of a field: of methods, or in grey of anything else."""
    domain, places = list(domain), list(numbers)
    colours = [GREYS[n % 2] if grey else f"var(--m{n % 8})" for n in places]
    shapes = [SHAPES[n % 8] for n in places]
    return {
        "color": alt.Color(field, type="nominal", scale=alt.Scale(domain=domain, range=colours), legend=legend),
        "shape": alt.Shape(field, type="nominal", scale=alt.Scale(domain=domain, range=shapes), legend=legend),
    }


def _axis(title: str | None = None, **options: Any) -> alt.Axis:
    return alt.Axis(title=title, **options)


TOOLTIP_NUMBERS = [
    alt.Tooltip("value:Q", title="%", format=".1f"),
    alt.Tooltip("low:Q", title="from", format=".1f"),
    alt.Tooltip("high:Q", title="to", format=".1f"),
    alt.Tooltip("n:Q"),
]


def _bars(looks: dict[str, Any], y: Any, x: Any, tooltip: Sequence[Any], **encodings: Any) -> list[Any]:
    """Horizontal intervals, and their values as symbols."""
    tips = [*tooltip, *TOOLTIP_NUMBERS]
    rule = (
        alt.Chart()
        .mark_rule(strokeWidth=2.5)
        .encode(y=y, x=x, x2="high:Q", color=looks["color"], tooltip=tips, **encodings)
    )
    point = alt.Chart().mark_point().encode(y=y, x=alt.X("value:Q"), tooltip=tips, **looks, **encodings)
    return [rule, point]


def _dashed(data: Any, **channel: Any) -> Any:
    """A line at a value; `data`: one empty row, or what the value is computed from."""
    return alt.Chart(data).mark_rule(color=INK, strokeDash=[3, 3], opacity=0.75).encode(**channel)


ONE = alt.NamedData("one")


def accuracy(columns: Sequence[Column], series: Series, panels: int, caption: str) -> Chart:
    """Methods × datasets on their headline metric, `panels` datasets in a row; dashed: chance."""
    shown = list(dict.fromkeys(method for column in columns for method in column.values))
    heads = [f"{column.dataset} ({column.metric})" for column in columns]
    rows = [
        _row(value, method=method, panel=head, chance=rounded(column.chance))
        for head, column in zip(heads, columns, strict=True)
        for method, value in column.values.items()
    ]
    over = alt.selection_point(fields=["method"], on="pointerover", empty=True, name="over")
    faded = alt.condition(over, alt.value(1), alt.value(0.25))
    y = alt.Y("method:N", sort=shown, axis=_axis(domain=False, ticks=False, labelPadding=8))
    scale = alt.Scale(domain=[0, 100])
    x = alt.X("low:Q", scale=scale, axis=_axis("accuracy, %", values=[0, 25, 50, 75, 100]))
    looks = _by("method", shown, [series[method] for method in shown])
    bars = _bars(looks, y, x, ["method:N"], opacity=faded)
    width = {1: PANEL - 70, 2: 180, 4: 135}.get(panels, 135)
    layers = alt.layer(_dashed(alt.Undefined, x=alt.X("mean(chance):Q")), *bars, data=alt.NamedData("rows"))
    layers = layers.add_params(over).properties(width=width, height={"step": 21})
    header = alt.Header(title=None)
    chart = layers.facet(facet=alt.Facet("panel:N", sort=heads, header=header), columns=panels, spacing=14)
    best = [f"{c.dataset} {max(c.values, key=lambda m: c.values[m].value)}" for c in columns]
    words = f"Accuracy of {len(shown)} methods on {len(columns)} datasets; highest: {names(best)}."
    return draw(chart.resolve_axis(x="independent"), caption, words, rows=rows)


def ablations(dataset: DatasetResults, methods: Sequence[str], series: Series) -> Chart:
    """The headline metric of each variant of methods with the same keys, one panel per key; dashed: chance."""
    first, metric = dataset.ablations[methods[0]], dataset.headline
    rows = [
        _row(dataset.ablations[method][key][value][metric], method=method, key=key, variant=value)
        for key, values in first.items()
        for value in values
        for method in methods
    ]
    chance = rounded(dataset.chance[metric])
    panels, data = [], {}
    for key, values in first.items():
        data[key] = [row for row in rows if row["key"] == key]
        y = alt.Y("variant:N", sort=list(values), axis=_axis(domain=False, ticks=False))
        x = alt.X("low:Q", axis=_axis(f"{metric}, %" if key == list(first)[-1] else None), scale=alt.Scale(nice=True))
        offset = {"yOffset": alt.YOffset("method:N", sort=list(methods))} if len(methods) > 1 else {}
        looks = _by("method", methods, [series[method] for method in methods])
        bars = _bars(looks, y, x, ["method:N", "variant:N"], **offset)
        level = _dashed(ONE, x=alt.XDatum(chance))
        step = {"step": 11 * len(methods) + 8, **({"for": "position"} if len(methods) > 1 else {})}
        panels.append(alt.layer(level, *bars, data=alt.NamedData(key)).properties(width=220, height=step, title=key))
    chart = alt.vconcat(*panels).resolve_scale(x="shared", color="shared", shape="shared")
    last = dataset.ablations[methods[-1]]
    best = [f"{key} {max(values, key=lambda v: last[key][v][metric].value)}" for key, values in first.items()]
    words = f"Ablations on {dataset.name}, {metric}; the best value of each key for {methods[-1]}: {names(best)}."
    return draw(chart, dataset.name, words, **data)


def _lines(field: str, looks: dict[str, Any], x: Any, y_title: str, level: Any, height: int = 210) -> Any:
    """Values with intervals over x, joined by a line; `level`: a layer for chance."""
    y = alt.Y("value:Q", axis=_axis(y_title, tickCount=5), scale=alt.Scale(zero=False))
    tips = [f"{field}:N", alt.Tooltip(x.shorthand), *TOOLTIP_NUMBERS]
    line = alt.Chart().mark_line(strokeWidth=1.6).encode(x=x, y=y, color=looks["color"])
    rule = (
        alt.Chart()
        .mark_rule(strokeWidth=1.6, opacity=0.6)
        .encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=looks["color"], tooltip=tips)
    )
    point = alt.Chart().mark_point().encode(x=x, y=y, tooltip=tips, **looks)
    layers = [*([level] if level is not None else []), line, rule, point]
    return alt.layer(*layers, data=alt.NamedData("rows")).properties(width=PANEL, height=height)


def sweep(dataset: DatasetResults, lines: Mapping[str, Sequence[tuple[float, Interval]]], series: Series) -> Chart:
    """The headline metric over the number of few-shot examples, one line per method; dashed: chance."""
    rows = [_row(value, method=method, shots=shots) for method, line in lines.items() for shots, value in line]
    ticks = sorted({x for line in lines.values() for x, _ in line})
    x = alt.X(
        "shots:Q",
        scale=alt.Scale(type="log", nice=False, padding=12),
        axis=_axis("few-shot examples", values=ticks, grid=False, format="d"),
    )
    looks = _by("method", lines, [series[method] for method in lines])
    level = _dashed(ONE, y=alt.YDatum(rounded(dataset.chance[dataset.headline])))
    ends = [f"{m} {percent(line[0][1].value)} to {percent(line[-1][1].value)} %" for m, line in lines.items() if line]
    shots = f"{names([f'{tick:g}' for tick in ticks])} few-shot examples"
    words = f"{dataset.name}, {dataset.headline} over {shots}: {names(ends)}."
    chart = _lines("method", looks, x, f"{dataset.headline}, %", level)
    return draw(chart, f"{dataset.name}: {dataset.headline}", words, rows=rows)


def paper_figure(name: str, title: str, lines: Mapping[str, Mapping[str, Interval]]) -> Chart:
    """A figure of the first paper from our data: values over named settings, joined by lines."""
    rows = [_row(value, line=line, setting=key) for line, values in lines.items() for key, value in values.items()]
    settings = list(next(iter(lines.values())))
    x = alt.X("setting:N", sort=settings, axis=_axis(title, labelAngle=0, grid=False))
    looks = _by("line", lines, range(len(lines)), grey=True, legend=alt.Legend(title=None))
    best = names([f"{line}: {max(values, key=lambda v: values[v].value)}" for line, values in lines.items()])
    words = f"{name} of the paper, from our data: {title}; the best is {best}."
    return draw(_lines("line", looks, x, "accuracy, %", None), f"{name}: {title}", words, rows=rows)


@dataclass(frozen=True)
class Front:
    """One line of a cost chart: (evaluations per candidate, share) pairs of a schedule, in a panel."""

    panel: str
    schedule: str
    places: Sequence[tuple[float, float]]


def costs(caption: str, fronts: Sequence[Front], quantity: str, levels: Mapping[str, Interval]) -> Chart:
    """Shares over U-Net evaluations per candidate, one panel above the other.

    Args:
        quantity: what the shares are of.
        levels: panel → the share at all draws, drawn as dashed line and band.
    """
    schedules = list(dict.fromkeys(front.schedule for front in fronts))
    looks = _by("schedule", schedules, range(len(schedules)), grey=True, legend=alt.Legend(title=None))
    dash = alt.StrokeDash(
        "schedule:N", sort=schedules, legend=None,
        scale=alt.Scale(domain=schedules, range=[[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [1, 3]]),
    )  # fmt: skip
    panels, data = [], {}
    for panel in dict.fromkeys(front.panel for front in fronts):
        data[panel] = [
            {"schedule": f.schedule, "evaluations": round(cost, 3), "value": rounded(share)}
            for f in fronts if f.panel == panel for cost, share in f.places
        ]  # fmt: skip
        tips: list[Any] = [
            "schedule:N",
            alt.Tooltip("evaluations:Q", format=".2f"),
            alt.Tooltip("value:Q", title="%", format=".1f"),
        ]
        x = alt.X(
            "evaluations:Q",
            scale=alt.Scale(type="log", nice=False, padding=10),
            axis=_axis("U-Net evaluations per candidate", grid=False, tickCount=6, format="~g"),
        )
        y = alt.Y("value:Q", axis=_axis(f"{quantity}, %", tickCount=5), scale=alt.Scale(zero=False))
        base = alt.Chart().encode(x=x, y=y, tooltip=tips)
        layers = [
            base.mark_line(strokeWidth=1.5).encode(color=looks["color"], strokeDash=dash),
            base.mark_point().encode(**looks),
        ]
        if level := levels.get(panel):
            band = alt.Chart(ONE).mark_rect(color=INK, opacity=0.08)
            layers = [
                band.encode(y=alt.YDatum(rounded(level.low)), y2=alt.Y2Datum(rounded(level.high))),
                _dashed(ONE, y=alt.YDatum(rounded(level.value))),
                *layers,
            ]
        panels.append(alt.layer(*layers, data=alt.NamedData(panel)).properties(width=PANEL, height=190, title=panel))
    least = [f"{f.panel}, {f.schedule} from {min(c for c, _ in f.places):.2g}" for f in fronts if f.places]
    words = f"{caption}: {quantity} over evaluations per candidate; {names(least)}."
    return draw(alt.concat(*panels, columns=3).resolve_scale(color="shared", shape="shared"), caption, words, **data)


def trend(dataset: str, metric: str, places: Sequence[tuple[str, Interval, bool]], champion: int | None) -> Chart:
    """A metric over checkpoints in chronological order, with intervals.

    Args:
        places: label, value, and whether it was measured with the current params; the others are grey.
        champion: the index that is starred, with a dashed line at its value.
    """
    rows = [
        _row(value, place=number, checkpoint=label, params="current" if current else "other")
        for number, (label, value, current) in enumerate(places)
    ]
    colour = alt.Color(
        "params:N", legend=None, scale=alt.Scale(domain=["current", "other"], range=[INK, "var(--grey)"])
    )
    labels = "[" + ",".join(json.dumps(label) for label, _, _ in places) + "][datum.value]"
    ticks = [round(place) for place in np.linspace(0, len(places) - 1, min(len(places), 4))]
    scale = alt.Scale(domain=[-0.5, len(places) - 0.5], nice=False)
    x = alt.X("place:Q", scale=scale, axis=_axis(None, labelExpr=labels, grid=False, values=ticks))
    tips = ["checkpoint:N", *TOOLTIP_NUMBERS]
    y = alt.Y("value:Q", axis=_axis(f"{metric}, %", tickCount=5), scale=alt.Scale(zero=False))
    rule = alt.Chart().mark_rule(strokeWidth=2).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour, tooltip=tips)
    layers = [rule, alt.Chart().mark_point().encode(x=x, y=y, color=colour, tooltip=tips)]
    if champion is not None:
        height = rounded(places[champion][1].value)
        star = alt.Chart(ONE).mark_text(text="★", fontSize=20, color="var(--accent)", dy=1)
        layers = [
            _dashed(ONE, y=alt.YDatum(height)),
            *layers,
            star.encode(x=alt.XDatum(champion), y=alt.YDatum(height)),
        ]
    chart = alt.layer(*layers, data=alt.NamedData("rows")).properties(width=PANEL, height=200)
    first, last = places[0][1].value, places[-1][1].value
    ends = f"from {percent(first)} % to {percent(last)} % over {len(places)} checkpoints"
    best = "" if champion is None else f"; champion {percent(places[champion][1].value)} %"
    return draw(chart, dataset, f"{dataset}, {metric}: {ends}{best}.", rows=rows)


def smooth(values: ArrayLike, window: int) -> NDArray[np.float64]:
    """[n] centred moving average; the window is truncated at the ends."""
    values_n, ones = np.asarray(values, dtype=np.float64), np.ones(window)
    return np.convolve(values_n, ones, "same") / np.convolve(np.ones_like(values_n), ones, "same")


def training(dataset: DatasetResults, method: str, series: Series) -> Chart:
    """Loss and accuracy of a method's training, smoothed over a twelfth of the steps."""
    curve, colour = dataset.curves[method], f"var(--m{series[method] % 8})"
    window = min(len(curve["step"]), 2 * (len(curve["step"]) // 24) + 1)
    panels, data, thin = [], {}, max(1, len(curve["step"]) // 100)  # about a hundred points of a curve are drawn
    for name, scale in (("loss", 1), ("accuracy", 100)):
        values = smooth(scale * np.array(curve[name]), window)[::thin]
        data[name] = [
            {"step": step, "value": round(v, 4)} for step, v in zip(curve["step"][::thin], values, strict=True)
        ]
        x = alt.X("step:Q", axis=_axis("step" if name == "accuracy" else None, grid=False, tickCount=5))
        y = alt.Y("value:Q", axis=_axis("loss" if scale == 1 else "accuracy, %", tickCount=4))
        line = alt.Chart(alt.NamedData(name)).mark_line(color=colour, strokeWidth=1.8)
        tips = [alt.Tooltip("step:Q"), alt.Tooltip("value:Q", format=".3g")]
        panels.append(line.encode(x=x, y=y, tooltip=tips).properties(width=PANEL, height=90))
    last = smooth(curve["accuracy"], window)
    span = f"from {100 * last[0]:.0f} % to {100 * last[-1]:.0f} % in {len(curve['step'])} steps"
    words = f"Training of {method} on {dataset.name}: smoothed accuracy {span}."
    return draw(alt.vconcat(*panels), f"{dataset.name}: {method}", words, **data)
