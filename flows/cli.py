"""The command `dsd`: what one person at a terminal wants of the project."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsd.errors import DsdError

if TYPE_CHECKING:
    from dsd.matcher import Heatmap
    from dsd.params import Params
    from dsd.report.leaderboard import Board

app = typer.Typer(
    help="Text-to-image diffusion models as image-text matchers.",
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
) -> None:
    """Bring everything up to date with params.yaml, the code and the data, and say where the report is.

    \b
    Examples:
      dsd reproduce
      dsd reproduce --preset presets/paper-comvg-sd2.yaml --dry-run
    """
    with one_line_errors():
        if dry_run:
            from dsd.params import load
            from flows import presets

            sys.exit(tell(presets.applied(preset, commits=presets.today)[1] if preset else load()))
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
        from dsd.params import load
        from flows.registry import BACKBONE, Registry

        params, registry = load(), Registry()
        version = registry.register(params, Path())
        verdict = registry.challenge(params, version)
    if as_json:
        print(json.dumps({"version": version.number, **asdict(verdict)}, indent=2, ensure_ascii=False))
    else:
        print(f"{BACKBONE} version {version.number}: {'promoted' if verdict.promoted else 'not promoted'}")
        print(verdict.reason)


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
            from flows.watch import tick

            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            told = tick()
            print("\n".join(told.lines))
            sys.exit(told.failed > 0)
        from dsd.params import load

        cron = load().watch.cron
        if pool is not None:
            if "PREFECT_API_URL" not in os.environ:
                raise DsdError("PREFECT_API_URL: not set; --pool needs a server (http://127.0.0.1:4200/api, say)")
            from flows.schedule import deploy

            print(f"{deploy(cron, pool)}: in the work pool {pool}, at {cron}")
            return
        # The runs of this workspace may have a server of their own, whose database is theirs.
        with TemporaryDirectory(prefix="dsd-watch-") as home:
            os.environ["PREFECT_HOME"] = home
            from flows.reproduce import server

            with server():
                from flows.schedule import serve

                serve(cron)


@app.command()
def leaderboard(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write the page here; the watch keeps data/leaderboard/index.html.")
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
        from dsd.params import load
        from dsd.report.leaderboard import write
        from flows.leaderboard import board
        from flows.registry import Registry

        found = board(load(), Registry())
        if html is not None:
            print(f"page: {write(found, html)}")
    if as_json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False, default=str))
    elif html is None:
        tell_board(found)


def tell_board(found: Board) -> None:
    """Prints the leaderboard as tables; what has no rows is left out."""
    from rich.console import Console
    from rich.table import Table

    from dsd.report.leaderboard import failures, scores

    console = Console(highlight=False, markup=False)
    others = scores(found, found.others, "measured with other params")
    shown = [content for content in (scores(found, found.ranked, ""), others, failures(found)) if content.rows]
    for content in shown:
        table = Table(box=None, pad_edge=False, title=content.caption or None, title_justify="left")
        for heading in content.head:
            table.add_column(heading, overflow="fold")
        for row in content.rows:
            table.add_row(row.head, *(f"{cell.text} {cell.interval}".strip() for cell in row.cells))
        console.print(table)
    if not shown:
        console.print("nothing was measured yet; `dsd promote` enters this workspace's results, `dsd watch` new ones")


def tell(params: Params) -> int:
    """Prints what a reproduction would need; returns 1 where something stands against it."""
    from rich.console import Console
    from rich.table import Table

    from dsd.needs import needs

    table, problems = Table(box=None, pad_edge=False), []
    for heading in ("what", "of", "how much", ""):
        table.add_column(heading, justify="right" if heading == "how much" else "left", overflow="fold")
    for need in needs(params, free=shutil.disk_usage(".").free):
        much = "" if need.problem and not need.amount else amount(need.amount, need.unit)
        table.add_row(need.what, need.where, much, "missing" if need.problem else "")
        problems += [f"{need.what}: {need.problem}"] if need.problem else []
    Console(highlight=False, markup=False).print(table)
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
            help="A trained prompt: a file, such as data/train/scenes-com/dsd/prompt.safetensors, or a registered one, "
            "such as models:/dsd-prompt-scenes-com@champion."
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
        from dsd.matcher import Matcher

        with TemporaryDirectory() as folder:
            if prompt is not None and prompt.startswith("models:/"):
                from flows.registry import Registry

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
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        show(found)


def best_matches(scores: list[list[float]]) -> list[tuple[int, int]]:
    """The best text of each picture, or the best picture of a single text, as (picture, text) places."""
    if len(scores[0]) == 1:
        return [(max(range(len(scores)), key=lambda i: scores[i][0]), 0)]
    return [(i, max(range(len(row)), key=row.__getitem__)) for i, row in enumerate(scores)]


def show(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("image", "text"):
        table.add_column(heading, overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in found:
        table.add_row(row["image"], row["text"], f"{row['score']:.5f}", "best" if row["best"] else "")
    Console(highlight=False, markup=False).print(table)


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
