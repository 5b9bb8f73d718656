"""The figures, as SVG within the page: its font, its text colour, and colours that the page's style sheet decides.

Matplotlib draws with stand-in colours that are then replaced by CSS variables, so one drawing serves a light and a
dark page.

Shapes: n examples.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from numpy.typing import ArrayLike, NDArray

from dsd.report.findings import best_interval, names
from dsd.report.inputs import Dataset
from dsd.report.tables import chance
from dsd.statistics import Interval

INK = "#ab00ff"  # stands in for the page's text colour
SERIES = [f"#ab000{number}" for number in range(8)]  # stand in for --series-0 … --series-7
MARKERS = ["o", "D", "s", "^", "v", "P", "X", "*"]
SYMBOLS = ["●", "◆", "■", "▲", "▼", "✚", "✖", "★"]  # the markers in a line of text
Series = Mapping[str, int]  # method → its number, which is the same in every figure
WIDTH = 5.0  # inches, which are 360 units of the SVG: about its width in pixels on a telephone
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
} | {
    key: INK
    for key in (
        "text.color",
        "axes.edgecolor",
        "axes.labelcolor",
        "axes.titlecolor",
        "xtick.color",
        "ytick.color",
        "grid.color",
    )
}


@dataclass(frozen=True)
class Drawing:
    svg: Markup
    caption: str


def look(number: int) -> tuple[str, str]:
    """Colour and marker of a method."""
    return SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]


def to_svg(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an SVG element without scripts, links, dates or ids that another figure has too."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
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


def _figure(height: float, rows: int = 1, heights: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, 1, sharex=rows > 1, squeeze=False, height_ratios=heights)
    for ax in axes[:, 0]:
        ax.set_axisbelow(True)
    return figure, list(axes[:, 0])


def accuracy(dataset: Dataset, series: Series) -> Drawing:
    """Every method on every metric, with its interval; a dashed line is chance."""
    methods, metrics, level = dataset.methods, dataset.metrics, chance(dataset)
    step = len(methods) + 1.0
    figure, (ax,) = _figure(0.55 + 0.155 * step * len(metrics))
    for row, metric in enumerate(metrics):
        top = row * step
        ax.plot(
            [100 * level[metric]] * 2, [top - 0.6, top + len(methods) - 0.4], color=INK, alpha=0.7, lw=1, ls=(0, (3, 2))
        )
        for number, method in enumerate(methods):
            found, (colour, marker) = dataset.results[method][metric], look(series[method])
            ax.plot(
                [100 * found.low, 100 * found.high], [top + number] * 2, color=colour, lw=1.8, solid_capstyle="round"
            )
            ax.plot(100 * found.value, top + number, marker, color=colour, ms=5, mew=0)
    ax.set(xlim=(-1, 101), ylim=(step * len(metrics) - 1.2, -0.9), xlabel="right answers, %")
    ax.set_yticks([row * step + (len(methods) - 1) / 2 for row in range(len(metrics))], metrics)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")
    said = names([best_interval(dataset, method) for method in methods])
    alt = f"Accuracy on {dataset.name}, {dataset.headline}: {said}; chance {100 * level[dataset.headline]:.1f} %."
    return Drawing(to_svg(figure, f"accuracy-{slug(dataset.name)}", alt), dataset.name)


def ablations(dataset: Dataset, methods: Sequence[str], series: Series) -> Drawing:
    """The headline metric of each variant of methods with the same keys, a panel a key; a dashed line is chance."""
    keys = list(dataset.ablations[methods[0]])
    values = {key: list(dataset.ablations[methods[0]][key]) for key in keys}
    labels = {key: ["\n".join(textwrap.wrap(value, 24)) for value in values[key]] for key in keys}
    lines = 1 + max(label.count("\n") for some in labels.values() for label in some)
    step, level = max(len(methods) + 0.6, 1.1 * lines), chance(dataset)[dataset.headline]
    sizes = [len(values[key]) for key in keys]
    figure, axes = _figure(0.75 + 0.155 * step * sum(sizes) + 0.3 * len(keys), rows=len(keys), heights=sizes)
    for ax, key in zip(axes, keys, strict=True):
        for row, value in enumerate(values[key]):
            for number, method in enumerate(methods):
                found, (colour, marker) = dataset.ablations[method][key][value][dataset.headline], look(series[method])
                y = row * step + number
                ax.plot([100 * found.low, 100 * found.high], [y] * 2, color=colour, lw=1.8, solid_capstyle="round")
                ax.plot(100 * found.value, y, marker, color=colour, ms=5, mew=0)
        ax.axvline(100 * level, color=INK, alpha=0.7, lw=1, ls=(0, (3, 2)))
        ax.set(ylim=(step * len(values[key]) - 0.6, -0.8), title=key)
        ax.set_yticks([row * step + (len(methods) - 1) / 2 for row in range(len(values[key]))], labels[key])
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x")
    axes[-1].set(xlabel=f"{dataset.headline}, %")
    best = {
        key: max(values[key], key=lambda value: dataset.ablations[methods[-1]][key][value][dataset.headline].value)
        for key in keys
    }
    said = names([f"{key} {value}" for key, value in best.items()])
    alt = f"Ablations on {dataset.name}, {dataset.headline}; the best of each key for {methods[-1]}: {said}."
    return Drawing(to_svg(figure, f"ablations-{'-'.join(methods)}-{slug(dataset.name)}", alt), dataset.name)


def curve(
    dataset: Dataset, study: str, key: str, lines: Mapping[str, Sequence[tuple[float, Interval]]], series: Series
) -> Drawing:
    """The headline metric over the amounts of a key, with intervals, a line a method; a dashed line is chance."""
    figure, (ax,) = _figure(2.9)
    for number, (method, places) in enumerate(lines.items()):
        _line(
            ax,
            [x * (1 + 0.02 * (number - (len(lines) - 1) / 2)) for x, _ in places],
            [v for _, v in places],
            look(series[method]),
        )
    ax.axhline(100 * chance(dataset)[dataset.headline], color=INK, alpha=0.7, lw=1, ls=(0, (3, 2)))
    ticks = sorted({x for places in lines.values() for x, _ in places})
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
    ax.set(xlabel=key.removeprefix("dataset."), ylabel=f"{dataset.headline}, %")
    ax.grid(axis="y")
    said = names([f"{m} {100 * p[0][1].value:.1f} to {100 * p[-1][1].value:.1f} %" for m, p in lines.items() if p])
    alt = f"{dataset.name}, {dataset.headline} over {key}: {said}."
    return Drawing(to_svg(figure, f"study-{slug(study)}-{slug(dataset.name)}", alt), dataset.name)


def redrawn(name: str, title: str, lines: Mapping[str, Mapping[str, Interval]]) -> Drawing:
    """Values with intervals over named settings, joined by lines: a figure of the paper from our data."""
    figure, (ax,) = _figure(3.4)
    settings = list(next(iter(lines.values())))
    for number, (label, values) in enumerate(lines.items()):
        shift = 0.06 * (number - (len(lines) - 1) / 2)
        places = [settings.index(setting) + shift for setting in values]
        _line(ax, places, list(values.values()), look(number), label)
    ax.set_xticks(range(len(settings)), settings)
    ax.set(xlabel=title, ylabel="right answers, %", ylim=(0, None))
    ax.grid(axis="y")
    ax.legend(frameon=False, fontsize=8.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    best = names([f"{label}: {max(values, key=lambda v: values[v].value)}" for label, values in lines.items()])
    alt = f"{name} of the paper, redrawn: {title}; the best is {best}."
    return Drawing(to_svg(figure, slug(name), alt), f"{name}: {title}")


def costs(name: str, caption: str, fronts: Mapping[str, Sequence[tuple[float, float]]], whole: Interval) -> Drawing:
    """Right answers over U-Net evaluations a candidate, a line for each; the band is the interval of all draws."""
    figure, (ax,) = _figure(3.4)
    ax.axhspan(100 * whole.low, 100 * whole.high, color=INK, alpha=0.08, lw=0)
    ax.axhline(100 * whole.value, color=INK, alpha=0.7, lw=1, ls=(0, (3, 2)))
    for number, (label, places) in enumerate(fronts.items()):
        colour, marker = look(number)
        xs, ys = [cost for cost, _ in places], [100 * share for _, share in places]
        ax.plot(xs, ys, marker=marker, color=colour, lw=1.4, ms=5, mew=0, label=label)
    ax.set_xscale("log")
    ax.minorticks_off()
    seen = [cost for places in fronts.values() for cost, _ in places]
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if min(seen) / 1.5 <= t <= 1.5 * max(seen)]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set(xlabel="U-Net evaluations a candidate", ylabel="right answers, %")
    ax.grid(axis="y")
    ax.legend(frameon=False, fontsize=8.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    said = names([f"{label} from {min(c for c, _ in places):.2g}" for label, places in fronts.items() if places])
    alt = f"{caption}: right answers over evaluations a candidate; {said}; all draws {100 * whole.value:.1f} %."
    return Drawing(to_svg(figure, name, alt), caption)


def trend(dataset: str, metric: str, places: Sequence[tuple[str, Interval, bool]], champion: int | None) -> Drawing:
    """A metric of one checkpoint after the other, in the order of time, with intervals.

    Args:
        places: label, value, and whether it was found with the params of now; what was not stands back.
        champion: the place that is marked, with a dashed line at its height.
    """
    figure, (ax,) = _figure(2.9)
    (colour, marker), (other, _) = look(1), look(7)
    for x, (_, v, now) in enumerate(places):
        shade, solid = (colour, 1.0) if now else (other, 0.6)
        ax.plot([x, x], [100 * v.low, 100 * v.high], color=shade, lw=1.8, alpha=solid, solid_capstyle="round")
        ax.plot(x, 100 * v.value, marker, color=shade, ms=5, mew=0, alpha=solid)
    if champion is not None:
        height = 100 * places[champion][1].value
        ax.axhline(height, color=INK, alpha=0.7, lw=1, ls=(0, (3, 2)))
        ax.plot(champion, height, "*", color=look(2)[0], ms=13, mew=0)
    shown = [round(x) for x in np.linspace(0, len(places) - 1, min(len(places), 6))]
    ax.set_xticks(shown, [places[x][0] for x in shown])
    ax.set(ylabel=f"{metric}, %", xlim=(-0.5, len(places) - 0.5))
    ax.grid(axis="y")
    first, last = places[0][1].value, places[-1][1].value
    said = f"from {100 * first:.1f} % to {100 * last:.1f} % over {len(places)} checkpoints"
    best = "" if champion is None else f"; the champion has {100 * places[champion][1].value:.1f} %"
    return Drawing(to_svg(figure, f"trend-{slug(dataset)}", f"{dataset}, {metric}: {said}{best}."), dataset)


def _line(
    ax: Axes, xs: Sequence[float], values: Sequence[Interval], look: tuple[str, str], label: str | None = None
) -> None:
    """Values joined by a line, each with its interval."""
    colour, marker = look
    ax.plot(xs, [100 * v.value for v in values], marker=marker, color=colour, lw=1.4, ms=5, mew=0, label=label)
    for x, v in zip(xs, values, strict=True):
        ax.plot([x, x], [100 * v.low, 100 * v.high], color=colour, lw=1.6, alpha=0.6, solid_capstyle="round")


def smooth(values: ArrayLike, window: int) -> NDArray[np.float64]:
    """[n] centred moving average; the window is cut off at the ends."""
    values_n, ones = np.asarray(values, dtype=np.float64), np.ones(window)
    return np.convolve(values_n, ones, "same") / np.convolve(np.ones_like(values_n), ones, "same")


def window(steps: int) -> int:
    """The steps that a smoothed value of a training curve is the mean of."""
    return min(steps, 2 * (steps // 24) + 1)


def curves(dataset: Dataset, method: str, series: Series) -> Drawing:
    """Loss and accuracy of a method's training, raw and smoothed, in its colour."""
    curve, (colour, _) = dataset.curves[method], look(series[method])
    steps, width = curve["step"], window(len(curve["step"]))
    figure, axes = _figure(3.2, rows=2)
    for ax, name, scale in zip(axes, ("loss", "accuracy"), (1, 100), strict=True):
        values = scale * np.array(curve[name])
        ax.plot(steps, values, color=colour, lw=0.8, alpha=0.35)
        ax.plot(steps, smooth(values, width), color=colour, lw=1.8)
        ax.set_ylabel("loss" if scale == 1 else "accuracy, %")
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.grid()
    axes[1].set(xlabel="step", ylim=(0, 103))
    last = smooth(curve["accuracy"], width)
    span = f"from {100 * last[0]:.0f} % to {100 * last[-1]:.0f} % in {len(steps)} steps"
    alt = f"Training of {method} on {dataset.name}: smoothed accuracy {span}."
    name = f"curves-{slug(dataset.name)}-{slug(method)}"
    return Drawing(to_svg(figure, name, alt), f"{dataset.name}: {method}")


