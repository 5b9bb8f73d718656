"""Plots of the report, as inline SVG in the font, text colour and palette of the page.

Matplotlib draws with placeholder colours that are replaced by CSS variables, so the same SVG serves a light and a dark
page.

Shapes: n examples.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from numpy.typing import ArrayLike, NDArray

from dsd.report.findings import headline_text
from dsd.report.inputs import DatasetResults
from dsd.report.tables import names
from dsd.statistics import Interval

INK = "#ab00ff"  # placeholder for the text colour of the page
COLOURS = [f"#ab000{number}" for number in range(8)]  # placeholders for --series-0 … --series-7
MARKERS = ["o", "D", "s", "^", "v", "P", "X", "*"]
SYMBOLS = ["●", "◆", "■", "▲", "▼", "✚", "✖", "★"]  # the markers as characters
Series = Mapping[str, int]  # method → number of its colour and marker, the same in every plot
WIDTH = 5.0  # inches: 360 units of the SVG, about its width in pixels on a phone
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.alpha": 0.16,
    "grid.linewidth": 0.6,
}
INKED = (
    "text.color",
    "axes.edgecolor",
    "axes.labelcolor",
    "axes.titlecolor",
    "xtick.color",
    "ytick.color",
    "grid.color",
)
REPORT_STYLE = STYLE | dict.fromkeys(INKED, INK)
DASHED: dict[str, Any] = {"color": INK, "alpha": 0.7, "lw": 1, "ls": (0, (3, 2))}
LEGEND: dict[str, Any] = dict(frameon=False, fontsize=8.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


@dataclass(frozen=True)
class Plot:
    svg: Markup
    caption: str


def look(number: int) -> tuple[str, str]:
    """Colour and marker of a series."""
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def save_svg(figure: Figure, style: Mapping[str, Any], salt: str, **options: Any) -> str:
    """The figure as a deterministic SVG document without creator and date."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**style, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata=nothing, **options)
    return buffer.getvalue()


def to_svg(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an SVG element without scripts and links, with ids unique to `name`."""
    text = save_svg(figure, REPORT_STYLE, name, transparent=True)
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    head = f'<svg class="figure" role="img" aria-label="{escape(alt)}" {size.group()}>'
    text = head + text[text.index(">") + 1 :]
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = text.replace("xlink:href", "href").replace(INK, "currentColor")
    text = re.sub(r"#ab000(\d)", r"var(--series-\1)", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    return Markup(re.sub(r"url\(#", f"url(#{name}-", text))


def slug(name: str) -> str:
    """A name as part of an id: letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name)


