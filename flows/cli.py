"""The command `dsd`."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dsd import __version__
from dsd.errors import DsdError
from flows import terminal


class Commands(TyperGroup):
    """Print a user error, a failure of the machine or a warning as one line; a defect keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            return super().invoke(ctx)
        except Exception as error:
            from flows.failures import error_line

            if (line := error_line(error)) is None:
                raise
            sys.exit(f"dsd: {line}")

    def main(self, *arguments: Any, **options: Any) -> Any:
        if sys.stdout is None:  # closed by the caller (>&-): print would do nothing, with exit status 0
            sys.exit("dsd: standard output is closed")
        return super().main(*arguments, **options)


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dsd {__version__}")
        raise typer.Exit


# \b keeps the line breaks of the paragraph that follows it.
@app.callback()
def dsd(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Text-to-image diffusion models as image-text matchers.

    \b
    Examples:
      dsd doctor
      dsd reproduce
      dsd match photo.png --text "a red circle" --text "a blue square"

    See `dsd COMMAND --help` for each command.
    """


@app.command()
def reproduce(
    preset: Annotated[
        Path | None,
        typer.Option(help="Apply this preset to the params files first, e.g. presets/paper-comvg-sd2.yaml."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run needs and what is missing; change nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; only with --dry-run.")] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Recompute everything, e.g. after an update of torch.")
    ] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Bring back the params and results from before the last preset, and exit.")
    ] = False,
) -> None:
    """Run every stage whose params, code or data have changed, and print the path of the report.

    With --dry-run the exit status is 1 if something is missing.

    \b
    Examples:
      dsd reproduce
      dsd reproduce --preset presets/paper-comvg-sd2.yaml --dry-run
      dsd reproduce --dry-run --json
      dsd reproduce --undo
    """
    if as_json and not dry_run:
        raise DsdError("--json: only with --dry-run; the results of a run are in data/evaluate/metrics.json")
    if recompute and dry_run:
        raise DsdError("--recompute: not with --dry-run, which changes nothing")
    if undo and (preset is not None or dry_run or recompute):
        raise DsdError("--undo: takes no other option")
    if dry_run:
        sys.exit(_dry_run(preset, as_json=as_json))
    if undo:
        from flows import presets
        from flows.reproduce import alone

        with alone():
            print(f"restored: params and results from before {presets.undo()}")
        return
    from flows import presets
    from flows import reproduce as reproduction

    def apply() -> None:
        if preset is not None:
            presets.put(preset)

    reproduction.main(apply, recompute=recompute)


def _dry_run(preset: Path | None, *, as_json: bool) -> bool:
    """Print what a reproduction needs; return whether something is missing."""
    from dsd.config import load
    from dsd.estimate import needs
    from flows import presets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry
    params = presets.applied(preset, commits=presets.current_commits)[1] if preset else load()
    needed = list(needs(params, free=shutil.disk_usage(".").free))
    problems = [f"{need.what}: {need.problem}" for need in needed if need.problem]
    if as_json:
        terminal.print_json([need._asdict() for need in needed])
    else:
        terminal.print_needs(needed)
        for problem in problems:
            print(f"dsd: {problem}", file=sys.stderr)
    return bool(problems)


@app.command()
def promote(as_json: Json = False) -> None:
    """Register this workspace's results and compare them with the champion's.

    The gate runs a paired test on the same examples, with the settings `gate` in params.yaml. A tie keeps the champion.

    \b
    Examples:
      dsd promote
      dsd promote --json
    """
    from dsd.config import load
    from flows.registry.leaderboard import PAGE
    from flows.registry.promote import register_and_judge
    from flows.registry.registry import BACKBONE

    version, verdict = register_and_judge(load())
    if as_json:
        terminal.print_json({"version": version.number, **asdict(verdict)})
    else:
        print(f"{BACKBONE} version {version.number}: {'promoted' if verdict.promoted else 'not promoted'}")
        print(verdict.reason)
        print(f"leaderboard: {PAGE}")


@app.command()
def serve(
    model: Annotated[
        str, typer.Option(help="A registered version: a name with an alias or a number.")
    ] = "models:/dsd-backbone@champion",
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 5000,
) -> None:
    """Serve the champion over HTTP: images and texts in, scores and optional heat maps out.

    Requests have the format of MLflow's own server. Their limits are set by `serving` in params.yaml.

    \b
    Examples:
      dsd serve
      dsd serve --model models:/dsd-backbone/3 --port 8080
    """
    from flows.stores import require_version

    check_port(host, port)
    require_version(model)
    from flows.registry.registry import Registry
    from flows.serving.server import serve as run_server

    with TemporaryDirectory() as folder:
        run_server(Registry().model(model, Path(folder)), host, port)


def check_port(host: str, port: int) -> None:
    """Raise DsdError if no server can listen there; done before a checkpoint is opened."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        # Python adds the address to the message of the system; a name that does not resolve has a message of its own.
        reason = str(error.strerror).partition(" (while")[0].lower()
        raise DsdError(f"--host {host} --port {port}: {reason}") from None


@app.command()
def watch(
    once: Annotated[bool, typer.Option("--once", help="Run one tick in this process, without a server.")] = False,
    pool: Annotated[
        str | None,
        typer.Option(help="Deploy to this Prefect work pool of the server at PREFECT_API_URL, and exit."),
    ] = None,
) -> None:
    """Evaluate every new checkpoint of `watch.sources` at the times of `watch.cron` in params.yaml.

    Each checkpoint is evaluated in a clone of this workspace, registered, and compared with the champion. See the
    results with `dsd leaderboard`. Without --once and --pool the command runs until it is stopped, on the server at
    PREFECT_API_URL or on one that it starts.

    \b
    Examples:
      dsd watch --once
      dsd watch
      dsd watch --pool dsd
    """
    if once:
        from flows.watch.tick import tick

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        report = tick()
        print("\n".join(report.lines))
        sys.exit(report.failed > 0)
    from dsd.config import load

    cron = load().watch.cron
    if pool is not None:
        if "PREFECT_API_URL" not in os.environ:
            raise DsdError("PREFECT_API_URL: not set; --pool needs a server, e.g. http://127.0.0.1:4200/api")
        from flows.watch.deployment import deploy

        print(f"{deploy(cron, pool)}: in the work pool {pool}, at {cron}")
        return
    # A reproduction in this workspace may start a server on the database of the default PREFECT_HOME.
    with TemporaryDirectory(prefix="dsd-watch-") as home:
        os.environ["PREFECT_HOME"] = home
        from flows.reproduce import server

        with server():
            from flows.watch.deployment import serve

            serve(cron)


@app.command()
def leaderboard(
    as_json: Json = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the page to this file; `promote` and `watch` update data/leaderboard/index.html."),
    ] = None,
) -> None:
    """Show all registered checkpoints with their scores and verdicts, the champion, and the checkpoints that failed.

    \b
    Examples:
      dsd leaderboard
      dsd leaderboard --json
      dsd leaderboard --html leaderboard.html
    """
    from dsd.config import load
    from dsd.report.leaderboard import write
    from flows.registry.leaderboard import board
    from flows.registry.registry import Registry
    from flows.stores import exists

    if html is not None:
        terminal.check_output("--html", html)
    current = board(load(), Registry() if exists() else None)
    page = None if html is None else write(current, html)
    if as_json:
        terminal.print_json(asdict(current))
    elif page is not None:
        print(f"page: {page}")
    else:
        terminal.print_leaderboard(current)


