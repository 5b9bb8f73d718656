"""The command `dsd`."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from dsd.cli import Commands, Json, Version, demo, evaluate, match, registered_prompt
from dsd.errors import DsdError
from dsd.terminal import check_output, check_port, print_json, print_table
from flows import terminal


class PipelineCommands(Commands):
    def error_line(self, error: BaseException) -> str | None:
        from flows.failures import error_line

        return error_line(error)


app = typer.Typer(cls=PipelineCommands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


# \b keeps the line breaks of the paragraph that follows it.
@app.callback()
def dsd(version: Version = False) -> None:
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
        print_json([need._asdict() for need in needed])
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
        print_json({"version": version.number, **asdict(verdict)})
    else:
        print(f"{BACKBONE} version {version.number}: {'promoted' if verdict.promoted else 'not promoted'}")
        print(verdict.reason)
        print(f"leaderboard: {PAGE}")


@app.command()
def rollback() -> None:
    """Make the champion before the present one the champion again; a running `dsd serve` follows.

    \b
    Example:
      dsd rollback
    """
    from dsd.config import load
    from dsd.report.leaderboard import write
    from flows.registry.leaderboard import PAGE, board
    from flows.registry.registry import BACKBONE, Registry
    from flows.stores import require_version

    require_version(BACKBONE)
    registry = Registry()
    taken_back, champion = registry.rollback()
    print(f"{BACKBONE} version {taken_back.number}: taken back; version {champion.number} is the champion")
    print(f"leaderboard: {write(board(load(), registry), PAGE)}")


@app.command()
def serve(
    model: Annotated[
        str, typer.Option(help="A registered version: a name with an alias or a number.")
    ] = "models:/dsd-backbone@champion",
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 5000,
    refresh: Annotated[
        float, typer.Option(min=1, help="Seconds between looks at the registry: a new champion is served from then on.")
    ] = 30,
) -> None:
    """Serve the champion over HTTP: images and texts in, scores and optional heat maps out.

    If the alias moves to another version (`dsd promote`, `dsd watch`, `dsd rollback`), that one is opened and takes
    over without a lost request; if it does not open, the old one stays. Requests have the format of MLflow's own
    server. Their limits are set by `serving` in params.yaml.

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
        newer = partial(Registry().newer, model, target=Path(folder))
        run_server(newer, host, port, refresh)


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
        check_output("--html", html)
    current = board(load(), Registry() if exists() else None)
    page = None if html is None else write(current, html)
    if as_json:
        print_json(asdict(current))
    elif page is not None:
        print(f"page: {page}")
    else:
        terminal.print_leaderboard(current)


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
        print_json([finding._asdict() for finding in findings])
    else:
        rows: list[tuple[str, ...]] = []
        for finding in findings:
            rows.append((finding.check, "problem" if finding.remedy else "ok", finding.found))
            rows += [("", "", f"→ {finding.remedy}")] if finding.remedy else []
        print_table(("check", "", "found"), rows)
        print(f"\nproblems: {len(problems)}" if problems else "\nno problems")
    sys.exit(bool(problems))


def _registered_prompt(name: str, folder: Path) -> Path:
    from flows.registry.registry import Registry
    from flows.stores import require_version

    require_version(name)
    return Registry().prompt(name, folder)


registered_prompt.append(_registered_prompt)
app.command()(match)
app.command()(evaluate)
app.command()(demo)

if __name__ == "__main__":
    app()