def _axes(height: float, rows: int = 1, heights: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(REPORT_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, 1, sharex=rows > 1, squeeze=False, height_ratios=heights)
    for ax in axes[:, 0]:
        ax.set_axisbelow(True)
    return figure, list(axes[:, 0])


def _interval(ax: Axes, y: float, value: Interval, look: tuple[str, str]) -> None:
    """A value with its interval as a horizontal bar."""
    colour, marker = look
    ax.plot([100 * value.low, 100 * value.high], [y] * 2, color=colour, lw=1.8, solid_capstyle="round")
    ax.plot(100 * value.value, y, marker, color=colour, ms=5, mew=0)


def _line(
    ax: Axes, xs: Sequence[float], values: Sequence[Interval], look: tuple[str, str], label: str | None = None
) -> None:
    """Values with intervals, joined by a line."""
    colour, marker = look
    ax.plot(xs, [100 * v.value for v in values], marker=marker, color=colour, lw=1.4, ms=5, mew=0, label=label)
    for x, v in zip(xs, values, strict=True):
        ax.plot([x, x], [100 * v.low, 100 * v.high], color=colour, lw=1.6, alpha=0.6, solid_capstyle="round")


def _name_rows(ax: Axes, labels: Sequence[str], step: float, height: int) -> None:
    """Label groups of `height` rows that start `step` apart."""
    ax.set_yticks([row * step + (height - 1) / 2 for row in range(len(labels))], labels)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")


def accuracy(dataset: DatasetResults, series: Series) -> Plot:
    """Every method on every metric, with intervals; the dashed line is chance."""
    methods, metrics, level = dataset.methods, dataset.metrics, dataset.chance
    step = len(methods) + 1.0
    figure, (ax,) = _axes(0.55 + 0.155 * step * len(metrics))
    for row, metric in enumerate(metrics):
        top = row * step
        ax.plot([100 * level[metric]] * 2, [top - 0.6, top + len(methods) - 0.4], **DASHED)
        for number, method in enumerate(methods):
            _interval(ax, top + number, dataset.results[method][metric], look(series[method]))
    ax.set(xlim=(-1, 101), ylim=(step * len(metrics) - 1.2, -0.9), xlabel="accuracy, %")
    _name_rows(ax, metrics, step, len(methods))
    values = names([headline_text(dataset, method) for method in methods])
    alt = f"Accuracy on {dataset.name}, {dataset.headline}: {values}; chance {100 * level[dataset.headline]:.1f} %."
    return Plot(to_svg(figure, f"accuracy-{slug(dataset.name)}", alt), dataset.name)


def ablations(dataset: DatasetResults, methods: Sequence[str], series: Series) -> Plot:
    """The headline metric of each variant of methods with the same keys, one panel per key; dashed: chance."""
    values = {key: list(by_value) for key, by_value in dataset.ablations[methods[0]].items()}
    labels = {key: ["\n".join(textwrap.wrap(value, 24)) for value in values[key]] for key in values}
    lines = 1 + max(label.count("\n") for some in labels.values() for label in some)
    step = max(len(methods) + 0.6, 1.1 * lines)
    sizes = [len(texts) for texts in values.values()]
    figure, axes = _axes(0.75 + 0.155 * step * sum(sizes) + 0.3 * len(sizes), rows=len(sizes), heights=sizes)
    for ax, key in zip(axes, values, strict=True):
        for row, value in enumerate(values[key]):
            for number, method in enumerate(methods):
                result = dataset.ablations[method][key][value][dataset.headline]
                _interval(ax, row * step + number, result, look(series[method]))
        ax.axvline(100 * dataset.chance[dataset.headline], **DASHED)
        ax.set(ylim=(step * len(values[key]) - 0.6, -0.8), title=key)
        _name_rows(ax, labels[key], step, len(methods))
    axes[-1].set(xlabel=f"{dataset.headline}, %")
    last = dataset.ablations[methods[-1]]
    best = {key: max(values[key], key=lambda value: last[key][value][dataset.headline].value) for key in values}
    texts = names([f"{key} {value}" for key, value in best.items()])
    alt = f"Ablations on {dataset.name}, {dataset.headline}; the best value of each key for {methods[-1]}: {texts}."
    return Plot(to_svg(figure, f"ablations-{'-'.join(methods)}-{slug(dataset.name)}", alt), dataset.name)


def sweep(
    dataset: DatasetResults, study: str, lines: Mapping[str, Sequence[tuple[float, Interval]]], series: Series
) -> Plot:
    """The headline metric over the number of few-shot examples, one line per method; dashed: chance."""
    figure, (ax,) = _axes(2.9)
    for number, (method, places) in enumerate(lines.items()):
        spread = 1 + 0.02 * (number - (len(lines) - 1) / 2)
        _line(ax, [x * spread for x, _ in places], [v for _, v in places], look(series[method]))
    ax.axhline(100 * dataset.chance[dataset.headline], **DASHED)
    ticks = sorted({x for places in lines.values() for x, _ in places})
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
    ax.set(xlabel="few-shot examples", ylabel=f"{dataset.headline}, %")
    ax.grid(axis="y")
    ends = names([f"{m} {100 * p[0][1].value:.1f} to {100 * p[-1][1].value:.1f} %" for m, p in lines.items() if p])
    shots = f"{names([f'{x:g}' for x in ticks])} few-shot examples"
    alt = f"{dataset.name}, {dataset.headline} over {shots}: {ends}."
    return Plot(to_svg(figure, f"study-{slug(study)}-{slug(dataset.name)}", alt), f"{dataset.name}: {shots}")


def paper_figure(name: str, title: str, lines: Mapping[str, Mapping[str, Interval]]) -> Plot:
    """A figure of the first paper from our data: values over named settings, joined by lines."""
    figure, (ax,) = _axes(3.4)
    settings = list(next(iter(lines.values())))
    for number, (label, values) in enumerate(lines.items()):
        shift = 0.06 * (number - (len(lines) - 1) / 2)
        places = [settings.index(setting) + shift for setting in values]
        _line(ax, places, list(values.values()), look(number), label)
    ax.set_xticks(range(len(settings)), settings)
    ax.set(xlabel=title, ylabel="accuracy, %", ylim=(0, None))
    ax.grid(axis="y")
    ax.legend(**LEGEND)
    best = names([f"{label}: {max(values, key=lambda v: values[v].value)}" for label, values in lines.items()])
    alt = f"{name} of the paper, from our data: {title}; the best is {best}."
    return Plot(to_svg(figure, slug(name), alt), f"{name}: {title}")


def costs(
    name: str,
    caption: str,
    fronts: Mapping[str, Sequence[tuple[float, float]]],
    quantity: str,
    exhaustive: Interval | None,
) -> Plot:
    """Shares over U-Net evaluations per candidate.

    Args:
        fronts: by schedule, its (evaluations, share) pairs.
        quantity: what the shares are of.
        exhaustive: the share at all draws, drawn as dashed line and band.
    """
    figure, (ax,) = _axes(3.4)
    if exhaustive:
        ax.axhspan(100 * exhaustive.low, 100 * exhaustive.high, color=INK, alpha=0.08, lw=0)
        ax.axhline(100 * exhaustive.value, **DASHED)
    for number, (label, places) in enumerate(fronts.items()):
        colour, marker = look(number)
        xs, ys = [cost for cost, _ in places], [100 * share for _, share in places]
        ax.plot(xs, ys, marker=marker, color=colour, lw=1.4, ms=5, mew=0, label=label)
    ax.set_xscale("log")
    ax.minorticks_off()
    drawn = [cost for places in fronts.values() for cost, _ in places]
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if min(drawn) / 1.5 <= t <= 1.5 * max(drawn)]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set(xlabel="U-Net evaluations per candidate, with those of a proposer", ylabel=f"{quantity}, %")
    ax.grid(axis="y")
    ax.legend(**LEGEND)
    least = names([f"{label} from {min(c for c, _ in places):.2g}" for label, places in fronts.items() if places])
    end = f"; all draws {100 * exhaustive.value:.1f} %" if exhaustive else ""
    alt = f"{caption}: {quantity} over evaluations per candidate; {least}{end}."
    return Plot(to_svg(figure, name, alt), f"{caption}: {quantity}")