@app.command()
def match(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files to score.")],
    texts: Annotated[list[str], typer.Option("--text", help="A text to score; repeatable.")],
    checkpoint: Annotated[
        str, typer.Option(help="A checkpoint in the diffusers layout: a folder or a hub id.")
    ] = "models/embedded",
    prompt: Annotated[
        str | None,
        typer.Option(
            help="A trained prompt: prompt.safetensors of data/train, or models:/dsd-prompt-scenes-com@champion."
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="denoising, the default, or cross-attention, the default with a prompt.")
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option(help="Save the heat map of each word of the best match to this image file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score images against texts, and mark the best text of each image, or the best image for a single text.

    Higher is better; on a tie none is marked. Scores are comparable within one command only.
    Shares are softmaxes over the texts of an image, or the images of one text.

    \b
    Examples:
      dsd match photo.png --text "a red circle" --text "a blue square"
      dsd match one.png two.png --text "a red circle" --json
      dsd match photo.png --text "a red circle" --heatmap heatmap.png
    """
    check_images(images)
    if heatmap is not None:
        terminal.check_heatmap(heatmap)
    from dsd.matcher import Matcher

    with TemporaryDirectory() as folder:
        if prompt is not None and prompt.startswith("models:/"):
            from flows.registry.registry import Registry
            from flows.stores import require_version

            require_version(prompt)
            prompt = str(Registry().prompt(prompt, Path(folder)))
        matcher = Matcher.from_pretrained(checkpoint, prompt=prompt, method=method)
    scores_IT = matcher.score(images, texts)
    scores_LC = scores_IT.T if len(texts) == 1 else scores_IT  # a line of candidates per text, or per image
    # A tie is nobody's win.
    winners = [(n, int(line.argmax())) for n, line in enumerate(scores_LC) if int((line == line.max()).sum()) == 1]
    best = [winner[::-1] for winner in winners] if len(texts) == 1 else winners
    shares_IT = matcher.shares(scores_IT.T).T if len(texts) == 1 else matcher.shares(scores_IT)
    scores, shares = scores_IT.tolist(), shares_IT.tolist()
    if heatmap is not None:
        i, t = max(best or [(0, 0)], key=lambda pair: scores[pair[0]][pair[1]])
        terminal.save_heatmap(matcher.heatmap(images[i], texts[t]), heatmap)
    matches = [
        {"image": str(image), "text": text, "score": scores[i][t], "share": shares[i][t], "best": (i, t) in best}
        for i, image in enumerate(images)
        for t, text in enumerate(texts)
    ]
    if as_json:
        terminal.print_json(matches)
    else:
        rows = (
            (m["image"], m["text"], f"{m['score']:.5f}", f"{100 * m['share']:.1f} %", "best" if m["best"] else "")
            for m in matches
        )
        terminal.print_table(("image", "text", "score", "share", ""), rows, number="score")


def check_images(images: Iterable[Path]) -> None:
    """Exit with a line per image that cannot be read, before the checkpoint is opened."""
    from dsd.data.images import MAX_PIXELS, load_image

    errors = []
    for image in images:
        try:
            load_image(image, max_pixels=MAX_PIXELS)
        except DsdError as error:
            errors.append(f"dsd: {error}")
    if errors:
        sys.exit("\n".join(errors))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check the installation, the device, the checkpoints, the datasets and the stores; print a remedy per problem.

    The command takes some seconds and changes nothing. The exit status is 1 if there is a problem.

    \b
    Examples:
      dsd doctor
      dsd doctor --json
    """
    from flows import doctor as diagnosis

    findings = diagnosis.examine(diagnosis.checks())
    problems = [finding for finding in findings if finding.remedy]
    if as_json:
        terminal.print_json([finding._asdict() for finding in findings])
    else:
        rows: list[tuple[str, ...]] = []
        for finding in findings:
            rows.append((finding.check, "problem" if finding.remedy else "ok", finding.found))
            rows += [("", "", f"→ {finding.remedy}")] if finding.remedy else []
        terminal.print_table(("check", "", "found"), rows)
        print(f"\nproblems: {len(problems)}" if problems else "\nno problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    app()
