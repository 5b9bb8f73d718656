"""Output of the commands: tables, JSON, and the heat map file."""

from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from dsd.data.images import overlay
from dsd.errors import DsdError
from dsd.store import write_atomic

if TYPE_CHECKING:
    from dsd.matcher import Heatmap

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".pdf": "PDF"}  # of a heat map's file
SIDE, TITLE, GAP = 220, 30, 8  # of a heat map's panels, in pixels


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(
    headings: Iterable[str], rows: Iterable[Sequence[str]], *, number: str = "", title: str | None = None, gap: int = 2
) -> None:
    """Print a table that fits the terminal, or nothing if it has no rows; never wrap the column `number`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, gap - 1), pad_edge=False, title=title, title_justify="left")
    for heading in headings:
        aligned = "right" if heading == number else "left"
        table.add_column(heading, justify=aligned, overflow="fold", no_wrap=heading in ("", number))
    for row in rows:
        table.add_row(*row)
    if table.rows:
        Console(highlight=False, markup=False).print(table)


def check_heatmap(path: Path) -> None:
    """Raise DsdError unless an image file can be written at this path; done before a checkpoint is opened."""
    if path.suffix.lower() not in FORMATS:
        raise DsdError(f"--heatmap {path}: not the name of an image file; it must end in one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise DsdError(f"--heatmap {path}: no folder {path.parent}")
    check_output("--heatmap", path)


def check_output(option: str, path: Path) -> None:
    """Raise DsdError unless a file can be written at this path, where folders may be made."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not (there.is_dir() and os.access(there, os.W_OK)):
        raise DsdError(f"{option} {path}: {'a folder' if path.is_dir() else f'{there} is no writable folder'}")


def save_heatmap(heatmap: Heatmap, path: Path) -> None:
    """Save the image, and next to it a copy per word under that word's heat map, as one image file."""
    panels = [("", Image.fromarray(heatmap.picture))]
    panels += [
        (word, overlay(heatmap.picture, map_RR)) for word, map_RR in zip(heatmap.words, heatmap.maps, strict=True)
    ]
    sheet = Image.new("RGB", (GAP + (SIDE + GAP) * len(panels), SIDE + TITLE + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TITLE * 0.6)
    for n, (word, panel) in enumerate(panels):
        left = GAP + (SIDE + GAP) * n
        draw.text((left + SIDE / 2, TITLE / 2), word, "black", font, anchor="mm")
        sheet.paste(panel.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, TITLE))
    image = io.BytesIO()
    sheet.save(image, FORMATS[path.suffix.lower()])
    try:
        write_atomic(path, image.getvalue())
    except OSError as error:
        raise DsdError(f"--heatmap {path}: {error.strerror}") from None


def check_port(host: str, port: int) -> None:
    """Raise DsdError if no server can listen there; done before a checkpoint is opened."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        # Python adds the address to the message of the system; a name that does not resolve has a message of its own.
        reason = str(error.strerror).partition(" (while")[0].lower()
        raise DsdError(f"--host {host} --port {port}: {reason}") from None