def trend(dataset: str, metric: str, places: Sequence[tuple[str, Interval, bool]], champion: int | None) -> Plot:
    """A metric over checkpoints in chronological order, with intervals.

    Args:
        places: label, value, and whether it was measured with the current params; the others are grey.
        champion: the index that is starred, with a dashed line at its value.
    """
    figure, (ax,) = _axes(2.9)
    (colour, marker), (grey, _) = look(1), look(7)
    for x, (_, v, current) in enumerate(places):
        shade, alpha = (colour, 1.0) if current else (grey, 0.6)
        ax.plot([x, x], [100 * v.low, 100 * v.high], color=shade, lw=1.8, alpha=alpha, solid_capstyle="round")
        ax.plot(x, 100 * v.value, marker, color=shade, ms=5, mew=0, alpha=alpha)
    if champion is not None:
        height = 100 * places[champion][1].value
        ax.axhline(height, **DASHED)
        ax.plot(champion, height, "*", color=look(2)[0], ms=13, mew=0)
    ticks = [round(x) for x in np.linspace(0, len(places) - 1, min(len(places), 6))]
    ax.set_xticks(ticks, [places[x][0] for x in ticks])
    ax.set(ylabel=f"{metric}, %", xlim=(-0.5, len(places) - 0.5))
    ax.grid(axis="y")
    first, last = places[0][1].value, places[-1][1].value
    ends = f"from {100 * first:.1f} % to {100 * last:.1f} % over {len(places)} checkpoints"
    best = "" if champion is None else f"; champion {100 * places[champion][1].value:.1f} %"
    return Plot(to_svg(figure, f"trend-{slug(dataset)}", f"{dataset}, {metric}: {ends}{best}."), dataset)


def smooth(values: ArrayLike, window: int) -> NDArray[np.float64]:
    """[n] centred moving average; the window is truncated at the ends."""
    values_n, ones = np.asarray(values, dtype=np.float64), np.ones(window)
    return np.convolve(values_n, ones, "same") / np.convolve(np.ones_like(values_n), ones, "same")


