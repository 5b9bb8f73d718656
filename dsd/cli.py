"""The command `dsd`: score and measure images with one checkpoint, from any folder.

The pipeline (`flows.cli`) adds its commands to these. Both print user errors as one line.
"""

from __future__ import annotations

import csv
import io
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from typer.core import TyperGroup

from dsd import EMBEDDED, __version__, errors, terminal
from dsd.errors import DsdError
from dsd.store import write_atomic

if TYPE_CHECKING:
    from dsd.matcher import Matcher
    from dsd.own import Evaluation

PIPELINE = ("reproduce", "promote", "rollback", "watch", "leaderboard", "serve", "doctor")


class Commands(TyperGroup):
    """Print a user error, a failure of the machine or a warning as one line; a defect keeps its traceback."""

    def error_line(self, error: BaseException) -> str | None:
        """Return the message of a user error or of a failure of the machine; None for a defect."""
        return errors.error_line(error)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is None and cmd_name in PIPELINE:
            sys.exit(
                f"dsd: {cmd_name}: a command of the pipeline, which runs in a clone of the repository: see README.md"
            )
        return command

    def invoke(self, ctx: Any) -> Any:
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            return super().invoke(ctx)
        except Exception as error:
            if (line := self.error_line(error)) is None:
                raise
            sys.exit(f"dsd: {line}")

    def main(self, *arguments: Any, **options: Any) -> Any:
        if sys.stdout is None:  # closed by the caller (>&-): print would do nothing, with exit status 0
            sys.exit("dsd: standard output is closed")
        return super().main(*arguments, **options)


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Checkpoint = Annotated[
    str,
    typer.Option(help="A checkpoint in the diffusers layout: a folder or a hub id.", show_default="the embedded one"),
]
MethodName = Annotated[
    str | None, typer.Option(help="denoising, the default, or cross-attention, the default with a prompt.")
]
Prompt = Annotated[
    str | None,
    typer.Option(help="A trained prompt: prompt.safetensors of data/train, or models:/dsd-prompt-scenes-com@champion."),
]
REGISTRY = "models:/"  # how the name of a registered prompt starts
registered_prompt: list[Callable[[str, Path], Path]] = []  # the pipeline's function, which writes one to a folder


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dsd {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
]


# \b keeps the line breaks of the paragraph that follows it.
@app.callback()
def dsd(version: Version = False) -> None:
    """Text-to-image diffusion models as image-text matchers.

    \b
    Examples:
      dsd match photo.png --text "a red circle" --text "a blue square"
      dsd evaluate photos/pairs.csv
      dsd demo

    See `dsd COMMAND --help` for each command.
    """


@app.command()
def match(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files to score.")],
    texts: Annotated[list[str], typer.Option("--text", help="A text to score; repeatable.")],
    checkpoint: Checkpoint = str(EMBEDDED),
    prompt: Prompt = None,
    method: MethodName = None,
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
    matcher = _matcher(checkpoint, prompt, method)
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


@app.command()
def evaluate(
    table: Annotated[
        Path, typer.Argument(help="A CSV with the columns image,text,label; image paths start at its folder.")
    ],
    checkpoint: Checkpoint = str(EMBEDDED),
    prompt: Prompt = None,
    method: MethodName = None,
    scores: Annotated[
        Path | None, typer.Option(help="Save the score of every image and text to this CSV file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how often the right text or image of each example has the highest score.

    \b
    The rows of one image are an example, of which label is 1 for the texts that match and 0 for the others:
      image,text,label
      dogs/1.jpg,a dog asleep,1
      dogs/1.jpg,a dog awake,0
    With a column id, the rows of an id are an example; with a column category, accuracy is by category too.

    \b
    Examples:
      dsd evaluate photos/pairs.csv
      dsd evaluate photos/pairs.csv --scores scores.csv --json
    """
    if scores is not None:
        terminal.check_output("--scores", scores)
    from dsd import own

    own.check_table(table)
    found = own.evaluate(_matcher(checkpoint, prompt, method), table)
    if scores is not None:
        write_atomic(scores, _csv(found).encode())
    if as_json:
        metrics = {name: {**value.as_dict(), "chance": found.chance[name]} for name, value in found.accuracy.items()}
        terminal.print_json({"accuracy": metrics, "left_out": found.left_out})
        return
    rows = (
        (name, f"{100 * i.value:.1f} %", f"{100 * i.low:.1f} to {100 * i.high:.1f} %",
         f"{100 * found.chance[name]:.1f} %", f"{i.n:,}")
        for name, i in found.accuracy.items()
    )  # fmt: skip
    terminal.print_table(
        ("metric", "accuracy", f"{100 * own.BOOTSTRAP.confidence:g} % interval", "chance", "n"), rows, number="n"
    )
    for example, reason in found.left_out.items():
        print(f"left out: {example}: {reason}")


@app.command()
def demo(
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="A checkpoint to choose from, a folder or a hub id; repeatable.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A trained prompt to choose from; repeatable.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 7860,
) -> None:
    """Open a page to try the matcher: images and texts in, scores and heat maps out.

    \b
    Examples:
      dsd demo
      dsd demo --checkpoint stable-diffusion-v1-5/stable-diffusion-v1-5 --port 8080
    """
    terminal.check_port(host, port)
    from dsd.demo import launch

    print(f"http://{host}:{port}: in some seconds; stop with Ctrl-C")
    launch(checkpoint or [], prompt or [], server_name=host, server_port=port)


def _csv(found: Evaluation) -> str:
    """Return the table of scores: a row per image and text of an example."""
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(("example", "image", "text", "label", "score", "best"))
    for example, scores_IT, files in zip(found.examples, found.scores, found.files, strict=True):
        best = (scores_IT == scores_IT.max()) & ((scores_IT == scores_IT.max()).sum() == 1)
        for (i, t), score in np.ndenumerate(scores_IT):
            label = int((i, t) in example.answer)
            writer.writerow((example.id, files[i], example.texts[t], label, repr(float(score)), int(best[i, t])))
    return sheet.getvalue()


def _matcher(checkpoint: str, prompt: str | None, method: str | None) -> Matcher:
    """Open a checkpoint with a prompt: a file, or the name of a registered one."""
    from dsd.matcher import Matcher

    with TemporaryDirectory() as folder:
        if prompt is not None and prompt.startswith(REGISTRY):
            if not registered_prompt:
                raise DsdError(
                    f"--prompt {prompt}: in a registry, which only a clone of the repository has: see README.md"
                )
            prompt = str(registered_prompt[0](prompt, Path(folder)))
        return Matcher.from_pretrained(checkpoint, prompt=prompt, method=method)


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


def run() -> None:
    """Run the commands of the pipeline where it is installed, else those of this module."""
    for entry in entry_points(group="dsd.commands"):
        try:
            pipeline = entry.load()
        except ModuleNotFoundError as error:
            if error.name != "flows":
                raise
        else:
            pipeline()
    app()


if __name__ == "__main__":
    run()
