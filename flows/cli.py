"""The command `dsd`: what one person at a terminal wants of the project."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsd.errors import DsdError

if TYPE_CHECKING:
    from dsd.config import Params
    from dsd.matcher import Heatmap
    from dsd.report.leaderboard import Board
    from dsd.statistics import Interval

MAX_PIXELS = 40_000_000  # as the matcher has it

app = typer.Typer(
    help="""Text-to-image diffusion models as image-text matchers.

    \b
    Examples:
      dsd doctor
      dsd reproduce
      dsd match photo.png --text "a red circle" --text "a blue square"

    Each command's --help has more.
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A user's mistake, or a warning to a user, is one line; a defect keeps its traceback."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        yield
    except DsdError as error:
        sys.exit(f"dsd: {error}")


@app.command()
def reproduce(
    preset: Annotated[
        Path | None,
        typer.Option(help="Put these settings into params.yaml first, such as presets/paper-comvg-sd2.yaml."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would need, and whether it is there; change nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; of --dry-run alone.")] = False,
) -> None:
    """Bring everything up to date with params.yaml, the code and the data, and say where the report is.

    \b
    Examples:
      dsd reproduce
      dsd reproduce --preset presets/paper-comvg-sd2.yaml --dry-run
      dsd reproduce --dry-run --json
    """
    with one_line_errors():
        if as_json and not dry_run:
            raise DsdError("--json: only with --dry-run; what a reproduction finds is in data/evaluate/metrics.json")
        if dry_run:
            from dsd.config import load
            from flows import presets

            sys.exit(tell(presets.applied(preset, commits=presets.today)[1] if preset else load(), as_json=as_json))
        if preset is not None:
            from flows import presets

            presets.put(preset)
    from flows import reproduce as reproduction

    reproduction.main()


@app.command()
def promote(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Enter this workspace's results into the registry, and let them challenge the champion's.

    Both are compared on the same examples by a paired test, as `gate` in params.yaml says; a tie keeps the champion.

    \b
    Examples:
      dsd promote
      dsd promote --json
    """
    with one_line_errors():
        from dsd.config import load
        from flows.registry.promote import promote as enter
        from flows.registry.registry import BACKBONE

        version, verdict, page = enter(load())
    if as_json:
        show_json({"version": version.number, **asdict(verdict)})
    else:
        print(f"{BACKBONE} version {version.number}: {'promoted' if verdict.promoted else 'not promoted'}")
        print(verdict.reason)
        print(f"leaderboard: {page}")


@app.command()
def serve(
    model: Annotated[
        str, typer.Option(help="A registered version: a name with an alias or a number.")
    ] = "models:/dsd-backbone@champion",
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 5000,
) -> None:
    """Answer requests over HTTP with the champion: images and texts to scores, and heat maps where they are asked for.

    Requests are as MLflow's own server takes them; `serving` in params.yaml bounds them.

    \b
    Examples:
      dsd serve
      dsd serve --model models:/dsd-backbone/3 --port 8080
    """
    with one_line_errors():
        from flows.serving.server import serve as answer

        answer(model, host, port)


@app.command()
def watch(
    once: Annotated[
        bool, typer.Option("--once", help="One tick, now and in this process; no server is needed.")
    ] = False,
    pool: Annotated[
        str | None,
        typer.Option(help="Let the workers of this Prefect work pool tick, at the server of PREFECT_API_URL."),
    ] = None,
) -> None:
    """Evaluate every new checkpoint of `watch.sources` by itself, at the times of `watch.cron` in params.yaml.

    Each runs in a clone of its own, is entered into the registry and challenges the champion; the leaderboard says what
    came of it. Without --pool it ticks until it is ended, at the server of PREFECT_API_URL or under one of its own.

    \b
    Examples:
      dsd watch --once
      dsd watch
      dsd watch --pool dsd
    """
    with one_line_errors():
        if once:
            from flows.watch.tick import tick

            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            told = tick()
            print("\n".join(told.lines))
            sys.exit(told.failed > 0)
        from dsd.config import load

        cron = load().watch.cron
        if pool is not None:
            if "PREFECT_API_URL" not in os.environ:
                raise DsdError("PREFECT_API_URL: not set; --pool needs a server (http://127.0.0.1:4200/api, say)")
            from flows.watch.deployment import deploy

            print(f"{deploy(cron, pool)}: in the work pool {pool}, at {cron}")
            return
        # The runs of this workspace may have a server of their own, whose database is theirs.
        with TemporaryDirectory(prefix="dsd-watch-") as home:
            os.environ["PREFECT_HOME"] = home
            from flows.reproduce import server

            with server():
                from flows.watch.deployment import serve

                serve(cron)


@app.command()
def leaderboard(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write the page here; `promote` and `watch` keep data/leaderboard/index.html.")
    ] = None,
) -> None:
    """Show all measured checkpoints, the champion, what the gate said of each, and those that failed.

    \b
    Examples:
      dsd leaderboard
      dsd leaderboard --json
      dsd leaderboard --html leaderboard.html
    """
    with one_line_errors():
        from dsd.config import load
        from dsd.report.leaderboard import write
        from flows.registry.leaderboard import board
        from flows.registry.registry import Registry

        found = board(load(), Registry())
        if html is not None:
            print(f"page: {write(found, html)}")
    if as_json:
        show_json(asdict(found))
    elif html is None:
        tell_board(found)


def tell_board(found: Board) -> None:
    """Prints the leaderboard as tables that fit a terminal; what has no rows is left out."""
    from rich.console import Console
    from rich.table import Table

    from dsd.report.leaderboard import failures
    from dsd.report.tables import NONE, count, interval, percent

    console = Console(highlight=False, markup=False)

    def table(title: str | None, headings: Iterable[str], rows: Iterable[Sequence[str]]) -> None:
        shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title=title, title_justify="left")
        for heading in headings:
            shown.add_column(heading, overflow="fold")
        for row in rows:
            shown.add_row(*row)
        if shown.rows:
            console.print(shown)

    def value(score: Interval | None) -> str:
        return NONE if score is None else f"{percent(score.value)} %\n{interval(score)}\nn = {count(score.n)}"

    names = (f"{dataset}\n{metric}" for dataset, metric in found.metrics.items())
    headings = ["checkpoint", *names, "mean", "verdict"]
    for title, entries in ((None, found.ranked), ("measured with other params", found.others)):
        rows = (
            (
                f"{entry.label}\nversion {entry.number}",
                *(value(entry.scores.get(name)) for name in found.metrics),
                f"{percent(entry.mean)} %" if entry.scores else NONE,
                f"{entry.verdict or NONE}\n{entry.when:%Y-%m-%d}",
            )
            for entry in entries
        )
        table(title, headings, rows)
    failed = failures(found)
    table(failed.caption, failed.head, ((row.head, *(cell.text for cell in row.cells)) for row in failed.rows))
    if not found.entries and not found.failures:
        console.print("nothing was measured yet; `dsd promote` enters this workspace's results, `dsd watch` new ones")


def tell(params: Params, *, as_json: bool) -> int:
    """Prints what a reproduction would need; returns 1 where something stands against it."""
    from dsd.estimate import needs

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # how often it tries is no news
    wanted = list(needs(params, free=shutil.disk_usage(".").free))
    problems = [f"{need.what}: {need.problem}" for need in wanted if need.problem]
    if as_json:
        show_json([need._asdict() for need in wanted])
        return bool(problems)
    rows = []
    for need in wanted:
        much = "" if need.problem and not need.amount else amount(need.amount, need.unit)
        rows.append((need.what, need.where, much, "missing" if need.problem else ""))
    show(("what", "of", "how much", ""), rows, number="how much")
    for problem in problems:
        print(f"dsd: {problem}", file=sys.stderr)
    return bool(problems)


def amount(value: float, unit: str) -> str:
    """Bytes with the prefix that leaves one to three digits before the point."""
    if unit != "bytes":
        return f"{value:,.1f} h" if unit == "h" else f"{value:,.0f}"
    power = min(4, int(math.log10(value) // 3)) if value >= 1 else 0
    return f"{value / 1000**power:.1f} {('', 'k', 'M', 'G', 'T')[power]}B"


# \b keeps the lines of the paragraph that follows it as they are.
@app.command()
def match(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures to score.")],
    texts: Annotated[list[str], typer.Option("--text", help="A text; may be given again.")],
    checkpoint: Annotated[
        str, typer.Option(help="A checkpoint in the diffusers layout: a folder or a hub id.")
    ] = "models/embedded",
    prompt: Annotated[
        str | None,
        typer.Option(
            help="A trained prompt: prompt.safetensors of data/train, or models:/dsd-prompt-scenes-com@champion."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="cross-attention or denoising.")] = "cross-attention",
    heatmap: Annotated[
        Path | None, typer.Option(help="Draw here where each word of the best match looks in its picture.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score pictures against texts: which text fits a picture best, or which picture a single text?

    Higher is better; scores are comparable within one command only.

    \b
    Examples:
      dsd match photo.png --text "a red circle" --text "a blue square"
      dsd match one.png two.png --text "a red circle" --json
      dsd match photo.png --text "a red circle" --heatmap where.png
    """
    with one_line_errors():
        read(images)
        from dsd.matcher import Matcher

        with TemporaryDirectory() as folder:
            if prompt is not None and prompt.startswith("models:/"):
                from flows.registry.registry import Registry

                prompt = str(Registry().prompt(prompt, Path(folder)))
            matcher = Matcher.from_pretrained(checkpoint, prompt=prompt, method=method)
        scores = matcher.score(images, texts).tolist()
        best = best_matches(scores)
        if heatmap is not None:
            i, t = max(best, key=lambda place: scores[place[0]][place[1]])
            draw(matcher.heatmap(images[i], texts[t]), heatmap)
    found = [
        {"image": str(image), "text": text, "score": scores[i][t], "best": (i, t) in best}
        for i, image in enumerate(images)
        for t, text in enumerate(texts)
    ]
    if as_json:
        show_json(found)
    else:
        rows = ((f["image"], f["text"], f"{f['score']:.5f}", "best" if f["best"] else "") for f in found)
        show(("image", "text", "score", ""), rows, number="score")


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look at what is installed, what there is to compute with and what can be reached, and say what to mend.

    It takes some seconds, starts nothing and changes nothing. The exit status is 1 if something stands in the way.

    \b
    Examples:
      dsd doctor
      dsd doctor --json
    """
    from flows import doctor as doctors

    found = doctors.examine(doctors.checks())
    problems = [finding for finding in found if finding.remedy]
    if as_json:
        show_json([finding._asdict() for finding in found])
    else:
        rows: list[tuple[str, ...]] = []
        for finding in found:
            rows.append((finding.check, "problem" if finding.remedy else "ok", finding.found))
            rows += [("", "", f"→ {finding.remedy}")] if finding.remedy else []
        show(("check", "", "found"), rows)
        print(f"\nproblems: {len(problems)}" if problems else "\nnothing stands in the way")
    sys.exit(bool(problems))


def read(images: Iterable[Path]) -> None:
    """Ends the command with a line for each picture that cannot be read, before a checkpoint is opened for them."""
    from dsd.data.images import load_image

    mistakes = []
    for image in images:
        try:
            load_image(image, max_pixels=MAX_PIXELS)
        except DsdError as error:
            mistakes.append(f"dsd: {error}")
    if mistakes:
        sys.exit("\n".join(mistakes))


def best_matches(scores: list[list[float]]) -> list[tuple[int, int]]:
    """The best text of each picture, or the best picture of a single text, as (picture, text) places."""
    if len(scores[0]) == 1:
        return [(max(range(len(scores)), key=lambda i: scores[i][0]), 0)]
    return [(i, max(range(len(row)), key=row.__getitem__)) for i, row in enumerate(scores)]


def show(headings: Sequence[str], rows: Iterable[Sequence[str]], number: str = "") -> None:
    """Prints a table as wide as the terminal; the column of numbers is never broken."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        aligned = "right" if heading == number else "left"
        table.add_column(heading, justify=aligned, overflow="fold", no_wrap=heading in ("", number))
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)


def show_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def draw(heatmap: Heatmap, path: Path) -> None:
    """The picture, and over it where each word looks, side by side as one image file.

    Raises:
        DsdError: the path is none that an image can be written to.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * (len(heatmap.words) + 1), 2.5), layout="constrained")
    axes = figure.subplots(1, len(heatmap.words) + 1)
    for place in axes:
        place.imshow(heatmap.picture)
        place.axis("off")
    for place, word, map_RR in zip(axes[1:], heatmap.words, heatmap.maps, strict=True):
        place.imshow(map_RR, cmap="inferno", alpha=0.6, vmin=0, vmax=1)
        place.set_title(word)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise DsdError(f"--heatmap {path}: {error}") from None


if __name__ == "__main__":
    app()