def training(dataset: DatasetResults, method: str, series: Series) -> Plot:
    """Loss and accuracy of a method's training, raw and smoothed over a twelfth of the steps."""
    curve, (colour, _) = dataset.curves[method], look(series[method])
    steps = curve["step"]
    window = min(len(steps), 2 * (len(steps) // 24) + 1)
    figure, axes = _axes(3.2, rows=2)
    for ax, name, scale in zip(axes, ("loss", "accuracy"), (1, 100), strict=True):
        values = scale * np.array(curve[name])
        ax.plot(steps, values, color=colour, lw=0.8, alpha=0.35)
        ax.plot(steps, smooth(values, window), color=colour, lw=1.8)
        ax.set_ylabel("loss" if scale == 1 else "accuracy, %")
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.grid()
    axes[1].set(xlabel="step", ylim=(0, 103))
    last = smooth(curve["accuracy"], window)
    span = f"from {100 * last[0]:.0f} % to {100 * last[-1]:.0f} % in {len(steps)} steps"
    alt = f"Training of {method} on {dataset.name}: smoothed accuracy {span}."
    name = f"curves-{slug(dataset.name)}-{slug(method)}"
    return Plot(to_svg(figure, name, alt), f"{dataset.name}: {method}")


def ranks(dataset: DatasetResults, series: Series) -> Plot:
    """Cumulative match curve: the share of examples whose correct candidate is among the top k; dashed: chance."""
    candidates_n = dataset.candidates
    ks = np.arange(1, int(candidates_n.max()) + 1)
    figure, (ax,) = _axes(2.9)
    ax.plot(ks, [100 * np.minimum(1, k / candidates_n).mean() for k in ks], **DASHED)
    for method, ranks_n in dataset.ranks.items():
        shares = [100 * float((ranks_n <= k).mean()) for k in ks]
        colour, marker = look(series[method])
        ax.plot(ks, shares, marker=marker if len(ks) <= 20 else "", color=colour, lw=1.6, ms=4, mew=0)
    if len(ks) > 20:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.minorticks_off()
        ax.set_xticks([k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= ks[-1]])
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="k", ylabel="correct one in the top k, %", ylim=(0, 103))
    ax.grid()
    alt = f"Share of examples of {dataset.name} whose correct candidate is among the top k, for every method."
    return Plot(to_svg(figure, f"ranks-{slug(dataset.name)}", alt), f"{dataset.name}: ranks")


def margins(dataset: DatasetResults, methods: Sequence[str], series: Series) -> Plot:
    """Histograms of the correct image's score minus that of the other: values below zero are wrong answers."""
    margins = {method: margin(dataset, method) for method in methods}
    edge = max(float(np.quantile(np.abs(values), 0.99)) for values in margins.values()) or 1.0
    bins = np.linspace(-edge, edge, 41).tolist()
    figure, (ax,) = _axes(2.9)
    for method, values in margins.items():
        colour, _ = look(series[method])
        share = np.full(len(values), 100 / len(values))
        ax.hist(np.clip(values, -edge, edge), bins, weights=share, color=colour, alpha=0.18)
        ax.hist(np.clip(values, -edge, edge), bins, weights=share, color=colour, histtype="step", lw=1.5)
    ax.axvline(0, **DASHED)
    ax.set(xlabel="score of the correct image − score of the other", ylabel="examples, %", xlim=(-edge, edge))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="y")
    medians = names([f"{method} {float(np.median(values)):.2g}" for method, values in margins.items()])
    alt = f"Margins on {dataset.name}; medians: {medians}."
    return Plot(to_svg(figure, f"margins-{slug(dataset.name)}", alt), f"{dataset.name}: margins")


def margin(dataset: DatasetResults, method: str) -> NDArray[np.float64]:
    """[n] score of the correct candidate minus the best score among the others."""
    margins = []
    for example, scores_IT in zip(dataset.examples, dataset.scores[method], strict=True):
        wrong_IT = np.ones_like(scores_IT, dtype=bool)
        wrong_IT[tuple(zip(*example.answer, strict=True))] = False
        margins.append(float(scores_IT[~wrong_IT].max() - scores_IT[wrong_IT].max()))
    return np.array(margins)