def ranks(dataset: Dataset, series: Series) -> Drawing:
    """How often the right candidate is among the first k, for every k (cumulative match curve)."""
    candidates_n = dataset.candidates
    ks = np.arange(1, int(candidates_n.max()) + 1)
    figure, (ax,) = _figure(2.9)
    ax.plot(ks, [100 * np.minimum(1, k / candidates_n).mean() for k in ks], color=INK, alpha=0.7, lw=1, ls=(0, (3, 2)))
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
    ax.set(xlabel="k", ylabel="right one among the first k, %", ylim=(0, 103))
    ax.grid()
    alt = f"Share of examples of {dataset.name} whose right candidate is among the first k, for every method."
    return Drawing(to_svg(figure, f"ranks-{slug(dataset.name)}", alt), f"{dataset.name}: ranks")


def margins(dataset: Dataset, methods: Sequence[str], series: Series) -> Drawing:
    """How far the right candidate's score lies above the best wrong one's: left of zero is a wrong answer."""
    found = {method: margin(dataset, method) for method in methods}
    edge = max(float(np.quantile(np.abs(values), 0.99)) for values in found.values()) or 1.0
    bins = np.linspace(-edge, edge, 41).tolist()
    figure, (ax,) = _figure(2.9)
    for method, values in found.items():
        colour, _ = look(series[method])
        share = np.full(len(values), 100 / len(values))
        ax.hist(np.clip(values, -edge, edge), bins, weights=share, color=colour, alpha=0.18)
        ax.hist(np.clip(values, -edge, edge), bins, weights=share, color=colour, histtype="step", lw=1.5)
    ax.axvline(0, color=INK, lw=1, alpha=0.7, ls=(0, (3, 2)))
    ax.set(xlabel="score of the right picture − score of the other", ylabel="examples, %", xlim=(-edge, edge))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="y")
    medians = names([f"{method} {float(np.median(values)):.2g}" for method, values in found.items()])
    alt = f"Margins on {dataset.name}; medians: {medians}."
    return Drawing(to_svg(figure, f"margins-{slug(dataset.name)}", alt), f"{dataset.name}: margins")


def margin(dataset: Dataset, method: str) -> NDArray[np.float64]:
    """[n] score of the true candidate minus that of the best other one."""
    found = []
    for example, scores_IT in zip(dataset.examples, dataset.scores[method], strict=True):
        wrong_IT = np.ones_like(scores_IT, dtype=bool)
        wrong_IT[tuple(zip(*example.answer, strict=True))] = False
        found.append(float(scores_IT[~wrong_IT].max() - scores_IT[wrong_IT].max()))
    return np.array(found)


def slug(name: str) -> str:
    """A name as part of an id: letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name)
